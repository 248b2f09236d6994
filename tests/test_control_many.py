"""Lists of a cluster that outgrew one message: whole, of one moment, and told by the real gRPC server."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from blockstore.control import shipping
from blockstore.errors import QuorumUnavailable
from blockstore.grpc_endpoint import MAX_MESSAGE_SIZE, Endpoint, open_channel
from blockstore.grpc_parts import PART_SIZE, in_parts, whole
from blockstore.rpc import control_pb2, snapshot_pb2, snapshot_pb2_grpc
from snapshotd.roots import ControlCatalog
from tests.control_cluster import Control, control_at, until
from tests.control_many import MAP_SIZE, completed, fill, pending, restored, volume
from tests.control_store import MemoryDaemon

#: Of a test: its lists take seconds, and the first one makes them.
pytestmark = pytest.mark.timeout(400)

#: Snapshots were too many at 17,600, roots at 70,000, volumes at 8,000.
VOLUMES = 9_000
SNAPSHOTS = 30_000
PENDING = 300
#: A busy machine makes a million records in less.
LIMIT_S = 120.0
#: Before it no pass of the loop changes what a test has put there.
QUIET: dict[str, Any] = {"reconcile_s": 3600.0, "map_size_bytes": MAP_SIZE}
#: Of a daemon that registers and does not beat: it is up for as long as the lists take.
LONG_LEASE_S = 3600.0

Check = Callable[[Control], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of control with that many records; tests of this module only read them."""
    directory = tmp_path_factory.mktemp("large")
    volumes = [volume(number) for number in range(VOLUMES)]
    snapshots = [completed(number, volumes[number % VOLUMES]) for number in range(SNAPSHOTS - PENDING)]
    # Two of each of these volumes: one waits for the other.
    snapshots += [pending(SNAPSHOTS - PENDING + n, volumes[n // 2]) for n in range(PENDING)]
    volumes[-3:] = [restored(VOLUMES - 1 - n, snapshots[7]) for n in (2, 1, 0)]
    asyncio.run(fill(directory, volumes, snapshots, prune_number=5))
    return directory


def run(directory: Path, check: Check, **changes: Any) -> None:
    async def with_control() -> None:
        async with control_at(directory, **QUIET, **changes) as control:
            await check(control)

    asyncio.run(with_control())


async def parts_of(control: Control, name: str, request: Any) -> list[Any]:
    return [part async for part in getattr(control.stub, name)(request, timeout=LIMIT_S)]


def test_every_list_comes_whole_and_in_small_parts(large: Path) -> None:
    async def check(control: Control) -> None:
        snapshots = snapshot_pb2.ListSnapshotsResponse()
        parts = await parts_of(control, "ListSnapshots", snapshot_pb2.ListSnapshotsRequest())
        for part in parts:
            assert part.ByteSize() < 2 * PART_SIZE < MAX_MESSAGE_SIZE
            snapshots.MergeFrom(part)
        assert snapshots.ByteSize() > MAX_MESSAGE_SIZE, "one message would have done: nothing was tested"
        assert [each.created_at_ms for each in snapshots.snapshots] == list(range(1, SNAPSHOTS + 1))
        assert len(snapshots.snapshots[7].used_by) == 3
        volumes = await control.volumes()
        assert [each.name for each in volumes] == [f"volume-{n}" for n in range(VOLUMES)]
        status = await control.status()
        assert status.ByteSize() > MAX_MESSAGE_SIZE
        assert [each.volume.name for each in status.volumes] == [each.name for each in volumes]
        assert not status.healthy
        # Of its three replicas nobody knows, and that nobody can serve it.
        assert Counter(each.subject for each in status.problems)[volumes[1].id] == 4
        severities = [each.severity for each in status.problems]
        assert severities == sorted(severities, reverse=True)

    run(large, check)


def test_the_snapshots_of_one_volume_and_the_health_of_one_are_asked_for_alone(large: Path) -> None:
    async def check(control: Control) -> None:
        found = await control.snapshots(volume(2).id)
        assert {each.volume_name for each in found} == {"volume-2"}
        assert len(found) == len(range(2, SNAPSHOTS - PENDING, VOLUMES)) + 2
        whys = [each.progress.why for each in found[-2:]]
        assert whys[0] == whys[1]
        assert "no snapshotd is up" in whys[0]
        request = control_pb2.GetVolumeRequest(volume=volume(2).id)
        health = await control.call("GetVolumeHealth", request)
        assert (health.volume.name, len(health.replicas)) == ("volume-2", 3)

    run(large, check)


def test_why_each_of_many_pending_ones_waits(large: Path, tmp_path: Path) -> None:
    async def check(control: Control) -> None:
        daemon = MemoryDaemon(1)
        await daemon.endpoint.start()
        await daemon.register(control.stub)
        whys = [each.progress.why for each in (await control.snapshots())[-PENDING:]]
        for n, why in enumerate(whys):
            first = SNAPSHOTS - PENDING + n - 1
            assert why == (f"waits until snap-{first:017x} is shipped" if n % 2 else "")
        await daemon.stop()

    copied = tmp_path / "control"
    copied.mkdir()
    (copied / "data.mdb").write_bytes((large / "data.mdb").read_bytes())
    run(copied, check, lease_s=LONG_LEASE_S)


def test_roots_are_all_there_with_the_number(large: Path) -> None:
    async def check(control: Control) -> None:
        catalog = ControlCatalog(control.stub, "sd-00000000000000001")
        roots = await catalog.roots()
        assert roots.number == await catalog.prune_number() == 5
        assert len(roots.completed) == SNAPSHOTS - PENDING
        assert roots.completed[completed(9, volume(9)).id] == bytes.fromhex(f"{9:064x}")
        assert len(roots.pending) == PENDING
        assert len(await catalog.snapshots()) == SNAPSHOTS

    run(large, check)


def test_what_happens_between_two_parts_is_in_none_of_them(tmp_path: Path) -> None:
    """Roots and number belong to one revision: neither a raise, nor a deletion, nor what is added gets between."""

    async def check(control: Control) -> None:
        daemon = MemoryDaemon(1)
        await daemon.endpoint.start()
        await daemon.register(control.stub)
        before = await whole(control.stub.GetRoots(snapshot_pb2.GetRootsRequest(), timeout=LIMIT_S))
        parts = aiter(control.stub.GetRoots(snapshot_pb2.GetRootsRequest(), timeout=LIMIT_S))
        listing = aiter(control.stub.ListSnapshots(snapshot_pb2.ListSnapshotsRequest(), timeout=LIMIT_S))
        answer, listed = await anext(parts), await anext(listing)
        assert len(answer.roots) < 20_000, "all came with the first part: nothing was tested"
        await control.call("RaisePruneNumber", snapshot_pb2.RaisePruneNumberRequest(daemon=daemon.id, expected=5))
        for number in (1, 10_000, 19_999):
            gone = f"snap-{number:017x}"
            await control.delete_snapshot(gone)
            await control.call("DropSnapshot", snapshot_pb2.DropSnapshotRequest(daemon=daemon.id, snapshot=gone))
        added = snapshot_pb2.Snapshot(id="snap-00001000000000000", size_bytes=4096, root=bytes(32))
        await control.call("AddSnapshot", snapshot_pb2.AddSnapshotRequest(snapshot=added, prune_number=6))
        answer.MergeFrom(await whole(parts))
        assert answer == before
        listed.MergeFrom(await whole(listing))
        assert [each.generation for each in listed.snapshots] == list(range(1, 20_001))
        after = await ControlCatalog(control.stub, daemon.id).roots()
        assert (after.number, len(after.completed)) == (6, 20_000 - 3 + 1)
        await daemon.stop()

    one = volume(0)
    asyncio.run(fill(tmp_path, [one], [completed(number, one) for number in range(20_000)], prune_number=5))
    run(tmp_path, check, lease_s=LONG_LEASE_S)


def test_a_list_of_roots_that_lacks_some_is_no_list(tmp_path: Path) -> None:
    """Whatever cut it short: what is not among the roots would be deleted."""

    class Forgetful(snapshot_pb2_grpc.SnapshotsServicer):
        async def GetRoots(self, request: Any, context: Any) -> AsyncIterator[snapshot_pb2.GetRootsResponse]:
            roots = [snapshot_pb2.Root(snapshot=f"snap-{n:017x}", root=bytes(32)) for n in range(20_000)]
            for part in list(in_parts(snapshot_pb2.GetRootsResponse(total=20_000), roots=roots))[:-1]:
                yield part

    async def check() -> None:
        endpoint = Endpoint("127.0.0.1:0")
        snapshot_pb2_grpc.add_SnapshotsServicer_to_server(Forgetful(), endpoint.server)  # type: ignore[abstract]
        await endpoint.start()
        async with open_channel(endpoint.address) as channel:
            with pytest.raises(QuorumUnavailable, match="of 20000 entries"):
                await ControlCatalog(snapshot_pb2_grpc.SnapshotsStub(channel), "sd-00000000000000001").roots()
        await endpoint.stop(0)

    asyncio.run(check())


def test_a_daemon_is_given_no_more_than_one_answer_holds_and_gets_through_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, at_once = 50, 20
    monkeypatch.setattr(shipping, "MAX_SHIPS", at_once)
    monkeypatch.setattr(shipping, "MAX_DROPS", at_once)

    async def check() -> None:
        volumes = [volume(number) for number in range(count)]
        snapshots = [pending(number, volumes[number]) for number in range(count)]
        deleting = [completed(count + number, volumes[0]) for number in range(count)]
        await fill(tmp_path, volumes, [*snapshots, *deleting])
        async with control_at(tmp_path, map_size_bytes=MAP_SIZE, lease_s=LONG_LEASE_S) as control:
            for each in deleting:
                await control.delete_snapshot(each.id)
            daemon = MemoryDaemon(1)
            daemon.ships = False
            await daemon.start()
            daemon.control = control.address
            await until(lambda: has_tasks(daemon), "it has work")
            assert len(daemon.tasks) == at_once
            daemon.ships = True

            async def done() -> bool:
                found = await control.snapshots()
                return len(found) == count and all(each.completed_at_ms for each in found)

            await until(done, "all are shipped, and those that are deleted are gone")
            assert len(daemon.dropped) == len(set(daemon.dropped)) == len(deleting)
            await daemon.stop()

    async def has_tasks(daemon: MemoryDaemon) -> bool:
        return len(daemon.tasks) >= at_once

    asyncio.run(check())
