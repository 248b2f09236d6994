"""Connections that are kept: one channel for each address, made with the first call to it."""

import asyncio
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

import grpc

from blockstore.grpc_endpoint import open_channel

Caller = TypeVar("Caller")
"""What calls are made by: a stub, or the channel itself where there are several."""


class Connections(Generic[Caller]):
    """make: the caller of a channel. It is made once for each channel, as a stub takes as long as a call."""

    def __init__(self, make: Callable[[grpc.aio.Channel], Caller]) -> None:
        self._make = make
        self._kept: dict[str, tuple[grpc.aio.Channel, Caller]] = {}

    def to(self, address: str) -> Caller:
        """Whoever listens at HOST:PORT; nothing is dialled before the first call."""
        if address not in self._kept:
            channel = open_channel(address)
            self._kept[address] = channel, self._make(channel)
        return self._kept[address][1]

    async def keep_only(self, addresses: Collection[str]) -> None:
        """Close those to all other addresses; calls under way there are cancelled."""
        gone = [self._kept.pop(address)[0] for address in self._kept.keys() - set(addresses)]
        await asyncio.gather(*(channel.close(None) for channel in gone))

    async def close(self) -> None:
        """All of them; one that is asked for later is a new one."""
        await self.keep_only(())
