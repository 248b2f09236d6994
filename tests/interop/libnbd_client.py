"""libnbd through its Python binding; run by Debian's Python, which has it: libnbd_client.py URI.

Ends with a traceback where something is not as it should be.
"""

import errno
import itertools
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import nbd

SIZE = 8 << 20
DEPTH = 64


def connect(uri: str) -> nbd.NBD:
    """A connection that also sends what the server's block sizes or flags advise against."""
    client = nbd.NBD()
    client.connect_uri(uri)
    client.set_strict_mode(0)
    return client


def refused(number: int, call: Callable[..., Any], *arguments: Any) -> None:
    """The call fails, with that errno."""
    try:
        call(*arguments)
        found = 0
    except nbd.Error as error:
        found = error.errnum
    assert found == number, f"{call.__name__}{arguments}: {errno.errorcode.get(found, 'no error')}"


def run_side_by_side(client: nbd.NBD, starts: Iterable[Callable[[Any], Any]]) -> None:
    """Keep DEPTH requests in flight; start(completion) begins one. They end in any order."""
    failed: list[int] = []

    def completion(error: Any) -> int:
        failed.extend([error.value] if error.value else [])
        return 1

    for start in starts:
        while client.aio_in_flight() >= DEPTH:
            client.poll(-1)
        start(completion)
    while client.aio_in_flight():
        client.poll(-1)
    assert not failed, failed


def check_flags(client: nbd.NBD) -> None:
    assert client.can_multi_conn()
    assert client.can_fua()
    assert client.can_flush()
    assert client.can_trim()
    assert client.can_zero()
    assert client.can_cache()
    assert client.can_df()
    assert client.can_fast_zero()
    assert client.get_structured_replies_negotiated()
    assert not client.is_read_only()
    assert client.get_block_size(nbd.SIZE_PREFERRED) == 4096
    assert client.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20


def check_side_by_side(clients: list[nbd.NBD], model: bytearray) -> None:
    """Neighbouring pieces of odd sizes from one byte on, written at once over two connections, then read."""
    edges = sorted({0, SIZE, *(random.randrange(SIZE) for _ in range(3000))})
    pieces = list(itertools.pairwise(edges))
    random.shuffle(pieces)
    for number, client in enumerate(clients):
        run_side_by_side(client, [write_piece(client, model, *piece) for piece in pieces[number :: len(clients)]])
    buffers = [nbd.Buffer(end - start) for start, end in pieces]
    reads = [read_piece(clients[1], buffer, start) for buffer, (start, _) in zip(buffers, pieces, strict=True)]
    run_side_by_side(clients[1], reads)
    for buffer, (start, end) in zip(buffers, pieces, strict=True):
        assert buffer.to_bytearray() == model[start:end], (start, end)
    assert clients[0].pread(SIZE, 0) == model


def write_piece(client: nbd.NBD, model: bytearray, start: int, end: int) -> Callable[[Any], Any]:
    """What begins to write the model's bytes there."""
    buffer = nbd.Buffer.from_bytearray(model[start:end])
    return lambda completion: client.aio_pwrite(buffer, start, completion)


def read_piece(client: nbd.NBD, buffer: Any, start: int) -> Callable[[Any], Any]:
    """What begins to fill the buffer from there."""
    return lambda completion: client.aio_pread(buffer, start, completion)


def check_each_command(first: nbd.NBD, second: nbd.NBD, model: bytearray) -> None:
    """What one connection was told is done, another one sees."""
    first.pwrite(b"fua" * 1000, 4099, nbd.CMD_FLAG_FUA)
    model[4099:7099] = b"fua" * 1000
    first.zero(10_000, 12_345, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    model[12_345:22_345] = bytes(10_000)
    first.zero(1, 4096)
    model[4096] = 0
    first.trim(8192, 40_960, nbd.CMD_FLAG_FUA)
    model[40_960:49_152] = bytes(8192)
    first.flush()
    assert second.pread(SIZE, 0) == model


def check_errors(client: nbd.NBD, size: int) -> None:
    refused(errno.ENOSPC, client.pwrite, b"xx", size - 1)
    refused(errno.EINVAL, client.pread, 2, size - 1)
    refused(errno.EINVAL, client.trim, 2, size - 1)
    refused(errno.ENOSPC, client.zero, 2, size - 1)
    refused(errno.EINVAL, client.pread, (32 << 20) + 1, 0)
    client.pwrite(b"end", size - 3)
    assert client.pread(3, size - 3) == b"end", "it goes on after all that"


def main(uri: str) -> None:
    clients = [connect(uri), connect(uri)]
    check_flags(clients[0])
    random.seed(1)
    model = bytearray(random.randbytes(SIZE))
    check_side_by_side(clients, model)
    check_each_command(clients[0], clients[1], model)
    check_errors(clients[0], clients[0].get_size())
    for client in clients:
        client.shutdown()


main(sys.argv[1])
