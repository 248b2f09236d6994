"""Bad blocks are fetched from peers: only an identical block, generation and sequence will do.

The checksum that the tables keep is the judge of what a peer sends. Where entries are lost, or rows that say what
there is are damaged, nobody can say what should be there: the replica has to be filled anew. It says so to its leader
and to control, and goes on with what passes its checks, which may be the last good copy of something, until the leader
tells it to begin (docs/replication.md, rule 6). Repairs run in the background, one task for each replica; a read that
hit damage is answered by another member meanwhile.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import structlog

from blockstore.domain import ReplicaAddress, ReplicaId
from blockstore.errors import CairnError, Corrupt
from blockstore.grpc_errors import cairn_errors
from blockstore.node.hosted_replica import HostedReplica
from blockstore.replica_codec import make_target
from blockstore.rpc import replica_pb2 as pb
from blockstore.rpc import replica_pb2_grpc
from blockstore.storage.reads import BlockVersion, CorruptBlocks

_log = structlog.get_logger(__name__)


class Repairer:
    """Counts bad blocks found and repaired, by replica, since the process started."""

    def __init__(
        self,
        open_channel: Callable[[str], grpc.aio.Channel],
        timeout_s: float,
        note_damage: Callable[[HostedReplica, str], None],
    ) -> None:
        """note_damage: keeps what is wrong with a replica that has to be filled anew, for the next start."""
        self._open_channel = open_channel
        self._timeout_s = timeout_s
        self._note = note_damage
        self.found: Counter[ReplicaId] = Counter()
        self.repaired: Counter[ReplicaId] = Counter()
        self._damage: dict[ReplicaId, str] = {}
        self._bad: dict[ReplicaId, set[BlockVersion]] = {}
        self._running: dict[ReplicaId, asyncio.Task[None]] = {}

    def start(self, hosted: HostedReplica, error: Corrupt) -> None:
        """Repair what `error` names; what is being repaired already is counted once."""
        hosted.store.note_damage(error)
        versions = error.versions if isinstance(error, CorruptBlocks) else ()
        lost = [version for version in versions if version.sequence is None]
        if (lost or hosted.store.damage) and not hosted.follower.copies_all:
            self._note_damage(hosted, str(error))
        bad = self._bad.setdefault(hosted.replica, set())
        new = set(versions) - set(lost) - bad
        bad |= new
        self.found[hosted.replica] += len(new)
        if new:
            _log.error("bad blocks found", replica=hosted.replica, error=str(error))
            self._start(hosted, self._run(hosted))

    def stop(self) -> None:
        for task in list(self._running.values()):
            task.cancel()

    def forget(self, replica: ReplicaId) -> None:
        """It was deleted."""
        self._damage.pop(replica, None)

    def damage(self, hosted: HostedReplica) -> str:
        """What is wrong with a replica that has to be filled anew, until that begins; else empty."""
        return self._damage.get(hosted.replica, "") if hosted.follower.damaged else ""

    def _note_damage(self, hosted: HostedReplica, what: str) -> None:
        """It is found again with every read."""
        self._damage[hosted.replica] = what
        if not hosted.follower.damaged:
            hosted.follower.damaged = True
            self._note(hosted, what)
            _log.error("damaged tables: the replica waits to be filled anew", replica=hosted.replica, error=what)

    def _start(self, hosted: HostedReplica, work: Coroutine[Any, Any, None]) -> None:
        """In the background, unless something runs for this replica: then what is found again starts it."""
        if hosted.replica in self._running:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._running[hosted.replica] = task
        task.add_done_callback(lambda _: self._running.pop(hosted.replica, None))

    async def _run(self, hosted: HostedReplica) -> None:
        bad = self._bad[hosted.replica]
        for peer, address in list(hosted.peers.items()):
            versions = sorted(bad)
            if not versions or hosted.closed:
                break
            if not address:
                continue
            try:
                await self._repair_from(hosted, peer, address, versions)
            except CairnError as error:
                _log.warning("a peer could not repair", replica=hosted.replica, peer=peer, error=str(error))
        if bad:
            _log.error("bad blocks remain", replica=hosted.replica, blocks=len(bad))
        self._bad.pop(hosted.replica, None)

    async def _repair_from(
        self, hosted: HostedReplica, peer: ReplicaId, address: str, versions: list[BlockVersion]
    ) -> None:
        target = make_target(
            ReplicaAddress(hosted.address.volume, hosted.address.segment, peer),
            hosted.follower.epoch,
            hosted.follower.configuration,
        )
        stub = replica_pb2_grpc.ReplicaStub(self._open_channel(address))
        for at in range(0, len(versions), 256):
            some = versions[at : at + 256]
            request = pb.FetchBlocksRequest(
                target=target,
                blocks=[_encode(version) for version in some],
            )
            with cairn_errors(f"replica {peer}"):
                response: pb.FetchBlocksResponse = await stub.FetchBlocks(request, timeout=self._timeout_s)
            for version, block in zip(some, response.blocks, strict=False):
                if block and await hosted.repair(version, block):
                    self._bad[hosted.replica].discard(version)
                    self.repaired[hosted.replica] += 1


def _encode(version: BlockVersion) -> pb.BlockVersion:
    return pb.BlockVersion(number=version.number, generation=version.generation or 0, sequence=version.sequence or 0)
