"""One snapshot is shipped by two daemons: the root that control takes stays, whatever the other one does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from blockstore.errors import QuorumUnavailable
from snapshotd.layout import SHARDS, SNAPSHOTS
from snapshotd.object_store import Data
from tests.snapshot_parts import CountingStore, Parts, opened, snapshot_id
from tests.snapshotd_shipping import Shipping, shipping
from tests.stack import LIMIT_S, in_loop


class HeldStore(CountingStore):
    """`hold` is waited for before each put that may replace something, once its bytes are made."""

    hold: Callable[[str], Awaitable[None]] | None = None

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        if self.hold is not None and not if_absent:
            await self.hold(key)
        return await super().put(key, data, if_absent=if_absent)


@asynccontextmanager
async def _another_daemon(here: Shipping, directory: Path) -> AsyncIterator[tuple[Shipping, HeldStore]]:
    """A second daemon's parts over the same objects, for the same control."""
    store = HeldStore(here.store.inner)
    await asyncio.to_thread(directory.mkdir)
    (directory / "keyring").symlink_to(directory.parent / "keyring")
    async with opened(directory, store) as parts:
        other = Shipping(here.stack, parts, store)
        other.control = here.control
        yield other, store
        await other.channels.close()


def test_a_root_that_is_put_late_replaces_no_other(tmp_path: Path) -> None:
    """The first is held up between control's word that nobody completed it, and the put of its second root."""

    async def check() -> None:
        async with (
            shipping(tmp_path) as (here, _, content),
            _another_daemon(here, tmp_path / "late") as (late, store),
        ):
            reached, go_on = asyncio.Event(), asyncio.Event()

            async def hold(key: str) -> None:
                if key.startswith(SNAPSHOTS):
                    reached.set()
                    await go_on.wait()

            async def lose() -> None:
                async for info in here.store.list(SHARDS):
                    await here.store.delete(info.key)
                store.hold = hold

            here.control.before_complete = lose
            here.control.errors = [(False, QuorumUnavailable("control is away"))]
            shipped_late = asyncio.create_task(late.ship(1, 1).run())
            await asyncio.wait_for(reached.wait(), LIMIT_S)
            await here.ship(1, 1).run()
            taken = here.control.completed[snapshot_id(1)]
            go_on.set()
            await asyncio.wait_for(shipped_late, LIMIT_S)
            assert here.control.completed == {snapshot_id(1): taken}
            assert here.control.failed == {}
            fresh = Parts(here.parts.repository, late_state(tmp_path))
            here.parts = fresh
            assert await here.content(1) == bytes(content)

    in_loop(check)


def late_state(tmp_path: Path) -> Path:
    """The directory of a daemon that has seen nothing yet."""
    directory = tmp_path / "fresh"
    directory.mkdir()
    return directory
