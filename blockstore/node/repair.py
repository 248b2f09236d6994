"""Bad blocks are fetched from peers: only an identical block, generation and sequence will do.

The checksum that the tables keep is the judge of what a peer sends. Where entries are lost, or rows that say what
there is are damaged, nobody can say what should be there: the replica is filled anew. That begins only while a quorum
of the other members is whole; until then it goes on with what passes its checks, which may be the last good copy of
something, and its status says what is wrong. Repairs run in the background, one task for each replica; a read that hit
damage is answered by another member meanwhile.
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

    def __init__(self, open_channel: Callable[[str], grpc.aio.Channel], timeout_s: float) -> None:
        self._open_channel = open_channel
        self._timeout_s = timeout_s
        self.found: Counter[ReplicaId] = Counter()
        self.repaired: Counter[ReplicaId] = Counter()
        self.damage: dict[ReplicaId, str] = {}
        """What is wrong with replicas that must be filled anew, until that has begun."""
        self._bad: dict[ReplicaId, set[BlockVersion]] = {}
        self._running: dict[ReplicaId, asyncio.Task[None]] = {}

    def start(self, hosted: HostedReplica, error: Corrupt) -> None:
        """Repair what `error` names; what is being repaired already is counted once."""
        hosted.store.note_damage(error)
        versions = error.versions if isinstance(error, CorruptBlocks) else ()
        lost = [version for version in versions if version.sequence is None]
        if (lost or hosted.store.damage) and not hosted.follower.copies_all:
            self.damage[hosted.replica] = str(error)
            self._start(hosted, self._fill_anew(hosted, error))
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
        self.damage.pop(replica, None)

    def _start(self, hosted: HostedReplica, work: Coroutine[Any, Any, None]) -> None:
        """In the background, unless something runs for this replica: then what is found again starts it."""
        if hosted.replica in self._running:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._running[hosted.replica] = task
        task.add_done_callback(lambda _: self._running.pop(hosted.replica, None))

    async def _fill_anew(self, hosted: HostedReplica, error: Corrupt) -> None:
        """Have everything copied, where the others are a quorum of whole members without this one.

        Else it stays as it is: what is lost is refused when it is read, and all the rest counts.
        """
        whole = [await self._is_whole(hosted, peer, address) for peer, address in sorted(hosted.peers.items())]
        if 2 * sum(whole) <= len(whole):
            _log.error(
                "the tables are damaged, and too few other members are whole to fill the replica anew",
                replica=hosted.replica,
                error=str(error),
            )
            hosted.peers_moved = True  # perhaps one of them is a member no more, or is somewhere else
            await asyncio.sleep(self._timeout_s)  # it is found again with every read
        elif not hosted.closed and (effects := hosted.follower.content_lost()):
            _log.error("the tables are damaged: the replica is filled anew", replica=hosted.replica, error=str(error))
            self.damage.pop(hosted.replica, None)
            hosted.carry_out(effects)

    async def _is_whole(self, hosted: HostedReplica, peer: ReplicaId, address: str) -> bool:
        """Whether another member says so, in this epoch."""
        if peer == hosted.replica or not address:
            return False
        stub = replica_pb2_grpc.ReplicaStub(self._open_channel(address))
        try:
            with cairn_errors(f"replica {peer}"):
                response: pb.ListReplicasResponse = await stub.ListReplicas(
                    pb.ListReplicasRequest(), timeout=self._timeout_s
                )
        except CairnError as error:
            _log.warning("a peer does not say how it is", replica=hosted.replica, peer=peer, error=str(error))
            return False
        epoch = hosted.follower.epoch
        return any(
            each.whole and (each.target.replica, each.target.epoch) == (peer, epoch) for each in response.replicas
        )

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
