"""Which control is the active one: an election in etcd, as etcd's own clients do it.

Each control puts a key under PREFIX/control/ that lives as long as its lease. The one whose key was created first
is active; the others stand by, in the order of their keys. A key that is gone never comes back under that revision,
so its create revision is the fence of all that its control changes (blockstore/control/metastore/etcd_writer.py):
that is what keeps two from writing. The clock here only makes a control that was cut off notice it soon.

Source: etcd, client/v3/concurrency/election.go.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from blockstore.boot_clock import boot_time_s
from blockstore.control.metastore.etcd_client import ATTEMPT_S, PAUSE_S, EtcdClient
from blockstore.control.metastore.etcd_mirror import Mirror
from blockstore.control.metastore.etcd_writer import Fence, NotActive, read
from blockstore.control.metastore.interface import Compacted
from blockstore.errors import NotFound, QuorumUnavailable
from blockstore.rpc import etcd_pb2 as pb
from blockstore.waiting import while_running

#: A control that stands by looks for itself this often whether the active one still has its place.
_LOOK_S: Final = 2.0
#: For giving the lease back: a control that ends does not wait long for an etcd that is away.
_REVOKE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class ControlPlace:
    """A control process, as others reach it."""

    address: str
    active: bool


class Roster:
    """All control processes of the cluster, the active one first; as far as etcd has told."""

    def __init__(self, client: EtcdClient) -> None:
        self._prefix = f"{client.address.prefix}/control/".encode()
        self._mirror = Mirror(client, self._prefix, self._prefix[:-1] + b"0")

    async def run(self) -> None:
        """Until cancelled. Ends only by an error that trying again does not mend."""
        while not self._mirror.revision:
            with suppress(QuorumUnavailable):
                await self._mirror.load()
        await self._mirror.run()

    def key_of(self, lease: int) -> bytes:
        """Where the control with that lease stands."""
        return self._prefix + f"{lease:016x}".encode()

    def places(self) -> tuple[ControlPlace, ...]:
        """Each of them, by age."""
        by_age = sorted(self._mirror.items.values(), key=lambda each: each.create_revision)
        return tuple(ControlPlace(_address(each.value), not index) for index, each in enumerate(by_age))

    def has(self, fence: Fence) -> bool:
        """Its key stands."""
        held = self._mirror.items.get(fence.key)
        return held is not None and held.create_revision == fence.create_revision

    async def until_first(self, fence: Fence) -> None:
        """Until no older key is there. Raises NotActive where its own goes."""
        await self._until_shown(fence)
        while any(each.create_revision < fence.create_revision for each in self._mirror.items.values()):
            if not await self._mirror.next_change(_LOOK_S):
                with suppress(QuorumUnavailable, Compacted):
                    await self._mirror.check()
            self._check(fence)

    async def until_gone(self, fence: Fence) -> None:
        """Until its key is not there any more."""
        while self.has(fence):
            await self._mirror.next_change()

    async def _until_shown(self, fence: Fence) -> None:
        await self._mirror.at_least(fence.create_revision)
        self._check(fence)

    def _check(self, fence: Fence) -> None:
        if not self.has(fence):
            raise NotActive("the place of this control in etcd is gone: it stands for another one")


class Candidate:
    """This control's place, while it holds; made by `candidacy`."""

    def __init__(self, roster: Roster, fence: Fence, keeping: "asyncio.Task[None]") -> None:
        self._roster = roster
        self._keeping = keeping
        self.fence = fence

    async def elected(self) -> None:
        """Until it is the active one. Raises QuorumUnavailable where its place is lost before."""
        await while_running(self._keeping, self._roster.until_first(self.fence))

    async def lost(self) -> None:
        """Until it is not the active one any more, or cannot know it: raises QuorumUnavailable with the reason."""
        await while_running(self._keeping, self._roster.until_gone(self.fence))


@asynccontextmanager
async def candidacy(client: EtcdClient, roster: Roster, address: str, lease_s: float) -> AsyncIterator[Candidate]:
    """A place among those who would be active, given back at the end.

    lease_s: rounded up to seconds; etcd gives none under two of them or so. Raises QuorumUnavailable.
    """
    asked_at, seconds = boot_time_s(), math.ceil(lease_s)
    lease = await client.grant(seconds)
    keeping = asyncio.ensure_future(_keep(client, lease, seconds, asked_at + seconds))
    try:
        yield Candidate(roster, await _take_place(client, roster.key_of(lease), lease, address), keeping)
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        with suppress(QuorumUnavailable):  # Then it ends by itself.
            await client.revoke(lease, _REVOKE_S)


async def _take_place(client: EtcdClient, key: bytes, lease: int, address: str) -> Fence:
    value = json.dumps({"address": address}).encode()
    put = pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))
    absent = pb.Compare(target=pb.Compare.CREATE, key=key, create_revision=0)
    try:
        answer = await client.look(pb.TxnRequest(compare=[absent], success=[put], failure=[read(key)]))
    except NotFound as error:
        raise NotActive(f"the lease of this control was over before it was used: {error}") from error
    if answer.succeeded:
        return Fence(key, answer.header.revision)
    return Fence(key, answer.responses[0].response_range.kvs[0].create_revision)


async def _keep(client: EtcdClient, lease: int, lease_s: float, until: float) -> None:
    """Hold the lease, which etcd gave until then. Raises NotActive once it may be over."""
    while True:
        await asyncio.sleep(lease_s / 3)
        while True:
            asked_at = boot_time_s()
            try:
                left_s = await client.keep_alive(lease, min(ATTEMPT_S, lease_s / 3))
                break
            except QuorumUnavailable as error:
                if boot_time_s() > until:
                    raise NotActive(f"the lease of this control is over: {error}") from error
            await asyncio.sleep(PAUSE_S)
        if not left_s:
            raise NotActive("the lease of this control is over: etcd did not hear of it in time")
        until = asked_at + left_s


def _address(value: bytes) -> str:
    try:
        return str(json.loads(value)["address"])
    except (ValueError, KeyError, TypeError):
        return "an address that cannot be read"
