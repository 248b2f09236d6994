"""What a daemon does with control's answers: a retry begins anew, a deleted snapshot leaves with all its roots."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import cast

from structlog.testing import capture_logs

from blockstore.config import SnapshotdSettings
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB, BlockNumber
from snapshotd.control_client import ControlClient
from snapshotd.layout import SHARDS, SNAPSHOTS
from snapshotd.object_store import Data
from snapshotd.root import Statistics
from snapshotd.tasks import Tasks
from tests.snapshot_parts import CLUSTER, CountingStore, snapshot_id
from tests.snapshotd_shipping import PlayedControl, Shipping, shipping
from tests.stack import LIMIT_S, in_loop, until


class AskedControl(PlayedControl):
    """It is asked by heartbeats, too: `say` what it answers from now on."""

    def __init__(self) -> None:
        super().__init__()
        self._now = pb.DaemonHeartbeatResponse()
        self._news = asyncio.Event()
        self.answers = 0
        self.why = ""
        self.dropped: list[str] = []

    def say(self, *, ship: Iterable[pb.ShipTask] = (), drop: Iterable[str] = ()) -> None:
        self._now = pb.DaemonHeartbeatResponse(ship=ship, drop=drop)
        self._news.set()

    async def register(self, address: str, store: str, repository: str) -> pb.RegisterDaemonResponse:
        return pb.RegisterDaemonResponse(cluster=CLUSTER)

    async def report(
        self, address: str, snapshots: Iterable[pb.SnapshotReport], known: Iterable[str], wait_s: float, why: str
    ) -> pb.DaemonHeartbeatResponse:
        self.why = why
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._news.wait()
        self._news.clear()
        self.answers += 1
        return self._now

    async def complete(
        self, snapshot: str, root: bytes, statistics: Statistics, prune_number: int, retries: int
    ) -> None:
        await super().complete(snapshot, root, statistics, prune_number, retries)
        self.say()

    async def drop(self, snapshot: str) -> None:
        self.dropped.append(snapshot)
        self.say()


@asynccontextmanager
async def _running(here: Shipping) -> AsyncIterator[AskedControl]:
    control = AskedControl()
    control.completed, control.retries = here.control.completed, here.control.retries
    here.control = control
    settings = SnapshotdSettings(control="127.0.0.1:1", heartbeat_s=0.1)
    parts = here.parts
    tasks = Tasks(settings, parts.packs, parts.reader, cast(ControlClient, control), CLUSTER)
    running = asyncio.create_task(tasks.run())
    try:
        yield control
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await tasks.close()


class _Stuck:
    """The first put of a shard waits until it may go on; later ones do not."""

    def __init__(self, store: CountingStore) -> None:
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()
        self.put, store.put = store.put, self._hold  # type: ignore[method-assign]

    async def _hold(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        if key.startswith(SHARDS) and not self.reached.is_set():
            self.reached.set()
            await self.go_on.wait()
        return await self.put(key, data, if_absent=if_absent)


def test_a_retry_with_another_base_stops_the_attempt_with_the_old_one(tmp_path: Path) -> None:
    async def check() -> None:
        async with shipping(tmp_path) as (here, volume, content):
            await here.ship(1, 1).run()
            base = await here.parts.reader.root(snapshot_id(1), here.control.completed[snapshot_id(1)])
            await volume.write(BlockNumber(900), bytes([7]) * BLOCK_SIZE)
            content[900 * BLOCK_SIZE : 901 * BLOCK_SIZE] = bytes([7]) * BLOCK_SIZE
            await volume.seal(snapshot_id(2).encode())
            stuck = _Stuck(here.store)
            async with _running(here) as control:
                control.say(ship=[here.task(2, 2, base=1)])
                await asyncio.wait_for(stuck.reached.wait(), LIMIT_S)
                control.retries[snapshot_id(2)] = 1
                control.say(ship=[here.task(2, 2)])
                await until(lambda: snapshot_id(2) in control.completed, "it is completed")
                root = await here.parts.reader.root(snapshot_id(2), control.completed[snapshot_id(2)])
                assert set(base.shards.values()).isdisjoint(root.shards.values())
                for shard in base.shards.values():
                    assert (await here.parts.reader.stored_shard(root.shards[0])).base != shard
                assert await here.content(2) == bytes(content)
                assert control.failed == {}

    in_loop(check)


def test_the_same_task_again_goes_on_as_it_was(tmp_path: Path) -> None:
    async def check() -> None:
        async with shipping(tmp_path) as (here, _, content):
            stuck = _Stuck(here.store)
            async with _running(here) as control:
                control.say(ship=[here.task(1, 1)])
                await asyncio.wait_for(stuck.reached.wait(), LIMIT_S)
                heard = control.answers
                await until(lambda: control.answers > heard + 3, "it is said again")
                stuck.go_on.set()
                await until(lambda: snapshot_id(1) in control.completed, "it is completed")
                assert control.calls == 1
                assert len([key for key, _ in here.store.puts if key.startswith(SHARDS)]) == 1
            assert await here.content(1) == bytes(content)

    in_loop(check)


def test_a_store_that_another_cluster_owns_is_told_and_not_asked_all_the_time(tmp_path: Path) -> None:
    """A root that cannot be deleted is named with every heartbeat; and what is so is said once."""

    async def check() -> None:
        async with shipping(tmp_path) as (here, _, _):
            await here.ship(1, 1).run()
            async with _running(here) as control:
                await until(lambda: control.answers > 1, "it is heard")
                assert control.why == ""
                await here.parts.repository.take_over("another")
                with capture_logs() as logs:
                    control.say(drop=[snapshot_id(1)])
                    await until(lambda: "belongs to the cluster another" in control.why, "it is told why")
                    heard = control.answers
                    await until(lambda: control.answers > heard + 5, "it is heard some more")
                assert "belongs to the cluster another" in control.why
                said = [each for each in logs if each["log_level"] == "warning" and "snapshot" in each]
                assert len(said) == 1, "front-end and nodes may have something to say as well"
                await here.parts.repository.take_over(CLUSTER)
                await until(lambda: control.dropped == [snapshot_id(1)], "it is dropped")
                await until(lambda: control.why == "", "nothing is in its way")

    in_loop(check)


def test_a_deleted_snapshot_leaves_with_all_its_roots(tmp_path: Path) -> None:
    async def check() -> None:
        async with shipping(tmp_path) as (here, _, _):
            await here.ship(1, 1).run()
            await here.parts.snapshot(1, 8 * MIB, {})
            kept, _ = await here.parts.snapshot(2, 8 * MIB, {})
            async with _running(here) as control:
                control.say(drop=[snapshot_id(1)])
                await until(lambda: control.dropped == [snapshot_id(1)], "it is dropped")
            left = [info.key async for info in here.store.list(SNAPSHOTS)]
            assert len(left) == 1
            assert kept.snapshot in left[0]

    in_loop(check)
