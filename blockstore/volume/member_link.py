"""The way to one member: it dials, seals, and keeps a stream for records and one for reads.

A link only carries. What is sent and what an answer means is the leader's business; a link tells it
when the way is open and when it is lost, and then tries again by itself, at the address that control
knows by then. One session is one connection: what was under way in one that broke is lost.
"""

import asyncio
from typing import Final

import grpc
import structlog

from blockstore.domain import ReplicaAddress, ReplicaId
from blockstore.errors import CairnError, QuorumUnavailable
from blockstore.grpc_endpoint import open_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.replication.messages import Append, ReadFrom, SealEpoch
from blockstore.volume.block_status import StatusQuery
from blockstore.volume.directory import MemberDirectory
from blockstore.volume.member_session import LinkEvents, MemberSession

_log = structlog.get_logger(__name__)
_FIRST_PAUSE_S: Final = 0.1
#: A node that was started again confirms nothing before it is dialled: that is looked for often.
_LONGEST_PAUSE_S: Final = 0.3
#: To connect: a node that has moved is looked up again after this.
_REACH_S: Final = 1.0


class MemberLink:
    """Carries messages between a leader and one member.

    call_timeout_s: of a unary call, and of an answer on a stream.
    """

    def __init__(
        self, address: ReplicaAddress, events: LinkEvents, directory: MemberDirectory, call_timeout_s: float
    ) -> None:
        self.address = address
        self.why = "not connected yet"
        """Why there is no connection; empty where there is one."""
        self._events = events
        self._directory = directory
        self._call_timeout_s = call_timeout_s
        self._session: MemberSession | None = None

    @property
    def replica(self) -> ReplicaId:
        return self.address.replica

    # ---- what the leader sends

    def send(self, message: SealEpoch | Append) -> None:
        """In order with what was sent before; lost where there is no connection."""
        if self._session is not None:
            self._session.send(message)

    def read(self, effect: ReadFrom) -> None:
        """Ask for blocks; answered by one of the events of reads, unless the connection breaks."""
        if self._session is not None:
            self._session.read(effect)

    def ask(self, effect: ReadFrom, query: StatusQuery) -> None:
        """Ask what those blocks are; answered as `read` is."""
        if self._session is not None:
            self._session.ask(effect, query)

    def reconnect(self) -> None:
        """Close the connection and open another one."""
        if self._session is not None:
            self._session.break_off("it has to be sealed again")

    def check(self) -> None:
        """Break a connection whose other side has not answered for call_timeout_s."""
        if self._session is not None:
            self._session.check()

    # ---- connection

    async def run(self) -> None:
        """Connect, again and again, until cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self._connect()
            except CairnError as error:
                was_open = not self.why
                self._note(str(error))
                pause_s = _FIRST_PAUSE_S if was_open else min(2 * pause_s, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)
            await self._directory.refresh()

    async def _connect(self) -> None:
        """One session, until it breaks: it ends by raising."""
        peer = self._directory.peer(self.replica)
        if not peer.address:
            raise QuorumUnavailable("control does not know where its node is")
        channel = open_channel(peer.address)
        try:
            await self._reach(channel, peer.address)
            session = self._session = MemberSession(self.address, channel, self._events, self._call_timeout_s)
            self._events.connected(self.replica)
            try:
                with cairn_errors(f"node at {peer.address}"):
                    streams = await session.seal(self._directory, peer.address)
                    _log.info("member connected", replica=self.replica, address=peer.address)
                    self.why = ""
                    await session.run(streams)
            finally:
                self._session = None
                self._events.disconnected(self.replica)
        finally:
            await channel.close(None)

    async def _reach(self, channel: grpc.aio.Channel, address: str) -> None:
        try:
            async with asyncio.timeout(min(self._call_timeout_s, _REACH_S)):
                reached = await _until_decided(channel)
        except TimeoutError:
            reached = False
        if not reached:
            raise QuorumUnavailable(f"node at {address} cannot be reached")

    def _note(self, why: str) -> None:
        if why != self.why:
            _log.warning("member is away", replica=self.replica, why=why)
        self.why = why


async def _until_decided(channel: grpc.aio.Channel) -> bool:
    """Whether it is connected. False at the first refusal: gRPC would try again after longer and longer pauses."""
    refused = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        if state in refused:
            return False
        await channel.wait_for_state_change(state)
    return True
