"""Answers that grow with the cluster, cut into messages that stay small whatever it holds.

The call is a stream; its messages have one type, and merged in their order they are the answer: scalars
stand in one of them, repeated fields go on from part to part. A server makes all parts of what it held at
one moment, so that nothing is listed twice or left out for what changes meanwhile; between two parts it
serves others. Invariants: there is at least one part; a stream that breaks is an error, and never a short answer.
"""

from collections.abc import AsyncIterable, Iterable, Iterator
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from blockstore.errors import QuorumUnavailable
from blockstore.units import KIB

#: Far below what one message may have, for the last entry comes on top; some hundred records, which take
#: a server a few milliseconds.
PART_SIZE: Final = 256 * KIB

Answer = TypeVar("Answer", bound=Message)


def in_parts(head: Answer, **lists: Iterable[Any]) -> Iterator[Answer]:
    """`head` with the repeated fields `lists`, in parts. head: begins the first part, and is used up.

    Each list may be an iterator: what it gives is made when its part is.
    """
    part, size = head, head.ByteSize()
    for name, entries in lists.items():
        for entry in entries:
            if size >= PART_SIZE:
                yield part
                part, size = type(head)(), 0
            getattr(part, name).append(entry)
            size += entry.ByteSize() if isinstance(entry, Message) else len(entry)
    yield part


async def whole(parts: AsyncIterable[Answer]) -> Answer:
    """The answer that `parts` are of. Raises what the call raises, QuorumUnavailable where it had none."""
    answer: Answer | None = None
    async for part in parts:
        if answer is None:
            answer = part
        else:
            answer.MergeFrom(part)
    if answer is None:
        raise QuorumUnavailable("a list ended before its first part: ask again")
    return answer
