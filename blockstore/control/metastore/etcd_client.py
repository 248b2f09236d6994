"""Calls to an etcd of one or more members, each with a deadline, and its errors as ours.

aetcd, the one asyncio library that is kept, talks to a single member over a channel of its own making and does
not tell a transaction that was refused from one whose outcome is unknown; so the few calls that the metastore
needs are made here, by the subset of etcd's protocol in proto/etcd.

Whoever does not answer is left for the next member. A call that may be made twice is repeated until an answer
or `LIMIT_S`; one that may not raises Unanswered. Answers must come from one etcd whose revision never falls:
another cluster at the same address, or an old backup put back, is Corrupt, for ever.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, NoReturn, cast

import grpc

from blockstore.control.metastore.etcd_address import EtcdAddress
from blockstore.control.metastore.interface import Compacted
from blockstore.errors import CairnError, Corrupt, InvalidRequest, NoSpace, NotFound, QuorumUnavailable
from blockstore.rpc import etcd_pb2 as pb
from blockstore.rpc import etcd_pb2_grpc
from blockstore.units import MIB

#: Of one call to one member: one that has lost its quorum answers after 7 s only.
ATTEMPT_S: Final = 2.0
#: Of a call with all its repetitions: an election of etcd's takes one or two seconds.
LIMIT_S: Final = 10.0
#: Between two attempts.
PAUSE_S: Final = 0.1
#: Keys of one page of a range: at most 26 MiB with values of 256 KiB.
PAGE: Final = 100

_OPTIONS: Final = [
    ("grpc.max_receive_message_length", 64 * MIB),
    ("grpc.max_send_message_length", 4 * MIB),
    # etcd ends connections that ping more often than each 5 s, or without a call.
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
#: What says nothing of whether the call was carried out.
_AWAY: Final = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.ABORTED,
}
#: How etcd refuses a token that is too old, or made before users were changed.
_TOKEN_REFUSED: Final = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT}


class Unanswered(Exception):
    """Nobody knows whether the call was, or will be, carried out. Stays inside the metastore."""


class _Member:
    """One member's channel and stubs."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None) -> None:
        options: list[tuple[str, Any]] = list(_OPTIONS)
        self.address = address
        self.channel = (
            grpc.aio.secure_channel(address, credentials, options=options)
            if credentials
            else grpc.aio.insecure_channel(address, options=options)
        )
        self.kv: Any = etcd_pb2_grpc.KVStub(self.channel)
        self.watch: Any = etcd_pb2_grpc.WatchStub(self.channel)
        self.lease: Any = etcd_pb2_grpc.LeaseStub(self.channel)
        self.auth: Any = etcd_pb2_grpc.AuthStub(self.channel)


class EtcdClient:
    """An etcd. Every call raises errors of the tree; QuorumUnavailable where no member answers in time."""

    def __init__(self, address: EtcdAddress) -> None:
        self.address = address
        credentials = (
            grpc.ssl_channel_credentials(address.authorities, address.key, address.certificate) if address.tls else None
        )
        self._members = [_Member(each, credentials) for each in address.members]
        self._turn = itertools.cycle(self._members)
        self._member = next(self._turn)
        self._token = ""
        self._cluster = 0
        self._revision = 0
        self._broken: Corrupt | None = None

    async def range(self, request: pb.RangeRequest) -> pb.RangeResponse:
        """A linearizable read."""
        seen = self._revision
        answer: pb.RangeResponse = await self._repeated(lambda member: member.kv.Range, request)
        self._check_header(answer.header, seen)
        return answer

    async def read_all(self, start: bytes, end: bytes) -> tuple[int, list[pb.KeyValue]]:
        """All keys from start to end, exclusive, as of one revision, and that revision. Raises Compacted."""
        found: list[pb.KeyValue] = []
        revision = 0
        while True:
            request = pb.RangeRequest(key=start, range_end=end, limit=PAGE, revision=revision)
            page = await self.range(request)
            revision = revision or page.header.revision
            found += page.kvs
            if not page.more:
                return revision, found
            start = page.kvs[-1].key + b"\0"

    async def look(self, transaction: pb.TxnRequest) -> pb.TxnResponse:
        """A transaction that changes nothing, or may be made twice."""
        seen = self._revision
        answer: pb.TxnResponse = await self._repeated(lambda member: member.kv.Txn, transaction)
        self._check_header(answer.header, seen)
        return answer

    async def transact(self, transaction: pb.TxnRequest) -> pb.TxnResponse:
        """One attempt. Raises Unanswered; NoSpace also where the transaction filled etcd, and did happen."""
        seen = self._revision
        try:
            answer: pb.TxnResponse = await self._attempt(lambda member: member.kv.Txn, transaction, ATTEMPT_S)
        except QuorumUnavailable as error:
            raise Unanswered(str(error)) from error
        self._check_header(answer.header, seen)
        return answer

    async def watch(self, start: bytes, end: bytes, revision: int) -> AsyncIterator[pb.WatchResponse]:
        """Responses with changes from `revision` on. Raises Compacted, QuorumUnavailable where the stream breaks."""
        member = self._member
        call = None
        try:
            await self._log_in(member, ATTEMPT_S)
            # A member that has lost its quorum ends the stream, rather than falling silent.
            call = member.watch.Watch(metadata=(*self._metadata(), ("hasleader", "true")))
            create = pb.WatchCreateRequest(key=start, range_end=end, start_revision=revision)
            await call.write(pb.WatchRequest(create_request=create))
            async for response in call:
                if response.compact_revision:
                    raise Compacted(f"etcd holds no changes below revision {response.compact_revision} any more")
                if response.canceled:
                    # A token that is too old, or a change of rights: the next call finds out which.
                    self._token = ""
                    raise QuorumUnavailable(f"etcd at {member.address} ended a watch: {response.cancel_reason}")
                self._check_cluster(response.header)
                if response.events:
                    yield response
            raise QuorumUnavailable(f"etcd at {member.address} ended a watch")
        except grpc.RpcError as error:
            self._leave(member)
            raise _error_of(error, self.address) from error
        finally:
            if call is not None:
                call.cancel()

    async def grant(self, lease_s: int) -> int:
        """A new lease; etcd may give it longer than that. One whose answer was lost expires by itself."""
        answer: pb.LeaseGrantResponse = await self._repeated(
            lambda member: member.lease.LeaseGrant, pb.LeaseGrantRequest(TTL=lease_s)
        )
        return answer.ID

    async def keep_alive(self, lease: int, timeout_s: float) -> int:
        """One attempt: the seconds that the lease has from now on, 0 where it has expired."""

        def method(member: _Member) -> Callable[..., Awaitable[pb.LeaseKeepAliveResponse]]:
            async def once(request: pb.LeaseKeepAliveRequest, **options: Any) -> pb.LeaseKeepAliveResponse:
                # One request and no more; an iterator, as a write that fails hides how the call ended.
                call = member.lease.LeaseKeepAlive(iter((request,)), **options)
                try:
                    async for answer in call:
                        return cast(pb.LeaseKeepAliveResponse, answer)
                finally:
                    call.cancel()
                raise QuorumUnavailable(f"etcd at {member.address} did not answer for a lease")

            return once

        answer: pb.LeaseKeepAliveResponse = await self._attempt(method, pb.LeaseKeepAliveRequest(ID=lease), timeout_s)
        return answer.TTL

    async def revoke(self, lease: int, timeout_s: float) -> None:
        """One attempt: end the lease and its keys at once. It may be gone already."""
        with suppress(NotFound):
            await self._attempt(lambda member: member.lease.LeaseRevoke, pb.LeaseRevokeRequest(ID=lease), timeout_s)

    async def close(self) -> None:
        for member in self._members:
            await member.channel.close(None)

    # ---- one call

    async def _repeated(self, method: Callable[[_Member], Any], request: Any) -> Any:
        """Raises QuorumUnavailable after LIMIT_S seconds without an answer."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + LIMIT_S
        while True:
            try:
                return await self._attempt(method, request, ATTEMPT_S)
            except QuorumUnavailable:
                if loop.time() > give_up_at:
                    raise
            await asyncio.sleep(PAUSE_S)

    async def _attempt(self, method: Callable[[_Member], Any], request: Any, timeout_s: float) -> Any:
        """At the present member, once; a second time only where it refused the token. Raises QuorumUnavailable."""
        member = self._member
        try:
            fresh = await self._log_in(member, timeout_s)
            try:
                return await method(member)(request, timeout=timeout_s, metadata=self._metadata())
            except grpc.RpcError as error:
                if fresh or not self._token or error.code() not in _TOKEN_REFUSED:
                    raise
            self._token = ""
            await self._log_in(member, timeout_s)
            return await method(member)(request, timeout=timeout_s, metadata=self._metadata())
        except grpc.RpcError as error:
            if error.code() in _AWAY:
                self._leave(member)
            raise _error_of(error, self.address) from error

    async def _log_in(self, member: _Member, timeout_s: float) -> bool:
        """Whether a new token was asked for; there is nothing to do without a user."""
        if not self.address.user or self._token:
            return False
        request = pb.AuthenticateRequest(name=self.address.user, password=self.address.password)
        try:
            self._token = (await member.auth.Authenticate(request, timeout=timeout_s)).token
        except grpc.RpcError as error:
            if error.code() in _AWAY:
                raise
            raise InvalidRequest(
                f"etcd at {member.address} refuses the user {self.address.user!r}: {error.details()}; "
                "check --metastore-user and its password"
            ) from error
        return True

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("token", self._token),) if self._token else ()

    def _leave(self, member: _Member) -> None:
        """It did not answer: the next one is asked from now on."""
        if member is self._member:
            self._member = next(self._turn)

    # ---- one etcd

    def _check_header(self, header: pb.ResponseHeader, seen: int) -> None:
        """seen: the highest revision of all answers that were here before the call was made."""
        self._check_cluster(header)
        if header.revision < seen:
            self._break(
                f"the etcd at {self.address} is at revision {header.revision}, and was at {seen} before: an old copy "
                "of its data was put back. Control does not go on with that: see docs/control.md"
            )
        self._revision = max(self._revision, header.revision)

    def _check_cluster(self, header: pb.ResponseHeader) -> None:
        if self._broken is not None:
            raise self._broken
        if self._cluster and header.cluster_id != self._cluster:
            self._break(
                f"the members at {self.address} are of two etcd clusters, {self._cluster:x} and "
                f"{header.cluster_id:x}: name the members of one in --metastore"
            )
        self._cluster = header.cluster_id

    def _break(self, message: str) -> NoReturn:
        self._broken = Corrupt(message)
        raise self._broken


def _error_of(error: grpc.RpcError, address: EtcdAddress) -> CairnError:
    """What etcd, or the way there, said. Source: etcd, api/v3rpc/rpctypes/error.go."""
    code, details = error.code(), error.details()
    if code in _AWAY:
        return QuorumUnavailable(
            f"the etcd at {address} does not answer ({details}): start it, or see `etcdctl endpoint status`; "
            "attached volumes go on without it"
        )
    match code:
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return NoSpace(
                f"the etcd at {address} takes no more ({details}): let it compact (--auto-compaction-retention), "
                "defragment it, and then `etcdctl alarm disarm`"
            )
        case grpc.StatusCode.NOT_FOUND:
            return NotFound(f"etcd: {details}")
        case grpc.StatusCode.OUT_OF_RANGE:
            return Compacted(f"etcd: {details}")
        case _:
            return InvalidRequest(
                f"the etcd at {address} refuses a call ({details}): check --metastore-user, its password and "
                f"its rights to keys that begin with {address.prefix}/"
            )
