"""What only a libnbd with extended headers does; run by the Python of Debian 13 that .ci/newer-libnbd unpacks.

    newer_libnbd_client.py URI       of a writable export of more than 4 GiB whose content may be lost

Ends with a traceback where something is not as it should be.
"""

import sys
from typing import Any

import nbd

GIB = 1 << 30
BLOCK = 4096


def status(client: nbd.NBD, length: int, offset: int, *contexts: str, flags: int = 0) -> dict[str, list[Any]]:
    """The descriptors of each context: of those named, or of all that were selected."""
    told: dict[str, list[Any]] = {}

    def extent(context: str, at: int, entries: list[Any], _: Any) -> int:
        assert at == offset
        told[context] = entries
        return 0

    if contexts:
        client.block_status_filter(length, offset, list(contexts), extent, flags)
    else:
        client.block_status_64(length, offset, extent, flags)
    return told


def slow_zero(client: nbd.NBD) -> str:
    """How a fast zero of a part of a block ends."""
    try:
        client.zero(BLOCK, 1, nbd.CMD_FLAG_FAST_ZERO)
    except nbd.Error as error:
        return str(error.errno)
    return ""


def main(uri: str) -> None:
    client = nbd.NBD()
    for context in ("base:allocation", "qemu:allocation-depth", "cairn:hydrated"):
        client.add_meta_context(context)
    client.connect_uri(uri)
    assert client.get_extended_headers_negotiated()
    assert client.can_block_status_payload()
    size = client.get_size()
    assert size > 4 * GIB

    client.zero(size, 0, nbd.CMD_FLAG_FAST_ZERO)
    client.trim(size - BLOCK, BLOCK)
    client.cache(5 * GIB, 0)
    client.pwrite(b"x" * 100_000, 4 * GIB + 1)
    chunks: list[tuple[int, int, int]] = []

    def chunk(data: Any, at: int, kind: int, _: Any) -> int:
        chunks.append((len(data), at - 4 * GIB, kind))
        return 0

    found = client.pread_structured(300_000, 4 * GIB, chunk)
    assert found == b"\0" + b"x" * 100_000 + bytes(199_999)
    assert chunks == [(102_400, 0, nbd.READ_DATA), (197_600, 102_400, nbd.READ_HOLE)], chunks
    assert client.pread_structured(300_000, 4 * GIB, chunk, nbd.CMD_FLAG_DF) == found

    told = status(client, BLOCK * 27, 4 * GIB - BLOCK)
    assert told["base:allocation"] == [(BLOCK, 3), (25 * BLOCK, 0), (BLOCK, 3)], told
    assert told["cairn:hydrated"] == [(27 * BLOCK, 1)]
    assert status(client, BLOCK * 27, 4 * GIB - BLOCK, "base:allocation").keys() == {"base:allocation"}
    (one,) = status(client, BLOCK * 27, 4 * GIB - BLOCK, "base:allocation", flags=nbd.CMD_FLAG_REQ_ONE).values()
    assert one == [(BLOCK, 3)]
    assert slow_zero(client) == "ENOTSUP", "a part of a block is zeroed by a read and a write"
    client.shutdown()


main(sys.argv[1])
