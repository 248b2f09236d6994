"""Time limits, retries and the throttle, without a server: what they count, and when they give up; in virtual time."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from blockstore.errors import Corrupt, InvalidRequest, NotFound, QuorumUnavailable
from blockstore.units import MIB
from snapshotd import retrying, throttle
from snapshotd.memory_store import MemoryStore
from snapshotd.object_store import Data, ObjectInfo
from snapshotd.retrying import Retrying, RetryLimits
from snapshotd.throttle import Throttled, TokenBucket
from tests.virtual_time import in_virtual_time

NEVER = 3600.0


class LoopClock:
    """In the place of the module `time`: the clock of the event loop."""

    @staticmethod
    def monotonic() -> float:
        return asyncio.get_running_loop().time()


@pytest.fixture(autouse=True)
def loop_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (retrying, throttle):
        monkeypatch.setattr(module, "time", LoopClock)


class Ailing(MemoryStore):
    """Fails as it is told: `ills` holds what befalls the next calls. calls: how many came."""

    def __init__(self) -> None:
        super().__init__()
        self.ills: list[Callable[[], None] | float] = []
        self.calls = 0

    async def _suffer(self) -> None:
        self.calls += 1
        if self.ills:
            ill = self.ills.pop(0)
            if isinstance(ill, float):
                await asyncio.sleep(ill)
            else:
                ill()

    async def get(self, key: str) -> bytes:
        await self._suffer()
        return await super().get(key)

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        await self._suffer()
        return await super().put(key, data, if_absent=if_absent)

    async def list(self, prefix: str = "", *, after: str = "") -> AsyncIterator[ObjectInfo]:
        await self._suffer()
        async for info in super().list(prefix, after=after):
            yield info
            if info.key.endswith("7"):
                await self._suffer()


def unanswered() -> None:
    raise QuorumUnavailable("503 SlowDown")


def limits(**changed: float) -> RetryLimits:
    told = {"request_s": 0.2, "retries": 5, "total_s": 2.0, **changed}
    return RetryLimits(told["request_s"], int(told["retries"]), told["total_s"])


def no_pause(low: float, high: float) -> float:
    return 0.0


def test_what_is_no_lack_of_an_answer_is_not_tried_again() -> None:
    async def main() -> None:
        for error in (NotFound("x"), Corrupt("x"), InvalidRequest("x"), ValueError("x")):
            inner = Ailing()

            def fail(error: Exception = error) -> None:
                raise error

            inner.ills = [fail]
            with pytest.raises(type(error)):
                await Retrying(inner, limits()).get("x")
            assert inner.calls == 1

    in_virtual_time(main)


def test_pauses_are_of_random_length_up_to_a_growing_bound() -> None:
    bounds: list[tuple[float, float]] = []

    def chance(low: float, high: float) -> float:
        bounds.append((low, high))
        return 0.0

    async def main() -> None:
        inner = Ailing()
        inner.ills = [unanswered] * 100
        with pytest.raises(QuorumUnavailable, match=r"get x was tried 10 times .* 503 SlowDown"):
            await Retrying(inner, limits(retries=9), chance=chance).get("x")
        assert inner.calls == 10

    in_virtual_time(main)
    assert bounds == [(0, min(5.0, 0.1 * 2**number)) for number in range(10)]


def test_no_try_begins_after_the_limit() -> None:
    async def main() -> None:
        inner = Ailing()
        inner.ills = [NEVER] * 1000
        began = asyncio.get_running_loop().time()
        with pytest.raises(QuorumUnavailable, match=r"no answer in 0\.1 s"):
            await Retrying(inner, limits(request_s=0.1, retries=1000, total_s=0.55), chance=no_pause).put("x", b"")
        assert 0.55 < asyncio.get_running_loop().time() - began < 0.7
        assert inner.calls == 6

    in_virtual_time(main)


def test_a_body_has_time_by_its_size() -> None:
    async def main() -> None:
        inner = Ailing()
        store = Retrying(inner, limits(request_s=0.1, retries=0))
        inner.ills = [0.6, 0.6]
        assert await store.put("large", bytes(4 * MIB)) is True
        with pytest.raises(QuorumUnavailable):
            await store.put("small", b"x")

    in_virtual_time(main)


@pytest.mark.parametrize("content", [b"mine", b"theirs"])
def test_a_conditional_put_that_was_tried_again_looks_at_what_is_there(content: bytes) -> None:
    """Its first try may have come through before somebody else's."""

    async def main() -> None:
        inner = Ailing()

        def stored_and_lost() -> None:
            inner._objects["x"] = content
            raise QuorumUnavailable("lost")

        inner.ills = [stored_and_lost]
        assert await Retrying(inner, limits(), chance=no_pause).put("x", b"mine", if_absent=True) is (
            content == b"mine"
        )
        assert await Retrying(inner, limits()).put("x", content, if_absent=True) is False

    in_virtual_time(main)


def test_a_listing_gives_every_key_once_however_often_it_breaks() -> None:
    async def main() -> None:
        inner = Ailing()
        keys = [f"x/{number:04d}" for number in range(3000)]
        for key in keys:
            await inner.put(key, b"")
        inner.ills = [unanswered, lambda: None, unanswered, *[lambda: None] * 120, unanswered, unanswered, NEVER]
        store = Retrying(inner, limits(retries=20, total_s=10), chance=no_pause)
        assert [info.key async for info in store.list("x")] == keys
        assert inner.ills == []

    in_virtual_time(main)


def test_a_cancelled_call_is_not_tried_again() -> None:
    async def main() -> None:
        inner = Ailing()
        inner.ills = [NEVER] * 10
        task = asyncio.ensure_future(Retrying(inner, limits(request_s=NEVER)).get("x"))
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert inner.calls == 1

    in_virtual_time(main)


def test_a_bucket_is_shared() -> None:
    async def main() -> None:
        began = asyncio.get_running_loop().time()
        bucket = TokenBucket(4 * MIB)
        await asyncio.gather(*(bucket.take(MIB // 4) for _ in range(12)))
        # Each waits for those before it, less what was saved up at most: 2.75 MiB less 1 MiB.
        assert 0.4 < asyncio.get_running_loop().time() - began < 10

    in_virtual_time(main)


def test_no_rate_is_no_bound() -> None:
    async def main() -> None:
        bucket = TokenBucket()
        await asyncio.wait_for(asyncio.gather(*(bucket.take(1 << 40) for _ in range(100))), 10)
        bucket.set_rate(1)
        await bucket.take(1)

    in_virtual_time(main)


def test_a_new_rate_holds_for_those_that_wait() -> None:
    async def main() -> None:
        bucket = TokenBucket(10)
        await bucket.take(100_000)
        waiting = asyncio.ensure_future(bucket.take(1))
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done
        bucket.set_rate(MIB)
        await asyncio.wait_for(waiting, 10)
        bucket.set_rate(1)
        await bucket.take(1_000_000)
        waiting = asyncio.ensure_future(bucket.take(1))
        bucket.set_rate(0)
        await asyncio.wait_for(waiting, 10)

    in_virtual_time(main)


def test_who_is_cancelled_while_it_waits_takes_nothing() -> None:
    async def main() -> None:
        bucket = TokenBucket(1000)
        await bucket.take(200)
        waiting = asyncio.ensure_future(bucket.take(1 << 40))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait_for(bucket.take(1), 10)

    in_virtual_time(main)


@pytest.mark.parametrize("rate", [-1, float("inf"), float("nan")])
def test_what_is_no_rate_is_refused(rate: float) -> None:
    async def main() -> None:
        with pytest.raises(InvalidRequest, match="no rate"):
            TokenBucket(rate)

    in_virtual_time(main)


def test_each_direction_has_its_own_rate() -> None:
    async def main() -> None:
        began = asyncio.get_running_loop().time()
        store = Throttled(MemoryStore(), up=TokenBucket(MIB))
        for number in range(4):
            await store.put(f"x/{number}", bytes(MIB // 4))
        assert 0.4 < asyncio.get_running_loop().time() - began < 10
        for _ in range(1000):  # 500 s at the other rate
            await store.get("x/0")
            await store.get_range("x/0", 0, MIB // 4)
        began = asyncio.get_running_loop().time()
        slow = Throttled(store, down=TokenBucket(MIB))
        for _ in range(2):
            await slow.get("x/0")
            await slow.get_range("x/0", 0, MIB // 4)
        assert 0.4 < asyncio.get_running_loop().time() - began < 10

    in_virtual_time(main)
