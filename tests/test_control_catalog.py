"""The catalog of volumes: what several change at once."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from blockstore.control.catalog import Catalog
from blockstore.control.metastore.embedded import open_embedded
from blockstore.control.records import MovePlan, PlannedMove
from blockstore.domain import NodeId, ReplicaId, SegmentNumber, VolumeId


def test_of_two_changes_of_the_plan_of_moves_none_is_lost(tmp_path: Path) -> None:
    """A rebalancing that is asked for while a pass strikes out what has begun."""
    planned = [
        PlannedMove(VolumeId(f"vol-{n}"), SegmentNumber(0), ReplicaId(f"rep-{n}"), NodeId(""), "load") for n in range(8)
    ]

    def with_one_more(move: PlannedMove) -> Callable[[MovePlan], MovePlan]:
        return lambda now: MovePlan((*now.moves, move))

    async def scenario() -> None:
        store = open_embedded(tmp_path)
        catalog = Catalog(store)
        await catalog.change_moves(lambda now: MovePlan(tuple(planned[:4])))
        await asyncio.gather(
            catalog.change_moves(lambda now: MovePlan(tuple(move for move in now.moves if move != planned[0]))),
            *(catalog.change_moves(with_one_more(move)) for move in planned[4:]),
        )
        assert set((await catalog.moves()).moves) == set(planned[1:])
        await store.close()

    asyncio.run(scenario())
