"""Snapshots as exports: `snap-...` is read, `snap-...+rw` is a clone of its own for each connection.

A snapshot is opened when the first client asks for its name, and closed when the last one is gone; all clients of it
share one device, one set of windows and one place in what this front-end says that it reads, which keeps the
snapshot while it is open (blockstore/control/snapshot_reading.py). Nothing is attached and no epoch is taken: any
front-end shows any snapshot, beside all others.

A clone belongs to one connection, and what is written to it is gone when that ends: two clients that ask for the same
name do not see each other's writes, and a client is told that it cannot have several connections to one.

Invariant: a snapshot's name is in `reading` from before control is asked for it until its last client is gone.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import structlog

from blockstore.domain import SnapshotId
from blockstore.errors import Conflict, QuorumUnavailable
from blockstore.rpc import control_pb2
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, format_size
from blockstore.volume.control_messages import to_source
from blockstore.volume.sealed_segment import NodeChannels, SealedSegment
from blockstore.volume.snapshot_content import Content, SealedContent, SnapshotContent, StoredContent
from blockstore.volume.snapshot_volume import SnapshotVolume
from nbd_server.clone_overlay import CloneOverlay, CloneSpace
from nbd_server.clone_volume import CloneVolume
from nbd_server.command_counts import CommandCounts
from nbd_server.device import Device
from nbd_server.exports import Export
from nbd_server.uri import CLONE
from nbd_server.volume import Volume

_log = structlog.get_logger(__name__)

_NAME: Final = re.compile(r"(snap-[0-9a-f]{17})(\+rw)?")

AskControl = Callable[[SnapshotId, bool], Awaitable[pb.OpenSnapshotResponse]]
"""OpenSnapshot of a snapshot; whether it is open here already."""


class _Opened:
    """One snapshot that clients have. Where its content is, as control said it last."""

    def __init__(self, snapshot: SnapshotId, exports: "SnapshotExports") -> None:
        self.snapshot = snapshot
        self.clients = 0
        self.source = ""
        """The snapshot that it needs beside itself, if any."""
        self.opening: asyncio.Task[None] = asyncio.get_running_loop().create_task(exports.begin(self))
        self.volume: SnapshotVolume | None = None
        self.export: Export | None = None
        self.content: Content | None = None


class SnapshotExports:
    """Of one front-end. limit: snapshots at once. patience_s: of a read. space: what clones may take in `directory`."""

    def __init__(
        self,
        ask: AskControl,
        *,
        limit: int,
        patience_s: float,
        call_timeout_s: float,
        directory: Path,
        space: CloneSpace,
    ) -> None:
        self._ask = ask
        self._limit = limit
        self._patience_s = patience_s
        self._call_timeout_s = call_timeout_s
        self._directory = directory
        self._space = space
        self.counts = CommandCounts()
        """What clients asked of all snapshots and clones."""
        self._channels = NodeChannels()
        self._opened: dict[SnapshotId, _Opened] = {}
        self._overlays: dict[Export, CloneOverlay] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def reading(self) -> set[SnapshotId]:
        """What has to be kept for the clients here."""
        sources = {SnapshotId(each.source) for each in self._opened.values() if each.source}
        return sources | set(self._opened)

    # ---- what the server asks (nbd_server.exports.OnDemand)

    def knows(self, name: str) -> bool:
        """Whether it is the id of a snapshot, with +rw or without."""
        return _NAME.fullmatch(name) is not None

    async def open(self, name: str) -> Export:
        """For one client. Raises NotFound, Conflict where it has no content or too many are open, QuorumUnavailable."""
        found = _NAME.fullmatch(name)
        assert found is not None
        opened = self._enter(SnapshotId(found[1]))
        try:
            await asyncio.shield(opened.opening)
            assert opened.export is not None
            return self._clone(opened) if found[2] else opened.export
        except BaseException:
            self._leave(opened)
            raise

    def close(self, export: Export) -> None:
        """That client is gone, and nothing of it is in flight."""
        overlay = self._overlays.pop(export, None)
        if overlay is not None:
            overlay.close()
        self._leave(self._opened[SnapshotId(export.name.removesuffix(CLONE))])

    async def end(self) -> None:
        """The process ends; so have all clients."""
        await asyncio.gather(*self._closing)
        await self._channels.close()

    # ---- opening and closing

    def _enter(self, snapshot: SnapshotId) -> _Opened:
        """One more client of it."""
        opened = self._opened.get(snapshot)
        if opened is None:
            if len(self._opened) >= self._limit:
                raise Conflict(
                    f"{len(self._opened)} snapshots are open at this front-end, which is as many as it shows at once: "
                    "end a client, ask another front-end, or raise --open-snapshots"
                )
            opened = _Opened(snapshot, self)
            self._opened[snapshot] = opened
        opened.clients += 1
        return opened

    def _leave(self, opened: _Opened) -> None:
        opened.clients -= 1
        if opened.clients:
            return
        del self._opened[opened.snapshot]
        opened.opening.cancel()
        task = asyncio.get_running_loop().create_task(self._close(opened))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, opened: _Opened) -> None:
        await asyncio.gather(opened.opening, return_exceptions=True)
        if opened.volume is not None:
            await opened.volume.close()
            _log.info("a snapshot is closed", snapshot=opened.snapshot)

    async def begin(self, opened: _Opened) -> None:
        """Find it, and make its export."""
        found = await self._ask(opened.snapshot, False)
        opened.content = self._content(opened, found)
        content = SnapshotContent(
            f"snapshot {opened.snapshot}", found.snapshot.size_bytes, opened.content, lambda: self._find(opened)
        )
        opened.volume = SnapshotVolume(content, self._patience_s)
        device = self._device(opened.volume)
        opened.export = Export(opened.snapshot, device, _description(found.snapshot), read_only=True)
        where = "nodes" if found.segments else "object store"
        _log.info("a snapshot is open", snapshot=opened.snapshot, where=where)

    def _clone(self, opened: _Opened) -> Export:
        assert opened.volume is not None
        assert opened.export is not None
        overlay = CloneOverlay(self._directory, opened.volume.size_bytes // BLOCK_SIZE, self._space)
        description = f"writable clone, gone with its connection: {opened.export.description}"
        device = self._device(CloneVolume(opened.volume, overlay))
        export = Export(opened.snapshot + CLONE, device, description, aliases=(opened.snapshot,), shared=False)
        self._overlays[export] = overlay
        return export

    def _device(self, volume: Volume) -> Device:
        device = Device(volume)
        device.counts = self.counts
        return device

    # ---- where the content is

    async def _find(self, opened: _Opened) -> Content | None:
        """Another content where it is in the object store by now; else the present one, at the addresses of now."""
        found = await self._ask(opened.snapshot, True)
        content = opened.content
        if isinstance(content, SealedContent) and found.segments:
            for segment, where in zip(content.segments, found.segments, strict=False):
                segment.move(where)
            if content.source is not None and found.HasField("source"):
                content.source.client.set_addresses(found.source.addresses)
            return None
        if isinstance(content, StoredContent):
            content.client.set_addresses(found.source.addresses)
            return None
        opened.content = self._content(opened, found)
        _log.info("a snapshot is read from the object store from now on", snapshot=opened.snapshot)
        return opened.content

    def _content(self, opened: _Opened, found: pb.OpenSnapshotResponse) -> Content:
        stored = self._stored(found.source) if found.HasField("source") else None
        opened.source = found.source.snapshot if found.segments else ""
        if not found.segments:
            if stored is None:
                raise QuorumUnavailable(f"control does not say where {opened.snapshot} is: update it")
            return stored
        return SealedContent(self._segments(found), stored)

    def _stored(self, source: control_pb2.Source) -> StoredContent:
        return StoredContent(to_source(source), self._call_timeout_s)

    def _segments(self, found: pb.OpenSnapshotResponse) -> list[SealedSegment]:
        """Those that it has: its volume may have got more of them since, and longer ones."""
        segments, left = [], found.snapshot.size_bytes // BLOCK_SIZE
        for segment, generation in zip(found.segments, found.generations, strict=False):
            blocks = min(segment.size_bytes // BLOCK_SIZE, left)
            left -= blocks
            where = found.snapshot.volume, segment, blocks, self._channels, self._call_timeout_s
            segments.append(SealedSegment(*where, generation=generation, seal=found.seal_name))
        return segments


def _description(snapshot: pb.Snapshot) -> str:
    of = snapshot.volume_name or snapshot.volume or "an imported image"
    text = f"Cairn snapshot of {of}, {format_size(snapshot.size_bytes)}"
    return f"{text}: {snapshot.description[:200]}" if snapshot.description else text
