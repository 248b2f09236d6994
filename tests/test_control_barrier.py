"""Several volumes at one instant: no write is acknowledged between the first seal and the last, or nothing was made."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.errors import CairnError, Conflict, NotFound, QuorumUnavailable
from blockstore.rpc import control_pb2, snapshot_pb2
from tests.control_cluster import Cluster, Control, MemoryFrontEnd, cluster_at, control_at, until
from tests.control_scenario import run
from tests.patient_time import run_patiently

PENDING = snapshot_pb2.SNAPSHOT_STATE_PENDING
#: Of a try; before the last one control waits for as long.
HOLD_S = 0.2
ERROR = snapshot_pb2.SNAPSHOT_STATE_ERROR


async def attached(cluster: Cluster, control: Control, *names: str) -> list[str]:
    """The ids of new volumes, attached to the front-ends in turn."""
    ids = []
    for index, name in enumerate(names):
        volume = await control.create(name=name)
        await control.attach(name, front_end=cluster.front_ends[index % len(cluster.front_ends)].id)
        ids.append(volume.id)
    return ids


def write_everywhere(cluster: Cluster) -> None:
    for front_end in cluster.front_ends:
        for volume in front_end.volumes:
            front_end.write(volume)


def all_calls(cluster: Cluster, name: str) -> int:
    return sum(call == name for front_end in cluster.front_ends for call, _ in front_end.calls)


async def without_pins(cluster: Cluster) -> None:
    async def is_so() -> bool:
        return not any(layers.pins for layers in cluster.layers.values())

    await until(is_so, f"no pin is left: {dict(cluster.layers)}")


async def only_pins(cluster: Cluster, generations: dict[str, int]) -> None:
    """One in each volume, of that generation."""

    async def is_so() -> bool:
        found = {volume: [number for number, _ in layers.pins] for volume, layers in cluster.layers.items()}
        return found == {volume: [number] for volume, number in generations.items()}

    await until(is_so, f"only {generations} are pinned: {dict(cluster.layers)}")


def test_all_are_sealed_at_one_instant_and_go_on(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        ids = await attached(cluster, control, "a", "b", "c")
        for front_end in cluster.front_ends:
            for name in ("HoldWrites", "SealVolume", "ReleaseWrites"):
                # Guests write all the time; what passes is what is not held.
                front_end.hooks[name] = lambda request: write_everywhere(cluster)
        made = await control.snapshot("a", "b", "c", description="d")
        assert [each.volume for each in made] == ids
        assert [each.state for each in made] == [PENDING] * 3
        assert len({each.barrier for each in made}) == 1
        assert made[0].barrier
        assert all(each.pause_us > 0 and each.generation == 1 for each in made)
        sealed = {each.volume: cluster.layers[each.volume].sealed[each.id][1] for each in made}
        written = {volume: cluster.layers[volume].writes for volume in ids}
        assert all_calls(cluster, "HoldWrites") == all_calls(cluster, "ReleaseWrites") == 3
        for front_end in cluster.front_ends:
            assert front_end.held == {}
            order = [name for name, _ in front_end.calls]
            assert order == sorted(order, key=["HoldWrites", "SealVolume", "ReleaseWrites"].index)
        # From the first seal to the last no guest's write got through, on any volume.
        assert all(sealed[volume] <= written[volume] for volume in ids)
        assert max(cluster.layers[volume].writes - sealed[volume] for volume in ids) <= 2
        assert {each.id for each in await control.snapshots()} == {each.id for each in made}

    run(tmp_path, scenario, front_ends=2)


def test_no_write_gets_through_between_two_seals(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        ids = await attached(cluster, control, "a", "b")
        acknowledged: list[str] = []

        def write(request: control_pb2.SealVolumeRequest) -> None:
            acknowledged.extend(
                volume for front_end in cluster.front_ends for volume in front_end.volumes if front_end.write(volume)
            )

        for front_end in cluster.front_ends:
            front_end.hooks["SealVolume"] = write
        await control.snapshot(*ids)
        assert all_calls(cluster, "SealVolume") == 2
        assert acknowledged == []
        write_everywhere(cluster)
        assert [cluster.layers[volume].writes for volume in ids] == [1, 1]

    run(tmp_path, scenario, front_ends=2)


def test_detached_volumes_may_be_among_them(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await attached(cluster, control, "a")
        await control.create(name="b")
        made = await control.snapshot("b", "a")
        assert [each.state for each in made] == [PENDING] * 2
        assert (await control.get("b")).state == control_pb2.VOLUME_STATE_AVAILABLE

    run(tmp_path, scenario, front_ends=2)


@pytest.mark.parametrize("call", ["HoldWrites", "SealVolume", "ReleaseWrites"])
@pytest.mark.parametrize("where", ["fails", "then_fails"])
@pytest.mark.parametrize("error", [QuorumUnavailable("too slow"), Conflict("another barrier"), NotFound("moved")])
def test_when_any_call_fails_none_is_made_all_go_on_and_no_pin_stays(
    tmp_path: Path, call: str, where: str, error: CairnError
) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await attached(cluster, control, "a", "b")
        getattr(cluster.front_ends[1], where)[call] = error
        made = await control.snapshot("a", "b")
        assert [each.state for each in made] == [ERROR] * 2
        assert all("tried 3 times: create it again" in each.reason for each in made)
        if call != "ReleaseWrites":  # else the first barrier still holds when the next one comes
            assert all(str(error) in each.reason for each in made)
        assert all("writes are held for at most" in each.reason and " took " in each.reason for each in made)
        assert all_calls(cluster, "ReleaseWrites") == all_calls(cluster, "HoldWrites") == 3 * 2
        getattr(cluster.front_ends[1], where).clear()
        assert cluster.front_ends[0].held == {}
        await without_pins(cluster)
        cluster.front_ends[1].held.clear()  # What a front-end does by itself when the limit has passed.
        assert [each.state for each in await control.snapshot("a", "b")] == [PENDING] * 2

    run(tmp_path, scenario, front_ends=2, hold_limit_s=HOLD_S)


def test_a_volume_that_was_released_too_early_spoils_it(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        one, other = await attached(cluster, control, "a", "b")
        front_end = cluster.front_ends[1]
        front_end.hooks["SealVolume"] = lambda request: front_end.release_too_early(other)
        made = await control.snapshot("a", "b")
        assert [each.state for each in made] == [ERROR] * 2
        assert all(other in each.reason for each in made)
        assert len(cluster.layers[one].sealed) == len(cluster.layers[other].sealed) == 3
        await without_pins(cluster)

    run(tmp_path, scenario, front_ends=2, hold_limit_s=HOLD_S)


def test_a_volume_that_is_taken_over_in_the_middle_spoils_it(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        ids = await attached(cluster, control, "a", "b")
        front_end = cluster.front_ends[1]
        # A new epoch there, between the hold and the seal: the guest of the new one was never held.
        front_end.hooks["HoldWrites"] = lambda request: setattr(front_end.volumes[ids[1]], "epoch", 7)
        made = await control.snapshot("a", "b")
        assert [each.state for each in made] == [ERROR] * 2
        assert "epoch" in made[0].reason

    run(tmp_path, scenario, front_ends=2, hold_limit_s=HOLD_S)


@pytest.mark.parametrize("call", ["HoldWrites", "SealVolume", "ReleaseWrites"])
@pytest.mark.parametrize("where", ["fails", "then_fails"])
def test_the_second_try_is_another_barrier_with_other_seals(tmp_path: Path, call: str, where: str) -> None:
    """What is sealed is of the second instant in both, guests went on in between, and nothing of the first stays."""

    async def scenario(cluster: Cluster, control: Control) -> None:
        ids = await attached(cluster, control, "a", "b")
        failing = cluster.front_ends[1]
        getattr(failing, where)[call] = QuorumUnavailable("too slow")

        def begin_at(front_end: MemoryFrontEnd) -> Callable[[Any], None]:
            """Of the second try, at this one: guests went on since, also where the limit had to end the first one."""

            def begin(request: Any) -> None:
                if sum(name == "HoldWrites" for name, _ in front_end.calls) == 2:
                    front_end.held.clear()
                    assert all(front_end.write(volume) for volume in front_end.volumes)
                    getattr(front_end, where).clear()

            return begin

        for front_end in cluster.front_ends:
            front_end.hooks["HoldWrites"] = begin_at(front_end)
        made = await control.snapshot("a", "b")
        assert [each.state for each in made] == [PENDING] * 2
        written = {volume: cluster.layers[volume].writes for volume in ids}
        assert set(written.values()) == {1}
        for each in made:
            # Not always the newest: what the first try may have sealed is sealed, where it is not, to be unpinned.
            assert (each.generation, written[each.volume]) in cluster.layers[each.volume].sealed.values()
        assert cluster.front_ends[0].held == cluster.front_ends[1].held == {}
        await only_pins(cluster, {each.volume: each.generation for each in made})
        for each in made:
            await control.delete_snapshot(each.id)
        await without_pins(cluster)

    run(tmp_path, scenario, front_ends=2)


def test_barriers_that_share_volumes_do_not_break_each_other(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await attached(cluster, control, "a", "b", "c")
        made = await asyncio.gather(
            control.snapshot("a", "b"), control.snapshot("b", "c"), control.snapshot("c", "a"), control.snapshot("b")
        )
        assert [each.state for group in made for each in group] == [PENDING] * 7
        assert len({group[0].barrier for group in made}) == 4

    run(tmp_path, scenario, front_ends=2)


def test_seals_of_a_try_whose_end_could_not_be_entered_are_never_taken_for_those_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One volume was sealed, the other was not; the metastore is away for a moment, and front-ends start anew."""
    enter = SnapshotCatalog.change
    failed: list[bool] = []

    async def enter_or_fail(catalog: SnapshotCatalog, *arguments: Any, **more: Any) -> Any:
        if more.get("pins") and not failed:
            failed.append(True)
            raise QuorumUnavailable("the metastore is away")
        return await enter(catalog, *arguments, **more)

    monkeypatch.setattr(SnapshotCatalog, "change", enter_or_fail)

    async def scenario(cluster: Cluster, control: Control) -> None:
        await attached(cluster, control, "a", "b")
        one, other = cluster.front_ends
        other.fails["SealVolume"] = QuorumUnavailable("too slow")

        def write(request: Any) -> None:
            """Right before the second try, as one who knows of no hold before it."""
            if all_calls(cluster, "ReleaseWrites"):
                other.fails.clear()
                one.held.clear()
                assert all(one.write(volume) for volume in one.volumes)

        one.hooks["HoldWrites"] = write
        made = await control.snapshot("a", "b")
        assert failed
        assert [each.state for each in made] == [PENDING] * 2
        for each in made:
            layers = cluster.layers[each.volume]  # which may have a newer seal: of the first try, to be unpinned
            assert (each.generation, layers.writes) in layers.sealed.values()

    run(tmp_path, scenario, front_ends=2)


async def kill_in_the_middle(cluster: Cluster) -> None:
    """A control that has begun a barrier over volumes a and b, of both front-ends, ends before it has ended that."""
    stuck, told = asyncio.Event(), asyncio.Event()
    cluster.front_ends[1].hooks["SealVolume"] = lambda request: stuck.set()
    cluster.front_ends[1].waits["SealVolume"] = told
    cluster.front_ends[1].then_fails["SealVolume"] = QuorumUnavailable("never heard")
    for front_end in cluster.front_ends:
        front_end.fails["ReleaseWrites"] = QuorumUnavailable("never heard")
    async with cluster.control() as control:
        await attached(cluster, control, "a", "b")
        creating = asyncio.ensure_future(control.snapshot("a", "b", client_token="t"))
        await stuck.wait()
        # As if killed before the end was kept: the records say no more than that it was begun.
        begun = {each.key: each.value for each in (await control.store.list("snapshots/")).items}
        told.set()
        await asyncio.gather(creating, return_exceptions=True)
        current = {each.key: each for each in (await control.store.list("snapshots/")).items}
        pins = [each.key for each in (await control.store.list("pins/")).items]
        assert len(begun) == 2
        await control.store.transact({each: current[each].revision for each in begun}, begun, pins)
    for front_end in cluster.front_ends:
        front_end.fails.clear()
        front_end.then_fails.clear()
        assert front_end.held


def test_one_that_control_was_killed_in_is_released_and_made_anew_at_another_instant(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster_at(tmp_path, 3, 2) as cluster:
            await kill_in_the_middle(cluster)
            async with cluster.control() as control:
                made = await control.snapshot("a", "b", client_token="t")
                assert [each.state for each in made] == [PENDING] * 2
                assert [each.generation for each in made] == [2, 2]
                assert [front_end.held for front_end in cluster.front_ends] == [{}, {}]
                await only_pins(cluster, {each.volume: 2 for each in made})

    run_patiently(scenario())


def test_one_that_control_was_killed_in_is_given_up_in_time_where_front_ends_do_not_come_back(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with cluster_at(tmp_path, 3, 2) as cluster:
            await kill_in_the_middle(cluster)
            async with control_at(cluster.directory, seal_limit_s=1.0) as control:  # nobody says a word to it
                made = await control.snapshot("a", "b", client_token="t")
                assert [each.state for each in made] == [ERROR] * 2
                assert all("within 1 s" in each.reason for each in made)

    run_patiently(scenario())
