"""The futures of those who wait for a volume: they are given what they wait for unless they gave up, and are joined."""

import asyncio
from collections.abc import Hashable, Iterable
from typing import Any, cast

from blockstore.errors import CairnError


def resolve(ticket: Hashable, value: Any) -> None:
    """ticket: a future; one that is done was cancelled by who waited."""
    future = cast("asyncio.Future[Any]", ticket)
    if not future.done():
        future.set_result(value)


def complete(tickets: Iterable[Hashable]) -> None:
    """There is nothing to be told but that it is done."""
    for ticket in tickets:
        resolve(ticket, None)


def fail(tickets: Iterable[Hashable], error: CairnError) -> None:
    """All of them, unless who waited gave up."""
    for ticket in tickets:
        future = cast("asyncio.Future[Any]", ticket)
        if not future.done():
            future.set_exception(error)


async def finished(parts: list[asyncio.Future[Any]]) -> None:
    """All have ended. Raises what the first one raised that did."""
    await asyncio.wait(parts)
    errors = [error for part in parts if (error := part.exception()) is not None]
    if errors:
        raise errors[0]


async def joined(parts: list[asyncio.Future[bytes | memoryview]]) -> bytes:
    """The contents of reads, one behind the other. Raises as finished does."""
    await finished(parts)
    return b"".join([part.result() for part in parts])
