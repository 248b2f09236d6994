"""Coverage-guided fuzzing of what reads a client's bytes: handshake, requests, and the replies that answer them.

    python -m tests.fuzz_nbd --seconds 600

Atheris (libFuzzer) changes whole conversations, which begin as those of tests/test_nbd_fuzz.py, wherever that reaches
code not reached before. Everything here is pure, so some thousand conversations a second are tried. A failure ends it,
and leaves the bytes in a file whose name it prints; `--input FILE` tries just these again.

What must hold for any bytes: nothing raises but what ends the connection; options are answered by replies that parse;
a payload takes no more memory than a request may; every request gets one reply, in the style agreed on, that parses
by the NBD text; and a read's reply is what the export holds.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["nbd_server"]):
    from nbd_server import block_status, transmission
    from nbd_server.handshake import Handshake
    from nbd_server.handshake_states import State
    from nbd_server.metadata import Extent
    from nbd_server.replies import replies_of
    from nbd_server.request_parser import RequestParser
    from nbd_server.terms import Terms
    from nbd_server.transmission import MAX_REQUEST_BYTES, Refusal, Request
    from nbd_server.wire import Command, ProtocolError

from tests.nbd_chunks import parse_chunks, read_from
from tests.test_nbd_fuzz import conversation

SIZE = 1 << 20
CONTENT = bytes(8192) + random.Random(1).randbytes(5000) + bytes(SIZE - 13192)
_SEEDS = 300


@dataclass
class Disk:
    """All that the handshake asks of an export."""

    name: str = "disk"
    size_bytes: int = SIZE
    description: str = "for fuzzing"
    read_only: bool = False
    client: str = ""
    aliases: tuple[str, ...] = ()
    shared: bool = True
    snapshots: Mapping[str, str] = field(default_factory=lambda: {"snap-1": "snap-1"})


class Disks:
    """One export."""

    def __init__(self) -> None:
        self._disk = Disk()

    def find(self, name: str) -> Disk | None:
        return self._disk if name in ("", "disk") else None

    def why_not(self, name: str) -> str:
        return "no such export"

    def look_up(self, name: str, *, snapshots: bool = False) -> Awaitable[None] | None:
        return None

    def __iter__(self) -> Iterator[Disk]:
        return iter([self._disk])


def one_conversation(data: bytes) -> None:
    """What a client sends, all at once."""
    shaken = Handshake(Disks())
    shaken.receive_data(data)
    while shaken.data_to_send():
        pass
    assert shaken.state in State
    if shaken.state is State.TRANSMISSION:
        requests(shaken.leftover, shaken.options.terms)


def requests(data: bytes, terms: Terms) -> None:
    """The transmission phase: each request is answered."""
    parser = RequestParser(lambda request: transmission.refusal(request, SIZE, False, terms), terms.style)
    rest = memoryview(data)
    try:
        while rest:
            buffer = parser.buffer()
            assert len(buffer) <= MAX_REQUEST_BYTES
            count = min(len(rest), len(buffer))
            buffer[:count] = rest[:count]
            parser.received(count)
            rest = rest[count:]
            while (request := parser.next_request()) is not None:
                if request.command == Command.DISC:
                    return
                answer(request, terms)
    except ProtocolError:
        return


def answer(request: Request, terms: Terms) -> None:
    """As a connection does, with an export of constant content."""
    made = replies_of(terms.style)
    if request.refusal is not None:
        reply = made.failed(request, request.refusal)
    elif request.command == Command.READ:
        reply = made.data(request, CONTENT[request.offset : request.offset + request.length])
    elif request.command == Command.BLOCK_STATUS:
        asked = block_status.asked(request, terms, SIZE)
        if isinstance(asked, Refusal):
            reply = made.failed(request, asked)
        else:
            reply = made.status(asked[0], [(context, [Extent(asked[0].length, 0)]) for context in asked[1]])
    else:
        assert request.payload is None or len(request.payload) == request.length
        reply = made.done(request)
    check(request, b"".join(reply), terms)


def check(request: Request, reply: bytes, terms: Terms) -> None:
    if not terms.style and request.command == Command.READ and request.refusal is None:
        assert reply[16:] == CONTENT[request.offset : request.offset + request.length]
        return
    chunks = parse_chunks(reply)
    assert {chunk.cookie for chunk in chunks} == {request.cookie}
    if request.refusal is not None:
        assert chunks[-1].error == request.refusal.error
    elif request.command == Command.READ:
        assert read_from(chunks, request.offset, request.length) == CONTENT[request.offset :][: request.length]


def main() -> None:
    """Fuzz for a while, or try one input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="how long; default 60")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--input", type=Path, help="try the bytes of this file, and nothing else")
    arguments = parser.parse_args()
    if arguments.input is not None:
        one_conversation(arguments.input.read_bytes())
        return
    chosen = arguments.seed or random.randrange(1, 1 << 31)
    print(f"again with: python -m tests.fuzz_nbd --seconds {arguments.seconds} --seed {chosen}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as corpus:
        chance = random.Random(chosen)
        for number in range(_SEEDS):
            (Path(corpus) / str(number)).write_bytes(conversation(chance)[:65536])
        options = [f"-max_total_time={arguments.seconds}", "-max_len=65536", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, f"-seed={chosen}", corpus], one_conversation)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
