"""A task that is cancelled ends: what closes a volume, a catch-up or a daemon cancels tasks and waits for them.

asyncio.wait_for of Python 3.11 returns its result instead where that came in the same moment, so that the task
goes on, and who waits for its end waits for ever. asyncio.timeout does not.
"""

import ast
import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockstore.domain import ReplicaAddress, ReplicaId, SegmentNumber, VolumeId
from blockstore.volume.member_link import MemberLink

ROOT = Path(__file__).parent.parent


class _Channel:
    """One that becomes ready when it is told."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()

    def get_state(self, try_to_connect: bool) -> grpc.ChannelConnectivity:
        return grpc.ChannelConnectivity.READY if self.ready.is_set() else grpc.ChannelConnectivity.CONNECTING

    async def wait_for_state_change(self, _: grpc.ChannelConnectivity) -> None:
        await self.ready.wait()


@pytest.mark.parametrize("steps", range(6))
def test_a_link_whose_member_answers_as_it_is_cancelled(steps: int) -> None:
    async def run() -> None:
        channel = _Channel()
        address = ReplicaAddress(VolumeId("v"), SegmentNumber(0), ReplicaId("r"))
        nothing: Any = None
        link = MemberLink(address, nothing, nothing, 10.0)

        async def connect_and_stay() -> None:
            await link._reach(channel, "the member")  # type: ignore[arg-type]
            await asyncio.Event().wait()

        task = asyncio.create_task(connect_and_stay())
        for _ in range(3):
            await asyncio.sleep(0)
        channel.ready.set()
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(60):
            await asyncio.wait({task})
        assert task.cancelled()

    asyncio.run(run())


def test_nobody_uses_what_loses_a_cancellation() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("blockstore", "nbd_server", "snapshotd")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "asyncio.wait_for"
    ]
    assert found == []
