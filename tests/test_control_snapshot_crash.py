"""Control stopped at every step it makes for a snapshot: the next one carries on, and nothing is left wrong.

Nothing left wrong: no snapshot is between two states, the volumes' replicas keep just the newest
completed one, the object store has just the roots of the catalog, and no volume is held open.
"""

from contextlib import suppress
from pathlib import Path

import pytest

from blockstore.errors import NotFound
from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.units import GIB
from tests.control_cluster import Cluster, Control, cluster_at, until
from tests.control_stopping import Work, at_every_point, stop_at

COMPLETED = snapshot_pb2.SNAPSHOT_STATE_COMPLETED
ERROR = snapshot_pb2.SNAPSHOT_STATE_ERROR
DELETING = snapshot_pb2.SNAPSHOT_STATE_DELETING
#: More than any of the works below has steps.
MOST_STEPS = 60


async def create(control: Control) -> object:
    return await control.create(GIB, name="v", client_token="v")


async def create_other(control: Control) -> object:
    return await control.create(GIB, name="w", client_token="w")


async def attach(control: Control) -> object:
    return await control.attach("v")


async def snapshot(control: Control) -> object:
    return await shipped(control, await control.snapshot("v", client_token="first"))


async def second(control: Control) -> object:
    return await shipped(control, await control.snapshot("v", client_token="second"))


async def barrier(control: Control) -> object:
    return await shipped(control, await control.snapshot("v", "w", client_token="both"))


async def delete(control: Control) -> object:
    for each in await control.snapshots("v"):
        with suppress(NotFound):
            await control.delete_snapshot(each.id)

    async def are_gone() -> bool:
        return not await control.snapshots("v")

    return await until(are_gone, "they are gone")


async def restore(control: Control) -> object:
    (source,) = await control.snapshot("v", client_token="first")
    await control.create(0, name="r", snapshot=source.id, client_token="r")

    async def is_hydrated() -> bool:
        return not (await control.get("r")).HasField("source")

    return await until(is_hydrated, "it is hydrated")


async def shipped(control: Control, made: list[snapshot_pb2.Snapshot]) -> object:
    """Waits until these are completed, or in error."""

    async def are_so() -> bool:
        states = [(await control.get_snapshot(each.id)).state for each in made]
        return all(state in (COMPLETED, ERROR) for state in states)

    return await until(are_so, "they are shipped")


async def at_rest(control: Control, cluster: Cluster) -> bool:
    """Nothing is under way, and all sides agree."""
    snapshots = await control.snapshots()
    if any(each.state not in (COMPLETED, ERROR) for each in snapshots):
        return False
    if (await control.store.list("pins/")).items or any(each.held for each in cluster.front_ends):
        return False
    newest: dict[str, snapshot_pb2.Snapshot] = {}
    for each in snapshots:
        if each.state == COMPLETED and each.generation >= newest.get(each.volume, each).generation:
            newest[each.volume] = each
    # By the names of their seals, which may be of a barrier's second try.
    pins = {volume: [each.generation] for volume, each in newest.items()}
    held = {volume: [number for number, _ in layers.pins] for volume, layers in cluster.layers.items() if layers.pins}
    if held != pins:
        return False
    if cluster.daemons[0].roots != {each.id for each in snapshots if each.state == COMPLETED}:
        return False
    return await serves_what_is_attached(control, cluster)


async def serves_what_is_attached(control: Control, cluster: Cluster) -> bool:
    attached = {each.id: each.epoch for each in await control.volumes() if each.HasField("attachment")}
    serving = {name: opened.epoch for each in cluster.front_ends for name, opened in each.volumes.items()}
    return serving == attached


WORKS: dict[str, tuple[tuple[Work, ...], Work]] = {
    "attached": ((create, attach), snapshot),
    "detached": ((create,), snapshot),
    "second": ((create, attach, snapshot), second),
    "barrier": ((create, create_other, attach), barrier),
    "delete": ((create, attach, snapshot, second), delete),
    "restore": ((create, snapshot), restore),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", WORKS)
def test_control_may_be_killed_at_any_step(tmp_path: Path, name: str) -> None:
    before, work = WORKS[name]

    async def one(directory: Path, point: int) -> bool:
        async with cluster_at(directory, daemons=1) as cluster:
            cluster.front_ends[0].hydrates = True
            async with cluster.control() as control:
                for each in before:
                    await each(control)
                await until(lambda: at_rest(control, cluster), "at rest before")
            reached = await stop_at(cluster, work, point)
            async with cluster.control() as control:
                await work(control)
                await until(lambda: at_rest(control, cluster), f"at rest after a stop at step {point} and a retry")
                await check_end(cluster, control, name)
            return reached

    at_every_point(tmp_path, one, MOST_STEPS)


async def check_end(cluster: Cluster, control: Control, name: str) -> None:
    """What the work asked for is so, once."""
    snapshots = await control.snapshots()
    states = {each.state for each in snapshots}
    sealed = [len(layers.sealed) for layers in cluster.layers.values()]
    match name:
        case "attached" | "detached":
            assert (len(snapshots), states, sealed) == (1, {COMPLETED}, [1])
        case "second":
            assert (len(snapshots), states, sealed) == (2, {COMPLETED}, [2])
        case "barrier":
            assert (len(snapshots), states) == (2, {COMPLETED})  # of one instant, be it that of another barrier
        case "delete":
            assert snapshots == []
            assert cluster.daemons[0].roots == set()
        case "restore":
            volumes = {each.name: each for each in await control.volumes()}
            assert sorted(volumes) == ["r", "v"]
            assert volumes["r"].state == control_pb2.VOLUME_STATE_AVAILABLE
            assert (await control.get_snapshot(snapshots[0].id)).used_by == []
