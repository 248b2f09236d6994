"""Images that go out and come in: holes, formats, what is left behind on failure."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from blockstore.cli.image_input import Format, ImageInput, PipedImage, open_input
from blockstore.cli.image_output import open_output
from blockstore.errors import AlreadyExists, CairnError, InvalidRequest, NotFound
from tests.programs import require_programs

MIB = 1 << 20
QCOW2 = [Format.AUTO, Format.QCOW2]


def content_of(image: ImageInput) -> bytes:
    """As the other side sees it: what is left out is zero."""
    content = bytearray(image.size_bytes)
    end = 0
    for offset, data in image.chunks():
        assert offset >= end
        assert offset % 4096 == len(data) % 4096 == 0
        assert 0 < len(data) <= MIB
        end = offset + len(data)
        assert end <= image.size_bytes
        content[offset:end] = data
    return bytes(content)


def sparse_file(path: Path, size: int, data: dict[int, bytes]) -> bytes:
    """A file with holes; its content."""
    content = bytearray(size)
    with path.open("wb") as file:
        file.truncate(size)
        for offset, each in data.items():
            os.pwrite(file.fileno(), each, offset)
            content[offset : offset + len(each)] = each
    return bytes(content)


# ---- out


def test_a_file_has_holes_and_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with open_output(str(path), force=False) as output:
        output.write(10 * MIB, b"x" * 5000)
        output.write(90 * MIB, b"y")
        assert not path.exists()
        output.finish(100 * MIB)
    content = path.read_bytes()
    assert len(content) == 100 * MIB
    assert content[10 * MIB : 10 * MIB + 5001] == b"x" * 5000 + b"\0"
    assert path.stat().st_blocks * 512 < MIB
    assert os.listdir(tmp_path) == ["image"]


def interrupted_export(path: Path, force: bool) -> None:
    with open_output(str(path), force=force) as output:
        output.write(0, b"x")
        raise KeyboardInterrupt


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"old")
    for path, force in ((tmp_path / "new", False), (old, True)):
        with pytest.raises(KeyboardInterrupt):
            interrupted_export(path, force)
    assert os.listdir(tmp_path) == ["old"]
    assert old.read_bytes() == b"old"


def test_a_file_is_replaced_by_force_only(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"old")
    with pytest.raises(AlreadyExists, match="--force"), open_output(str(path), force=False):
        pass
    with open_output(str(path), force=True) as output:
        output.finish(3)
    assert path.read_bytes() == b"\0\0\0"


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "image"
    output = open_output(str(path), force=False)
    output.__enter__().finish(3)
    path.write_bytes(b"another's")
    with pytest.raises(AlreadyExists, match="meanwhile"):
        output.__exit__(None, None, None)
    assert path.read_bytes() == b"another's"
    assert os.listdir(tmp_path) == ["image"]


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFound), open_output(str(tmp_path / "no" / "image"), force=False):
        pass


def test_a_pipe_gets_every_byte(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", tmp_path / "got"
    os.mkfifo(pipe)
    with got.open("wb") as file, subprocess.Popen(["cat", pipe], stdout=file) as reader:
        with open_output(str(pipe), force=True) as output:
            output.write(2 * MIB, b"x" * MIB)
            output.finish(4 * MIB)
        assert reader.wait(60) == 0
    assert got.read_bytes() == bytes(2 * MIB) + b"x" * MIB + bytes(MIB)


# ---- in


@pytest.mark.parametrize("seed", range(5))
def test_a_raw_file_with_holes(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    size = chance.randrange(1, 20 * MIB)
    data = {chance.randrange(size): chance.randbytes(chance.randrange(1, 2 * MIB)) for _ in range(5)}
    content = sparse_file(tmp_path / "raw", size, {at: each[: size - at] for at, each in data.items()})
    with open_input(str(tmp_path / "raw"), Format.AUTO, None) as image:
        assert image.size_bytes == -(-size // 4096) * 4096
        assert content_of(image) == content.ljust(image.size_bytes, b"\0")


def test_holes_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "raw").open("wb") as file:
        file.truncate(1 << 40)
        os.pwrite(file.fileno(), b"x", 1 << 39)
    with open_input(str(tmp_path / "raw"), Format.AUTO, None) as image:
        assert (image.size_bytes, image.data_bytes) == (1 << 40, 4096)
        assert list(image.chunks()) == [(1 << 39, b"x".ljust(4096, b"\0"))]


def test_written_zeroes_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(2 * MIB) + b"x" * 4096)
    with open_input(str(tmp_path / "raw"), Format.AUTO, None) as image:
        assert list(image.chunks()) == [(2 * MIB, b"x" * 4096)]


def test_a_larger_size_is_filled_with_zeroes(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"x" * 5000)
    with open_input(str(tmp_path / "raw"), Format.AUTO, 8 * MIB) as image:
        assert content_of(image) == (b"x" * 5000).ljust(8 * MIB, b"\0")


@pytest.mark.parametrize("size", [4096, 12_289])
def test_a_size_that_does_not_fit(tmp_path: Path, size: int) -> None:
    (tmp_path / "raw").write_bytes(b"x" * 5000)
    with pytest.raises(InvalidRequest, match="--size"), open_input(str(tmp_path / "raw"), Format.AUTO, size):
        pass


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidRequest, match="empty"), open_input(str(tmp_path / "empty"), Format.AUTO, None):
        pass
    with pytest.raises(InvalidRequest, match="is a directory"), open_input(str(tmp_path), Format.AUTO, None):
        pass
    with pytest.raises(NotFound), open_input(str(tmp_path / "no"), Format.AUTO, None):
        pass


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(b"x" * 3 * MIB)
    with open_input(str(path), Format.AUTO, None) as image:
        chunks = image.chunks()
        assert next(chunks)[0] == 0
        os.truncate(path, MIB + 1)
        with pytest.raises(CairnError, match="shorter"):
            list(chunks)


def piped(content: bytes, size: int) -> ImageInput:
    """An image of that size from a pipe that brings `content`."""
    read, write = os.pipe()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=write) as feeder:
        os.close(write)
        assert feeder.stdin is not None
        image = PipedImage(read, size)
        if content:
            feeder.stdin.write(content)
        feeder.stdin.close()
        feeder.wait(60)
    return image


def test_from_a_pipe() -> None:
    content = b"x" * 4096 + bytes(4096) + b"y" * 4096
    image = piped(content, len(content))
    assert content_of(image) == content


@pytest.mark.parametrize(("size", "message"), [(16_384, "ended after 12288 of the 16384"), (8192, "more came")])
def test_a_pipe_that_brings_less_or_more(size: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        list(piped(b"x" * 12_288, size).chunks())


def test_a_pipe_that_brings_nothing_can_be_given_up() -> None:
    read, write = os.pipe()
    try:
        image = PipedImage(read, 4096)
        image.stop()
        with pytest.raises(InvalidRequest, match="ended"):
            list(image.chunks())
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize(
    ("kind", "size"), [(Format.AUTO, None), (Format.QCOW2, 4096), (Format.RAW, 4097)], ids=["size", "qcow2", "blocks"]
)
def test_what_cannot_come_from_stdin(kind: Format, size: int | None) -> None:
    with pytest.raises(InvalidRequest), open_input("-", kind, size):
        pass


# ---- qcow2


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("kind", QCOW2)
def test_a_qcow2_file(tmp_path: Path, kind: Format) -> None:
    require_programs("qemu-img")
    content = sparse_file(tmp_path / "raw", 30 * MIB, {5 * MIB: os.urandom(MIB), 29 * MIB + 5: b"end"})
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", tmp_path / "raw", tmp_path / "image.qcow2")
    with open_input(str(tmp_path / "image.qcow2"), kind, None) as image:
        assert image.data_bytes < 3 * MIB
        assert content_of(image) == content


def test_a_qcow2_file_upon_another_is_followed_only_where_that_was_said(tmp_path: Path) -> None:
    require_programs("qemu-img")
    (tmp_path / "secret").write_bytes(b"s" * MIB)
    upper = tmp_path / "upper"
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", upper)
    with pytest.raises(InvalidRequest, match="secret"), open_input(str(upper), Format.AUTO, None):
        pass
    with open_input(str(upper), Format.QCOW2, None) as image:
        assert content_of(image) == b"s" * MIB
    with open_input(str(upper), Format.RAW, None) as image:
        assert content_of(image)[:4] == b"QFI\xfb"


def test_a_damaged_qcow2_file(tmp_path: Path) -> None:
    require_programs("qemu-img")
    (tmp_path / "image").write_bytes(b"QFI\xfb" + bytes(100))
    with pytest.raises(CairnError, match="qemu-img ended"), open_input(str(tmp_path / "image"), Format.AUTO, None):
        pass


def test_a_qcow2_file_without_qemu_img(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (tmp_path / "image").write_bytes(b"QFI\xfb" + bytes(100))
    with pytest.raises(CairnError, match="qemu-utils"), open_input(str(tmp_path / "image"), Format.AUTO, None):
        pass
