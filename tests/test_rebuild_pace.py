"""How fast replicas are filled: the limit on a node, and what control makes of what it hears."""

import asyncio

from blockstore.control.rebuilds import Rebuilds
from blockstore.domain import ReplicaId
from blockstore.rate_limit import RateLimit
from blockstore.rpc import control_pb2
from blockstore.units import MIB
from tests.virtual_time import in_virtual_time

REPLICA = ReplicaId("rep-1")


def said(done: int, total: int = 100, *, whole: bool = False) -> control_pb2.MemberReport:
    return control_pb2.MemberReport(replica=REPLICA, whole=whole, extents_done=done, extents_total=total)


def test_time_left_follows_from_the_last_seconds() -> None:
    rebuilds = Rebuilds()
    assert rebuilds.of(REPLICA).seconds_left == 0
    for second in range(5):
        rebuilds.learn(said(10 * second), second)
    assert rebuilds.of(REPLICA).rate_bytes == 10 * MIB
    assert rebuilds.of(REPLICA).seconds_left == 6
    for second in range(5, 30):
        rebuilds.learn(said(40 + (second - 4)), second)
    assert rebuilds.of(REPLICA).rate_bytes == MIB  # what was earlier is forgotten


def test_a_copy_that_begins_anew_and_one_that_is_done_are_told_apart() -> None:
    rebuilds = Rebuilds()
    rebuilds.learn(said(50), 0)
    rebuilds.learn(said(60), 1)
    rebuilds.learn(said(1), 2)
    assert rebuilds.of(REPLICA).rate_bytes == 0
    rebuilds.learn(said(3), 3)
    assert rebuilds.of(REPLICA).rate_bytes == 2 * MIB
    rebuilds.learn(said(100, whole=True), 4)
    assert rebuilds.of(REPLICA).rate_bytes == 0


def test_who_is_not_spoken_of_is_forgotten() -> None:
    rebuilds = Rebuilds()
    rebuilds.learn(said(1), 0)
    rebuilds.learn(said(2), 1)
    rebuilds.forget_silent(100)
    assert rebuilds.of(REPLICA).rate_bytes == 0


def test_a_node_takes_in_no_more_than_it_was_told() -> None:
    async def copy() -> None:
        rate, loop = RateLimit(), asyncio.get_running_loop()
        rate.set(MIB)
        began = loop.time()
        for _ in range(10):
            await rate.after(MIB)
        assert 9 <= loop.time() - began <= 10
        rate.set(0)
        began = loop.time()
        await rate.after(100 * MIB)
        assert loop.time() == began

    in_virtual_time(copy)


def test_who_waits_for_a_slow_rate_goes_on_when_it_is_lifted() -> None:
    async def copy() -> None:
        rate, loop = RateLimit(), asyncio.get_running_loop()
        rate.set(MIB)
        waiting = asyncio.ensure_future(rate.after(3600 * MIB))
        await asyncio.sleep(5)
        began = loop.time()
        rate.set(0)
        await waiting
        assert loop.time() == began

    in_virtual_time(copy)
