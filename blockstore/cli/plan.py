"""Which processes a cluster has and where each listens: what was remembered, what was asked for, what is free."""

import errno
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from blockstore.cli.state_directory import Plan, PlannedNode
from blockstore.config import DEFAULT_CONTROL_PORT, DEFAULT_NBD_PORT, join_address, split_address
from blockstore.errors import Conflict, InvalidRequest

DEFAULT_NODES: Final = 3
"""As many as a volume has replicas."""
MAX_NODES: Final = 100
"""Of one machine; a mistyped number starts no thousand processes."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What `cairn up` was told. None or empty: as remembered, else the default. A port of 0: a free one."""

    nodes: int | None = None
    zones: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    control_port: int | None = None
    nbd_port: int | None = None
    store: str | None = None
    s3_endpoint: str | None = None


class Ports:
    """Free ports of one host; each is handed out once."""

    def __init__(self, host: str) -> None:
        self.host = host
        self._held: list[socket.socket] = []

    def take(self, wished: int | None, usual: int) -> str:
        """HOST:PORT with the port that was wished; without a wish the usual one, or a free one where it is taken.

        Raises Conflict where a wished port is taken.
        """
        port = self._hold(usual if wished is None else wished)
        if port is None and wished is not None:
            raise Conflict(f"{join_address(self.host, wished)} is in use: choose another port, or 0 for a free one")
        return join_address(self.host, port if port is not None else self._hold(0) or 0)

    def close(self) -> None:
        """Now the processes may listen there."""
        for each in self._held:
            each.close()

    def _hold(self, port: int) -> int | None:
        """The port, 0 meaning a free one; None where it is taken. Raises InvalidRequest for a host that is not here."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        held = socket.socket(family, socket.SOCK_STREAM)
        self._held.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((self.host, port))
            held.listen()
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                return None
            raise InvalidRequest(f"cannot listen at {join_address(self.host, port)}: {error}") from error
        return int(held.getsockname()[1])


@contextmanager
def free_ports(host: str) -> Iterator[Ports]:
    ports = Ports(host)
    try:
        yield ports
    finally:
        ports.close()


def make_plan(remembered: Plan | None, wishes: Wishes) -> Plan:
    """The cluster to run: the nodes remembered and those that are new, at their old ports where these are free.

    Raises InvalidRequest where the wishes contradict what is remembered, Conflict where a port is taken.
    """
    zones = _zones(remembered.nodes if remembered else (), wishes)
    with free_ports(wishes.host) as ports:
        plan = Plan(
            ports.take(wishes.control_port, _port(remembered.control if remembered else None, DEFAULT_CONTROL_PORT)),
            ports.take(wishes.nbd_port, _port(remembered.nbd if remembered else None, DEFAULT_NBD_PORT)),
            ports.take(None, _port(remembered.front_end if remembered else None, 0)),
            tuple(
                PlannedNode(f"node-{index + 1}", zone, ports.take(None, _node_port(remembered, index)))
                for index, zone in enumerate(zones)
            ),
            ports.take(None, _port(remembered.snapshotd if remembered else None, 0)),
            _store(wishes.store) if wishes.store is not None else remembered.store if remembered else "",
            wishes.s3_endpoint if wishes.s3_endpoint is not None else remembered.s3_endpoint if remembered else "",
        )
        known = remembered.metrics if remembered else {}
        return replace(plan, metrics={name: ports.take(None, _port(known.get(name), 0)) for name in plan.processes})


def free_address(address: str) -> str:
    """`address`, or one with a free port where its port was taken meanwhile."""
    host, port = split_address(address)
    with free_ports(host) as ports:
        return ports.take(None, port)


def _store(url: str) -> str:
    """As it is found from any directory."""
    return url if not url or "://" in url else str(Path(url).absolute())


def _port(address: str | None, default: int) -> int:
    return split_address(address)[1] if address else default


def _node_port(remembered: Plan | None, index: int) -> int:
    known = remembered.nodes if remembered else ()
    return _port(known[index].listen, 0) if index < len(known) else 0


def _zones(known: Sequence[PlannedNode], wishes: Wishes) -> list[str]:
    """The zone of each node: remembered ones first, new ones as wished, else each one of its own."""
    count = wishes.nodes
    if count is None:
        count = len(wishes.zones) or len(known) or DEFAULT_NODES
    if not 1 <= count <= MAX_NODES:
        raise InvalidRequest(f"--nodes {count} is outside 1 to {MAX_NODES}")
    if count < len(known):
        raise InvalidRequest(
            f"--nodes {count}, but {len(known)} nodes have data here: start at least those; "
            "`cairn volume show` tells which hold replicas"
        )
    if wishes.zones and len(wishes.zones) != count:
        raise InvalidRequest(f"--zones names {len(wishes.zones)} zones for {count} nodes: name one for each")
    zones = list(wishes.zones) or [*(node.zone for node in known), *(f"zone-{i + 1}" for i in range(len(known), count))]
    for node, zone in zip(known, zones, strict=False):
        if node.zone != zone:
            raise InvalidRequest(f"--zones puts {node.name} into {zone}, but it has replicas placed as in {node.zone}")
    return zones
