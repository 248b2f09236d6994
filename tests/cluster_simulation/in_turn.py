"""One client of all volumes, who writes to one after the other: what a snapshot of several must keep in order.

A write to one volume is sent when that to the volume before was answered. So a snapshot of both that shows the later
one and not the earlier is of no instant (guests.check_one_moment).
"""

import asyncio
from random import Random
from typing import Final

import grpc

from tests.cluster_simulation.client import Client
from tests.cluster_simulation.cluster import SimulatedCluster
from tests.cluster_simulation.guests import Guest, Guests
from tests.cluster_simulation.model import IN_TURN

_PAUSE_S: Final = 0.0, 0.1


class InTurn:
    """The only one who writes the block IN_TURN of each volume."""

    def __init__(self, cluster: SimulatedCluster, guests: Guests) -> None:
        self._cluster, self._guests = cluster, guests
        self._random = Random(cluster.loop.random.getrandbits(64))
        self._clients: dict[Guest, Client] = {}

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                for guest in list(self._guests.guests):
                    await self._cluster.busy.wait()
                    await self._write(guest)
                await self._forget_those_that_are_gone()
                await asyncio.sleep(self._random.uniform(*_PAUSE_S))
        finally:
            for client in self._clients.values():
                await client.close()

    async def _write(self, guest: Guest) -> None:
        if guest not in self._guests.guests:
            return
        if guest not in self._clients:
            self._clients[guest] = Client(self._cluster, guest.volume, guest.model, IN_TURN, IN_TURN + 1)
        try:
            await self._clients[guest].write(IN_TURN, 1, guest.model.next_number())
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:  # it was deleted meanwhile
                raise
        guest.model.operations += 1

    async def _forget_those_that_are_gone(self) -> None:
        for guest in [each for each in self._clients if each not in self._guests.guests]:
            await self._clients.pop(guest).close()
