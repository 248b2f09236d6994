"""Texts, numbers and columns, both ways; and that no count is believed before it is bounded."""

import tracemalloc
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from blockstore.errors import Corrupt
from snapshotd.compression import compress, expand
from snapshotd.fields import MAX_TEXT, Fields, Width, column, text


@given(st.lists(st.integers(0, 2**32 - 1)), st.sampled_from([1, 2, 4]))
def test_a_column_comes_back(numbers: list[int], width: Width) -> None:
    numbers = [number % 256**width for number in numbers]
    fields = Fields(column(numbers, width), "this")
    assert list(fields.column(len(numbers), width)) == numbers
    fields.end()


def test_a_column_lies_by_planes() -> None:
    assert column([0x0102, 0x0304], 2) == bytes([2, 4, 1, 3])


def test_a_number_too_large_for_its_column_is_refused() -> None:
    with pytest.raises(OverflowError):
        column([65_536], 2)


@given(st.text(max_size=200))
def test_a_text_comes_back(value: str) -> None:
    fields = Fields(text(value), "this")
    assert fields.text() == value
    fields.end()


def test_a_text_that_does_not_fit_is_refused() -> None:
    assert len(text("x" * MAX_TEXT)) == MAX_TEXT + 2
    with pytest.raises(ValueError, match="65536 bytes does not fit"):
        text("x" * (MAX_TEXT + 1))


@pytest.mark.parametrize(
    ("data", "read"),
    [
        (b"\x05\x00abc", lambda fields: fields.text()),
        (b"\x02\x00\xff\xfe", lambda fields: fields.text()),
        (b"\x07", lambda fields: fields.number(1, 6)),
        (b"\x07", lambda fields: fields.number(2)),
        (b"\x07", lambda fields: fields.end()),
        (b"abc", lambda fields: fields.names(1, 4)),
        (b"abc", lambda fields: fields.column(2**31, 4)),
    ],
)
def test_what_is_missing_too_large_or_left_over_is_corrupt(data: bytes, read: Callable[[Fields], object]) -> None:
    with pytest.raises(Corrupt, match=r"^this "):
        read(Fields(data, "this"))


@given(st.binary(max_size=3000) | st.binary(max_size=20).map(lambda part: part * 100))
def test_a_body_comes_back(content: bytes) -> None:
    body = compress(content)
    assert len(body) <= len(content) + 5
    assert expand(body, len(content), "this") == content


def test_content_above_the_limit_is_refused() -> None:
    body = compress(bytes(1001))
    with pytest.raises(Corrupt, match="claims 1001 bytes of content: at most 1000"):
        expand(body, 1000, "this")


def _body(method: int, size: int, data: bytes) -> bytes:
    return bytes([method]) + size.to_bytes(4, "little") + data


_ZEROES = zstandard.ZstdCompressor().compress(bytes(1000))
_SILENT = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "body of 0 bytes"),
        (_body(2, 3, b"abc"), "method 2"),
        (_body(0, 4, b"abc"), "3 bytes of content where it claims 4"),
        (_body(1, 999, _ZEROES), "zstd frame of 1000 bytes where it claims 999"),
        (_body(1, 1001, _ZEROES), "zstd frame of 1000 bytes where it claims 1001"),
        (_body(1, 1000, _SILENT), "where it claims 1000"),
        (_body(1, 1000, _ZEROES[:-1]), "does not decompress"),
        (_body(1, 1000, _ZEROES + b"x"), "does not decompress"),
        (_body(1, 1000, _ZEROES + _ZEROES), "does not decompress"),
        (_body(1, 1000, b"no zstd"), "does not decompress"),
    ],
)
def test_a_body_that_is_none_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(Corrupt, match=message):
        expand(body, 2000, "this")


def test_a_decompression_bomb_takes_no_memory() -> None:
    """1 GiB of zeroes in 33 KiB: whatever size it claims, no more than the limit is ever taken."""
    packer = zstandard.ZstdCompressor(level=1).compressobj(size=1 << 30)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1024)) + packer.flush()
    tracemalloc.start()
    try:
        for claimed in (4096, 1 << 20, 1 << 30):
            with pytest.raises(Corrupt, match="claims"):
                expand(_body(1, claimed, packed), 1 << 20, "this")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
