"""What an import reads: a raw image (a file, a device, stdin) or a qcow2 file, without its holes.

An image is told from its first bytes, unless the format is given. What a guest wrote into a raw disk may look
like a qcow2 header that names any file of this machine as the one below it: a file below is therefore
followed only where the format was given.
"""

import errno
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, Final, Protocol

from blockstore.errors import CairnError, InvalidRequest, NotFound
from blockstore.units import BLOCK_SIZE, MIB, format_size

_CHUNK_BYTES: Final = MIB
_ZEROES: Final = bytes(_CHUNK_BYTES)
#: Between looks whether somebody still wants what a pipe does not bring.
_LOOK_S: Final = 0.2
_QCOW2_MAGIC: Final = b"QFI\xfb"


class Format(Enum):
    """What is in an image's file."""

    AUTO = "auto"
    RAW = "raw"
    QCOW2 = "qcow2"


class ImageInput(Protocol):
    """size_bytes: of the image, whole blocks. data_bytes: what has to be read of it, without holes."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def data_bytes(self) -> int: ...

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Offset and whole blocks of what is not zero, in order, at most 1 MiB each. Raises CairnError."""

    def stop(self) -> None:
        """A read that waits for data ends; nothing more is read."""


@contextmanager
def open_input(file: str, kind: Format, size_bytes: int | None) -> Iterator[ImageInput]:
    """The image that `file` names, `-` being stdin, which needs its size.

    size_bytes: a larger one than the file's makes the rest zeroes. Raises InvalidRequest and NotFound.
    """
    if file == "-":
        yield _standard_input(kind, size_bytes)
        return
    path = Path(file)
    if not path.exists():
        raise NotFound(f"{path}: no such file")
    if path.is_dir():
        raise InvalidRequest(f"{path} is a directory, and no image")
    if kind is Format.RAW or (kind is Format.AUTO and not _is_qcow2(path)):
        with path.open("rb", buffering=0) as opened:
            yield RawFile(opened.fileno(), str(path), size_bytes)
        return
    with _converted(path, follow_backing=kind is Format.QCOW2) as raw, raw.open("rb", buffering=0) as opened:
        yield RawFile(opened.fileno(), str(path), size_bytes)


def _standard_input(kind: Format, size_bytes: int | None) -> "PipedImage":
    if size_bytes is None:
        raise InvalidRequest("an image from stdin needs --size: how many bytes will come")
    if kind is Format.QCOW2:
        raise InvalidRequest("a qcow2 image cannot be read from stdin: import the file, or a raw image")
    if size_bytes % BLOCK_SIZE:
        raise InvalidRequest(f"--size {size_bytes} is no multiple of {BLOCK_SIZE}")
    return PipedImage(sys.stdin.fileno(), size_bytes)


def _is_qcow2(path: Path) -> bool:
    with path.open("rb") as opened:
        return opened.read(len(_QCOW2_MAGIC)) == _QCOW2_MAGIC


class RawFile:
    """A file or a device that can be read at any place; its holes are skipped."""

    def __init__(self, descriptor: int, name: str, size_bytes: int | None = None) -> None:
        self._descriptor = descriptor
        self._name = name
        self._file_bytes = os.lseek(descriptor, 0, os.SEEK_END)
        whole_blocks = -(-self._file_bytes // BLOCK_SIZE) * BLOCK_SIZE
        self.size_bytes = whole_blocks if size_bytes is None else size_bytes
        if self.size_bytes < whole_blocks or self.size_bytes % BLOCK_SIZE:
            raise InvalidRequest(
                f"--size {size_bytes} is no multiple of {BLOCK_SIZE}, or less than the {whole_blocks} bytes of {name}"
            )
        if not self.size_bytes:
            raise InvalidRequest(f"{name} is empty")

    @property
    def data_bytes(self) -> int:
        return sum(end - start for start, end in self._ranges())

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        for start, end in self._ranges():
            for offset in range(start, end, _CHUNK_BYTES):
                data = self._read(offset, min(_CHUNK_BYTES, end - offset))
                if data != _ZEROES[: len(data)]:
                    yield offset, data

    def stop(self) -> None:
        """A file does not keep one waiting."""

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Begin and end of what is not a hole, in whole blocks, without overlap."""
        end = 0
        while end < self._file_bytes:
            found = _data_at(self._descriptor, end, self._file_bytes)
            if found is None:
                return
            start = max(end, found[0] // BLOCK_SIZE * BLOCK_SIZE)
            end = -(-found[1] // BLOCK_SIZE) * BLOCK_SIZE
            yield start, end

    def _read(self, offset: int, length: int) -> bytes:
        """Whole blocks; the last one is filled up. Raises CairnError where the file became shorter."""
        wanted = min(length, self._file_bytes - offset)
        data = os.pread(self._descriptor, wanted, offset)
        while len(data) < wanted and (more := os.pread(self._descriptor, wanted - len(data), offset + len(data))):
            data += more
        if len(data) < wanted:
            raise CairnError(f"{self._name} became shorter while it was read: import it when nobody changes it")
        return data + bytes(length - wanted)


def _data_at(descriptor: int, offset: int, size: int) -> tuple[int, int] | None:
    """The first run of data at or after `offset`, None where only a hole follows; all where holes are not told."""
    try:
        start = os.lseek(descriptor, offset, os.SEEK_DATA)
        return start, os.lseek(descriptor, start, os.SEEK_HOLE)
    except OSError as error:
        return None if error.errno == errno.ENXIO else (offset, size)


class PipedImage:
    """Exactly size_bytes that come through a pipe: fewer are an image that was cut off."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._descriptor = descriptor
        self._stopped = False

    @property
    def data_bytes(self) -> int:
        return self.size_bytes

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        for offset in range(0, self.size_bytes, _CHUNK_BYTES):
            wanted = min(_CHUNK_BYTES, self.size_bytes - offset)
            data = self._read(wanted)
            if len(data) < wanted:
                raise InvalidRequest(
                    f"stdin ended after {offset + len(data)} of the {self.size_bytes} bytes of --size: "
                    "nothing is imported"
                )
            if data != _ZEROES[:wanted]:
                yield offset, data
        if self._read(1):
            raise InvalidRequest(
                f"more came from stdin than the {self.size_bytes} bytes of --size: nothing is imported"
            )

    def _read(self, length: int) -> bytes:
        """`length` bytes, fewer at the end only."""
        data = bytearray()
        while len(data) < length and (more := self._read_some(length - len(data))):
            data += more
        return bytes(data)

    def _read_some(self, length: int) -> bytes:
        """What has come, at least a byte; none at the end."""
        while not select.select([self._descriptor], [], [], _LOOK_S)[0]:
            if self._stopped:
                return b""
        return os.read(self._descriptor, length)

    def stop(self) -> None:
        self._stopped = True


@contextmanager
def _converted(path: Path, *, follow_backing: bool) -> Iterator[Path]:
    """The content of a qcow2 file as a raw one with holes, in the directory for temporary files.

    Raises CairnError where qemu-img is missing or cannot do it, InvalidRequest where another file is below it.
    """
    qemu_img = shutil.which("qemu-img")
    if qemu_img is None:
        raise CairnError(
            f"{path} is a qcow2 image, which qemu-img reads, and that is not installed: "
            "apt-get install qemu-utils, or convert it to raw elsewhere"
        )
    _refuse_backing(_json([qemu_img, "info", "--output=json", "-f", "qcow2", str(path)]), path, follow_backing)
    with tempfile.TemporaryDirectory(prefix="cairn-import-") as directory:
        raw = Path(directory) / "image.raw"
        _run([qemu_img, "convert", "-f", "qcow2", "-O", "raw", "-S", "4k", str(path), str(raw)])
        yield raw


def _refuse_backing(information: dict[str, Any], path: Path, follow_backing: bool) -> None:
    below = information.get("backing-filename") or information.get("format-specific", {}).get("data", {}).get(
        "data-file"
    )
    if below and not follow_backing:
        raise InvalidRequest(f"{path} lies upon {below}: --format qcow2 imports what both show together")


def _json(argv: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_run(argv))
    return found


def _run(argv: list[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CairnError(f"qemu-img ended with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def describe(image: ImageInput) -> str:
    """Its sizes, for people."""
    return f"{format_size(image.size_bytes)}, of which {format_size(image.data_bytes)} are data"
