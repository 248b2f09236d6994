"""Where the members of a volume are, as its ticket said and then as control says; what they are known to have acked."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import structlog

from blockstore.boot_clock import boot_time_s
from blockstore.domain import ORIGIN, Configuration, Position, ReplicaId
from blockstore.errors import CairnError
from blockstore.replica_codec import peer_of
from blockstore.rpc import replica_pb2 as pb
from blockstore.volume.ticket import Ticket

_log = structlog.get_logger(__name__)
#: Control is not asked more often than this.
_REFRESH_S: Final = 1.0

Refresh = Callable[[], Awaitable[dict[ReplicaId, str]]]
"""Asks control where the members are now."""


class MemberDirectory:
    """Of one ticket, and of the configurations that came after it."""

    def __init__(self, ticket: Ticket, refresh: Refresh) -> None:
        self._ticket = ticket
        self._members = {member.replica: member for member in ticket.configuration.everyone}
        self._addresses = dict(ticket.addresses)
        self._refresh = refresh
        self._asked_at = boot_time_s()

    def peer(self, replica: ReplicaId) -> pb.Peer:
        """Its address is empty where control does not know it."""
        return peer_of(self._members[replica], self._addresses.get(replica, ""))

    def peers(self) -> list[pb.Peer]:
        return [self.peer(replica) for replica in self._members]

    def learn(self, configuration: Configuration, addresses: Mapping[ReplicaId, str]) -> None:
        """Who is there now. Who was stays known: messages to it may be on their way."""
        self._members.update({member.replica: member for member in configuration.everyone})
        self._addresses.update(addresses)

    def known(self, replica: ReplicaId) -> Position:
        """The highest position that control was ever told for it."""
        return self._ticket.known.get(replica, ORIGIN)

    async def refresh(self) -> None:
        """Ask control anew, unless that was done a moment ago."""
        if boot_time_s() - self._asked_at < _REFRESH_S:
            return
        self._asked_at = boot_time_s()
        try:
            self._addresses.update(await self._refresh())
        except CairnError as error:
            _log.warning("cannot ask control where members are", volume=self._ticket.volume, error=str(error))
