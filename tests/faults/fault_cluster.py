"""A cluster whose every daemon is on a machine of its own: its network, its disk and its clock can be made to fail."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from blockstore.config import FrontEndSettings
from blockstore.units import MIB
from tests.cluster import CONTROL, FRONT_END, NODE, Cluster
from tests.crash.small_disk import SmallDisk
from tests.daemons import Daemon, wait_for
from tests.etcd_server import EtcdServer, Site
from tests.faults.namespaces import Network
from tests.faults.shim import Steering

#: The node whose disk can be filled up.
SMALL: Final = 0
ETCD_MEMBERS: Final = 3
#: Its journal, tables and ballast, for what a schedule writes.
_DISK_BYTES: Final = 768 * MIB
_NODE: Final = dataclasses.replace(NODE, reserve_bytes=32 * MIB)
#: Of the active control: etcd takes up to two seconds to elect, on a machine that is busy.
_LEADER_LEASE_S: Final = 4.0
_CLIENT_PORT, _PEER_PORT = 2379, 2380


class FaultCluster(Cluster):
    """network: who reaches whom. disk: of the node SMALL. steering: by a process's name, its clock and its
    syncs; of etcd's members only the clock.

    controls: with more than one, the catalog is in an etcd of ETCD_MEMBERS, each on a machine of its own as well.
    """

    def __init__(
        self,
        directory: Path,
        *,
        nodes: int = 3,
        front_ends: int = 2,
        snapshotds: int = 1,
        controls: int = 1,
        front_end_settings: FrontEndSettings = FRONT_END,
    ) -> None:
        names = ["control", *(f"control-{number}" for number in range(2, controls + 1))]
        names += [f"node-{index}" for index in range(nodes)]
        names += [f"front-end-{index}" for index in range(front_ends)]
        names += [f"snapshotd-{index}" for index in range(snapshotds)]
        stores = [f"etcd-m{index}" for index in range(ETCD_MEMBERS if controls > 1 else 0)]
        self.network = Network([*names, *stores])
        self.disk = SmallDisk(directory, _DISK_BYTES, 0)
        self.steering = {name: Steering(directory / f"steering-{name}") for name in [*names, *stores]}
        self.etcd = self._etcd(directory, stores) if stores else None
        self.witnessed = self.spare = ""
        """What witnesses write to, and another one, which faults attach and detach."""
        self.serving = 0
        """The front-end that the volume was attached to last."""
        self._stack = ExitStack()
        url = self.etcd.url() if self.etcd else ""
        super().__init__(
            directory,
            zones="abcdefgh"[:nodes],
            front_ends=front_ends,
            snapshotds=snapshotds,
            node_settings=_NODE,
            front_end_settings=front_end_settings,
            controls=controls,
            control_settings=dataclasses.replace(CONTROL, metastore=url, leader_lease_s=_LEADER_LEASE_S),
        )

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.network)
            stack.enter_context(self.disk)
            if self.etcd:
                stack.callback(self.etcd.kill)
                self.etcd.start()
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            super().__exit__(kind, error, trace)

    @property
    def stores(self) -> list[Daemon]:
        """The members of etcd; none where the metastore is embedded."""
        return self.etcd.members if self.etcd else []

    def active(self) -> Daemon:
        """The control that is active, once one says so."""
        if self.etcd is None:
            return self.control
        by_address = {each.read_address(): each for each in self.controls if each.running}

        def find() -> Daemon | None:
            said = (by_address.get(each.address) for each in self.status().controls if each.active)
            return next(said, None)

        return wait_for("a control to be active", find)

    def attach(self, volume: str, front_end: int = 0, *, force: bool = False) -> str:
        uri = super().attach(volume, front_end, force=force)
        if volume == self.witnessed:
            self.serving = front_end
        return uri

    def fill_disk(self) -> None:
        """Leave no room on the disk of the node SMALL, until `make_room`."""
        with self._filler.open("wb") as filler:
            try:
                while True:
                    filler.write(bytes(MIB))
            except OSError:
                return  # there is no room, which was to be

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)

    @property
    def _filler(self) -> Path:
        return self.disk.path / "filler"

    def _etcd(self, directory: Path, machines: list[str]) -> EtcdServer:
        def site(machine: str) -> Site:
            address = self.network.address(machine)
            prefix = [*self.network.prefix(machine), *self.steering[machine].clock()]
            return Site(f"{address}:{_CLIENT_PORT}", f"{address}:{_PEER_PORT}", prefix)

        return EtcdServer(directory, sites=[site(each) for each in machines])

    def _listen(self, name: str) -> str:
        return f"{self.network.address(name)}:0"

    def _command(self, noun: str, settings: Any) -> list[str | Path]:  # type: ignore[override]
        directory: Path = settings.data if noun == "node" else settings.state
        return [*self.network.prefix(directory.name), *super()._command(noun, settings)]

    def _node(self, index: int, zone: str) -> Daemon:
        self._node_directory = self.disk.path if index == SMALL else self.directory
        return super()._node(index, zone)

    def _daemon(self, noun: str, settings: Any, directory: Path, name: str = "") -> Daemon:
        daemon = super()._daemon(noun, settings, directory, name)
        daemon.environment |= self.steering[daemon.name].environment
        return daemon
