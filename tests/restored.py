"""A volume that was made from a snapshot: the stack, the source's server, and the front-end's attempts at it."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from blockstore.domain import VolumeId
from blockstore.replication.leader import LeaderSettings
from blockstore.rpc import control_pb2 as pb
from nbd_server.attachments import Attachments
from nbd_server.attempt import Attempt
from nbd_server.exports import Exports
from nbd_server.server import NbdServer
from tests.snapshot_source import SNAPSHOT, SnapshotSource
from tests.stack import FAST, LIMIT_S, VOLUME, Stack, running_stack, until

#: Longer than a machine may stand still: a call that is made again would be counted twice.
_CALL_TIMEOUT_S = 20.0


class Restored:
    """One volume of `size_bytes` made from `source`; each `attach` is a front-end's process of its own."""

    def __init__(self, stack: Stack, source: SnapshotSource, size_bytes: int) -> None:
        self.stack = stack
        self.source = source
        self.size_bytes = size_bytes
        self.settings = stack.leader_settings
        self._attachments: list[Attachments] = []

    def ticket(self, **fields: Any) -> pb.OpenTicket:
        """At the next epoch, with the source, whether it is needed still or not."""
        ticket = self.stack.ticket(self.size_bytes)
        ticket.source.CopyFrom(self.source.message)
        ticket.hydration.paused = True
        for name, value in fields.items():
            if value is None:
                ticket.ClearField(name)  # type: ignore[arg-type]
            elif isinstance(value, bool):
                setattr(ticket, name, value)
            else:
                getattr(ticket, name).CopyFrom(value)
        return ticket

    async def attach(self, **fields: Any) -> Attempt:
        """By a new front-end; the background pass is paused unless `hydration` says otherwise."""
        attachments = self.front_end()
        return await self.open(attachments, self.ticket(**fields))

    def front_end(self) -> Attachments:
        attachments = Attachments(NbdServer(Exports()), self.settings, _CALL_TIMEOUT_S, self._where)
        self._attachments.append(attachments)
        return attachments

    async def open(self, attachments: Attachments, ticket: pb.OpenTicket) -> Attempt:
        await asyncio.wait_for(attachments.open(ticket), LIMIT_S)
        attempt = attachments.find(VOLUME)
        assert attempt is not None
        return attempt

    async def close(self) -> None:
        for attachments in self._attachments:
            await attachments.close_all()
        self._attachments.clear()

    async def _where(self, volume: VolumeId, epoch: int) -> pb.OpenTicket:
        return self.stack.where()


async def until_hydrated(attempt: Attempt) -> None:
    await until(lambda: attempt.report().hydrated, "the volume is hydrated")


def filled_blocks(attempt: Attempt) -> int:
    """In this attachment, committed."""
    assert attempt.segments[0].hydrating is not None
    return attempt.segments[0].hydrating.fills.filled_blocks


def go_on(attempt: Attempt, **hydration: Any) -> None:
    """As a heartbeat's answer says it: hydrate at this rate, paused or not."""
    current = pb.CurrentAttachment(size_bytes=attempt.volume.size_bytes, hydration=pb.Hydration(**hydration))
    attempt.heed(current)


@asynccontextmanager
async def restored_volume(
    directory: Path,
    blocks: dict[int, bytes],
    *,
    source_bytes: int,
    size_bytes: int,
    leader: LeaderSettings = FAST,
    **node_settings: float,
) -> AsyncIterator[Restored]:
    """Three nodes whose replicas were made from a snapshot with these blocks, and a server of it."""
    source = SnapshotSource(blocks, source_bytes)  # type: ignore[abstract]  # two calls are all that a volume makes
    await source.start()
    try:
        async with running_stack(directory, leader, SNAPSHOT.encode(), None, **node_settings) as stack:
            restored = Restored(stack, source, size_bytes)
            try:
                yield restored
            finally:
                await restored.close()
    finally:
        await source.stop()


def patient(retry_limit_s: float) -> LeaderSettings:
    """Settings of a test in which something has to give up, or must not."""
    return dataclasses.replace(FAST, retry_limit_s=retry_limit_s)
