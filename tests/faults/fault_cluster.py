"""A cluster whose every daemon is on a machine of its own: its network, its disk and its clock can be made to fail."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from blockstore.units import MIB
from tests.cluster import NODE, Cluster
from tests.crash.small_disk import SmallDisk
from tests.daemons import Daemon
from tests.faults.namespaces import Network
from tests.faults.shim import Steering

NODES: Final = 3
#: The node whose disk can be filled up.
SMALL: Final = 0
#: Its journal, tables and ballast, for what a schedule writes.
_DISK_BYTES: Final = 768 * MIB
_NODE: Final = dataclasses.replace(NODE, reserve_bytes=32 * MIB)


class FaultCluster(Cluster):
    """network: who reaches whom. disk: of the node SMALL. steering: by a daemon's name, its clock and its syncs."""

    def __init__(self, directory: Path, *, front_ends: int = 2, snapshotds: int = 1) -> None:
        names = ["control", *(f"node-{index}" for index in range(NODES))]
        names += [f"front-end-{index}" for index in range(front_ends)]
        names += [f"snapshotd-{index}" for index in range(snapshotds)]
        self.network = Network(names)
        self.disk = SmallDisk(directory, _DISK_BYTES, 0)
        self.steering = {name: Steering(directory / f"steering-{name}") for name in names}
        self.serving = 0
        """The front-end that the volume was attached to last."""
        self._stack = ExitStack()
        super().__init__(directory, front_ends=front_ends, snapshotds=snapshotds, node_settings=_NODE)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.network)
            stack.enter_context(self.disk)
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            super().__exit__(kind, error, trace)

    def attach(self, volume: str, front_end: int = 0, *, force: bool = False) -> str:
        uri = super().attach(volume, front_end, force=force)
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
