"""What the tests of control's snapshots share: a cluster with a daemon, and waiting for what a snapshot becomes."""

from pathlib import Path
from typing import Any

from blockstore.rpc import snapshot_pb2
from blockstore.units import GIB
from tests import control_scenario
from tests.control_cluster import Cluster, Control, until
from tests.control_scenario import Scenario
from tests.control_store import MemoryDaemon

PENDING = snapshot_pb2.SNAPSHOT_STATE_PENDING
COMPLETED = snapshot_pb2.SNAPSHOT_STATE_COMPLETED
ERROR = snapshot_pb2.SNAPSHOT_STATE_ERROR
DELETING = snapshot_pb2.SNAPSHOT_STATE_DELETING


def run(directory: Path, scenario: Scenario, *, daemons: int = 1, **options: Any) -> None:
    """As control_scenario.run, with a daemon that ships at once what it is given."""
    control_scenario.run(directory, scenario, daemons=daemons, **options)


async def in_state(control: Control, snapshot: str, state: int) -> snapshot_pb2.Snapshot:
    """The snapshot as soon as it is in that state."""

    async def is_so() -> snapshot_pb2.Snapshot | None:
        found = await control.get_snapshot(snapshot)
        return found if found.state == state else None

    found: snapshot_pb2.Snapshot = await until(is_so, f"{snapshot} is in state {state}")
    return found


async def completed(control: Control, name: str = "v") -> str:
    """The id of a completed snapshot of a new volume of 1 GiB."""
    await control.create(GIB, name=name)
    (snapshot,) = await control.snapshot(name)
    return (await in_state(control, snapshot.id, COMPLETED)).id


async def gone(control: Control, snapshot: str) -> None:
    async def is_gone() -> bool:
        return snapshot not in {each.id for each in await control.snapshots()}

    await until(is_gone, f"{snapshot} is gone")


async def task_of(daemon: MemoryDaemon, snapshot: str) -> snapshot_pb2.ShipTask:
    async def is_given() -> snapshot_pb2.ShipTask | None:
        return daemon.tasks.get(snapshot)

    task: snapshot_pb2.ShipTask = await until(is_given, f"{snapshot} is given to {daemon.id}")
    return task


async def pins_of(cluster: Cluster, volume: str, expected: set[tuple[int, str]]) -> None:
    """Waits until the volume's replicas keep exactly these."""

    async def are_so() -> bool:
        return cluster.layers[volume].pins == expected

    await until(are_so, f"the pins are {expected}, not {cluster.layers[volume].pins}")
