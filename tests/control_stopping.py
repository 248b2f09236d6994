"""Some work, done by a control that is stopped at each of its steps in turn."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import grpc

from blockstore.errors import CairnError
from tests.control_cluster import Cluster, Control
from tests.control_crashing import CrashPoints
from tests.patient_time import run_patiently

_AT_ONCE: Final = 4
Work = Callable[[Control], Awaitable[object]]


async def stop_at(cluster: Cluster, work: Work, point: int) -> bool:
    """Do `work` with a control that stops at its `point`th step. False where it has fewer."""
    points = CrashPoints()
    async with cluster.control(points) as control:
        points.passed, points.stop_at = 0, point
        doing = asyncio.ensure_future(work(control))
        stopped = asyncio.ensure_future(points.stopped.wait())
        await asyncio.wait([doing, stopped], return_when=asyncio.FIRST_COMPLETED)
        reached = points.stopped.is_set()
        if reached:
            # Dead: nothing moves, whoever beats. What it has sent already may still arrive.
            points.stop_at = points.passed
        stopped.cancel()
        if reached:
            doing.cancel()
        with suppress(asyncio.CancelledError, CairnError, grpc.RpcError):
            await doing
    return reached


def at_every_point(directory: Path, one: Callable[[Path, int], Awaitable[bool]], most: int) -> None:
    """`one` for the points 1, 2, ... in directories of their own, until it says that the work has fewer steps.

    Some at once, as most of each is waiting. most: fails where so many are not enough.
    """

    async def all_points() -> None:
        for first in range(1, most, _AT_ONCE):
            points = range(first, first + _AT_ONCE)
            reached = await asyncio.gather(*(one(directory / str(point), point) for point in points))
            if not all(reached):
                assert points[reached.index(False)] > 4, "the work has hardly a step"
                return
        raise AssertionError("the work never ends")

    run_patiently(all_points())
