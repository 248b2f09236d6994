"""Control stopped at every step it makes to the outside: the next one carries on, and nothing is left wrong."""

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from blockstore.errors import CairnError, NotFound
from blockstore.rpc import control_pb2
from blockstore.units import GIB
from tests.control_cluster import Cluster, Control, cluster_at, expected_replicas, until
from tests.control_stopping import Work, at_every_point, stop_at
from tests.patient_time import run_patiently

TOKEN = "the-only-one"
_AT_REST = (control_pb2.VOLUME_STATE_AVAILABLE, control_pb2.VOLUME_STATE_IN_USE)
#: More than any of the works below has steps.
MOST_STEPS = 40


async def create(control: Control) -> object:
    return await control.create(GIB, name="v", client_token=TOKEN)


async def attach(control: Control) -> object:
    return await control.attach("v")


async def detach(control: Control) -> object:
    return await control.detach("v")


async def delete(control: Control) -> object:
    with suppress(NotFound):  # Asked for a second time.
        return await control.delete("v")
    return None


async def at_rest(control: Control, cluster: Cluster) -> bool:
    """No volume is between two states, and the nodes hold exactly the catalog's replicas."""
    volumes = await control.volumes()
    moving = [
        volume.state not in _AT_REST
        or (volume.attachment.front_end and volume.attachment.state != control_pb2.ATTACHMENT_STATE_ATTACHED)
        for volume in volumes
    ]
    return not any(moving) and cluster.held() == expected_replicas(volumes)


@pytest.mark.parametrize(
    ("before", "work"),
    [((), create), ((create,), attach), ((create, attach), detach), ((create,), delete)],
    ids=["create", "attach", "detach", "delete"],
)
def test_control_may_be_killed_at_any_step(tmp_path: Path, before: tuple[Work, ...], work: Work) -> None:
    async def one(directory: Path, point: int) -> bool:
        async with cluster_at(directory) as cluster:
            async with cluster.control() as control:
                for each in before:
                    await each(control)
            reached = await stop_at(cluster, work, point)
            async with cluster.control() as control:
                await until(lambda: at_rest(control, cluster), f"at rest after a stop at step {point}")
                await work(control)
                await until(lambda: at_rest(control, cluster), f"at rest after a stop at step {point} and a retry")
                await check_end(cluster, control, work)
            return reached

    at_every_point(tmp_path, one, MOST_STEPS)


async def check_end(cluster: Cluster, control: Control, work: Work) -> None:
    """What `work` asked for is so, once."""
    volumes = await control.volumes()
    if work is delete:
        assert volumes == []
        assert cluster.held() == {}
        return
    (volume,) = volumes
    assert len(cluster.held()) == 3
    serving = {name: opened.epoch for each in cluster.front_ends for name, opened in each.volumes.items()}
    if work is attach:
        assert volume.state == control_pb2.VOLUME_STATE_IN_USE
        assert serving == {volume.id: volume.epoch}
    else:
        assert volume.state == control_pb2.VOLUME_STATE_AVAILABLE
        assert serving == {}


def test_control_and_front_end_both_restarted_while_attaching(tmp_path: Path) -> None:
    """The epoch that the old process was given is never used by the new one."""

    async def scenario() -> None:
        async with cluster_at(tmp_path) as cluster:
            async with cluster.control() as control:
                volume = await control.create(GIB, name="v")
                front_end = cluster.front_ends[0]
                front_end.may_open.clear()
                attaching = asyncio.ensure_future(control.attach("v"))
                await front_end.opening.wait()
            with suppress(CairnError, asyncio.CancelledError):
                await attaching
            cluster.front_ends[0] = await front_end.restart()
            async with cluster.control() as control:
                await until(lambda: at_rest(control, cluster), "it is attached")
                assert (await control.get("v")).epoch == 2
                assert cluster.front_ends[0].volumes[volume.id].epoch == 2

    run_patiently(scenario())


def test_control_restarted_while_a_front_end_opens_joins_the_attempt(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster_at(tmp_path) as cluster:
            front_end = cluster.front_ends[0]
            async with cluster.control() as control:
                volume = await control.create(GIB, name="v")
                front_end.may_open.clear()
                attaching = asyncio.ensure_future(control.attach("v"))
                await front_end.opening.wait()
            with suppress(CairnError, asyncio.CancelledError):
                await attaching
            front_end.may_open.set()
            async with cluster.control() as control:
                await until(lambda: at_rest(control, cluster), "it is attached")
                assert (await control.get("v")).epoch == front_end.volumes[volume.id].epoch == 1

    run_patiently(scenario())
