"""Changes of the catalog in etcd: fenced, one after the other, and never told wrongly.

- **Fenced.** Every transaction carries the condition that this control's key under `control/` still stands as it
  was created. It goes with the lease; so a control that was paused, or cut off, and woke up changes nothing.
- **No outcome is guessed.** Every transaction names the head that it follows, and replaces it by its own number.
  Where the answer to one is lost, the head is voided on the condition that it is still the one before: if that
  succeeds, the transaction did not happen and never will, and is made again; if not, the head tells whose number
  came to be. Only where etcd stays silent, or another process writes as well, is it "not known", and the error says so.

The head makes one transaction wait for the one before; control makes a few a second.
"""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import structlog

from blockstore.control.metastore.etcd_client import LIMIT_S, PAUSE_S, EtcdClient, Unanswered
from blockstore.errors import NoSpace, QuorumUnavailable
from blockstore.rpc import etcd_pb2 as pb

_log = structlog.get_logger(__name__)

_NOT_KNOWN: Final = "whether the last change was made is not known: look before it is made again"


@dataclass(frozen=True, slots=True)
class Fence:
    """A key that must stand as it was created, for anything to be changed."""

    key: bytes
    create_revision: int


class NotActive(QuorumUnavailable):
    """The fence is gone: another control is, or will be, the active one."""


class _Outcome(Enum):
    """Of a transaction that did not happen, and never will."""

    REFUSED = "a condition of the caller does not hold"
    AGAIN = "it may be made again"


class Writer:
    """Makes transactions that change records, and tells what became of each."""

    def __init__(self, client: EtcdClient, head_key: bytes, fence: Fence | None) -> None:
        self._client = client
        self._head_key = head_key
        self._fence = fence
        self._name = secrets.token_hex(8)
        self._number = 0
        self._head: int | None = None
        """The revision of the head that the next transaction follows, 0 where there is none yet; None: to be read."""
        self._turn = asyncio.Lock()

    async def change(self, compares: Sequence[pb.Compare], changes: Sequence[pb.RequestOp]) -> int | None:
        """The revision, or None where one of `compares` does not hold.

        Raises NoSpace; NotActive where the fence is gone; QuorumUnavailable, which says whether it may have happened.
        """
        async with self._turn:
            loop = asyncio.get_running_loop()
            give_up_at = loop.time() + LIMIT_S
            while True:
                outcome = await self._try(compares, changes, give_up_at)
                if outcome is _Outcome.REFUSED:
                    return None
                if outcome is not _Outcome.AGAIN:
                    return outcome
                if loop.time() > give_up_at:
                    raise QuorumUnavailable(
                        f"the etcd at {self._client.address} did not answer in {LIMIT_S:g} s: nothing was changed, "
                        "and it may be tried again"
                    )

    async def _try(
        self, compares: Sequence[pb.Compare], changes: Sequence[pb.RequestOp], give_up_at: float
    ) -> int | _Outcome:
        if self._head is None:
            await self._read_head()
        self._number += 1
        number = f"{self._name} {self._number}".encode()
        guards, put, reads = self._parts(number)
        request = pb.TxnRequest(compare=[*compares, *guards], success=[*changes, put], failure=reads)
        try:
            answer = await self._client.transact(request)
        except Unanswered as error:
            _log.info("a transaction was not answered; finding out what became of it", error=str(error))
            return await self._settle(number, give_up_at)
        except NoSpace:
            # etcd says so also of the transaction that filled it, which did happen. Nothing is on its way any more.
            if (head := await self._read_head()) and head.value == number:
                return head.mod_revision
            raise
        return self._advance(answer.header.revision) if answer.succeeded else self._refused(number, answer)

    def _refused(self, number: bytes, answer: pb.TxnResponse) -> int | _Outcome:
        """Why its conditions did not hold."""
        head = _first(answer.responses[0])
        if head.value == number:  # its second arrival was refused, and the first one was not
            return self._advance(head.mod_revision)
        if self._is_fenced(answer):
            raise NotActive("this control is not the active one any more, and nothing was changed: ask again")
        if head.mod_revision == self._head:
            return _Outcome.REFUSED
        self._advance(head.mod_revision)
        return _Outcome.AGAIN

    async def _settle(self, number: bytes, give_up_at: float) -> int | _Outcome:
        """What became of a transaction whose answer was lost. Raises QuorumUnavailable where that stays unknown."""
        void = b"void " + number
        answer = await self._void(void, give_up_at)
        if answer.succeeded:
            self._advance(answer.header.revision)
            return _Outcome.AGAIN
        head, before = _first(answer.responses[0]), self._head
        self._advance(head.mod_revision)
        if head.value == number:
            return head.mod_revision
        if head.value == void:  # an earlier attempt, whose answer was lost as well
            return _Outcome.AGAIN
        # It is fenced, or somebody else writes. A fence that is gone does not come back.
        unknown = "" if head.mod_revision == before else f"; {_NOT_KNOWN}"
        raise NotActive(f"this control is not the active one any more{unknown}")

    async def _void(self, void: bytes, give_up_at: float) -> pb.TxnResponse:
        """Replace the head by `void`, where it is still the one before. Until it is answered."""
        guards, put, reads = self._parts(void)
        request = pb.TxnRequest(compare=guards, success=[put], failure=reads)
        while True:
            try:
                return await self._client.transact(request)
            except (Unanswered, NoSpace) as error:
                if asyncio.get_running_loop().time() > give_up_at:
                    self._head = None
                    raise QuorumUnavailable(f"{error}; {_NOT_KNOWN}") from error
            await asyncio.sleep(PAUSE_S)

    async def _read_head(self) -> pb.KeyValue:
        answer = await self._client.range(pb.RangeRequest(key=self._head_key))
        head = answer.kvs[0] if answer.kvs else pb.KeyValue()
        self._advance(head.mod_revision)
        return head

    def _advance(self, revision: int) -> int:
        self._head = revision
        return revision

    def _parts(self, number: bytes) -> tuple[list[pb.Compare], pb.RequestOp, list[pb.RequestOp]]:
        """What every transaction has: its guards, its head, and what it tells where it is refused."""
        assert self._head is not None
        guards, reads = [stands(self._head_key, self._head)], [read(self._head_key)]
        if self._fence:
            guards.append(
                pb.Compare(target=pb.Compare.CREATE, key=self._fence.key, create_revision=self._fence.create_revision)
            )
            reads.append(read(self._fence.key))
        return guards, pb.RequestOp(request_put=pb.PutRequest(key=self._head_key, value=number)), reads

    def _is_fenced(self, refused: pb.TxnResponse) -> bool:
        fence = self._fence
        return fence is not None and _first(refused.responses[1]).create_revision != fence.create_revision


def stands(key: bytes, revision: int) -> pb.Compare:
    """The key's last change has that revision; 0: it is absent."""
    return pb.Compare(target=pb.Compare.MOD, key=key, mod_revision=revision)


def read(key: bytes) -> pb.RequestOp:
    """In a transaction: the key as it stands."""
    return pb.RequestOp(request_range=pb.RangeRequest(key=key))


def _first(response: pb.ResponseOp) -> pb.KeyValue:
    """The key that was read; an empty one, with revision 0, where it is absent."""
    found = response.response_range.kvs
    return found[0] if found else pb.KeyValue()
