"""The whole cluster in virtual time: some seeds hold, and a cluster with one rule broken does not."""

import asyncio
from functools import partial
from random import Random
from unittest import mock

import pytest

from blockstore.rpc import control_pb2 as pb
from tests.cluster_simulation.checks import check_replicas
from tests.cluster_simulation.cluster import SimulatedCluster
from tests.cluster_simulation.faults import PASSING
from tests.cluster_simulation.guests import Guests
from tests.cluster_simulation.loop import SimulationLoop
from tests.cluster_simulation.mutations import MUTATIONS, find
from tests.cluster_simulation.network import RESENT_S, Connection, Network, name_of
from tests.cluster_simulation.run import in_simulation, simulate
from tests.cluster_simulation.users import create

_LASTS_S = 10.0
#: A change of what takes how long makes other runs of the same seeds: the next ones may find it then.
_MORE_SEEDS = 4


@pytest.mark.parametrize("seed", [1, 2])
def test_a_cluster_under_faults_loses_nothing_and_heals(seed: int) -> None:
    """One with three controls on etcd, one with a control by itself."""
    report = simulate(seed, _LASTS_S)
    assert report.operations > 20
    assert report.faults
    assert report.done


def test_a_detached_volume_is_brought_up_to_date_by_itself() -> None:
    """One of its nodes is away while it is written, and comes back when it is detached."""

    async def scenario(cluster: SimulatedCluster) -> None:
        guests = Guests(cluster)
        guest = await create(cluster, guests, Random(1))

        async def is_served() -> bool:
            return guest.model.operations > 0

        await cluster.until("it is served", is_served, 30.0)
        behind = next(name for name in cluster.of_kind("node") if list(cluster.place(name).glob("replicas/*")))
        cluster.kill(behind)

        async def is_written() -> bool:
            return guest.model.operations > 20

        await cluster.until("it is written meanwhile", is_written, 30.0)
        await guests.stop(guest)
        await cluster.call("DetachVolume", pb.DetachVolumeRequest(volume=guest.volume))
        cluster.start(behind)
        await cluster.until("its replicas have all of it", cluster.whole, 30.0)
        health = await cluster.call("GetVolumeHealth", pb.GetVolumeRequest(volume=guest.volume))
        assert not health.volume.HasField("attachment")
        await check_replicas(cluster)

    in_simulation(4, scenario)


def test_messages_of_a_lossy_network_come_late_and_in_order() -> None:
    loop = SimulationLoop(Random(1))
    network = Network(loop)
    connection = Connection(network, mock.Mock(process=None))
    came: list[tuple[int, float]] = []

    def arrive(number: int, sent_at: float) -> None:
        came.append((number, loop.time() - sent_at))

    for lost, numbers in ((0.0, range(500)), (0.2, range(500, 1000))):
        network.lost_of[name_of(None)] = lost
        for number in numbers:
            connection.to_server(partial(arrive, number, loop.time()))
        loop.run_until_complete(asyncio.sleep(60.0))
    loop.close()
    assert [number for number, _ in came] == list(range(1000))
    assert came[499][1] < RESENT_S < came[999][1]


def test_the_same_seed_is_the_same_run() -> None:
    assert simulate(3, 2.0, PASSING) == simulate(3, 2.0, PASSING)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_rule_is_found_out(name: str) -> None:
    mutation = MUTATIONS[name]
    seeds = range(mutation.found_by, mutation.found_by + _MORE_SEEDS)
    assert find(mutation, seeds) is not None, (
        f"none of the seeds {seeds.start} to {seeds.stop - 1} finds what {name} breaks; if it is broken still, write "
        f"into mutations.py which seed does: python -m tests.cluster_simulation --mutations {name}"
    )
