"""What a follower asks for is carried out in its order, also where the tables fail meanwhile."""

import asyncio
import threading
from pathlib import Path

import pytest

from blockstore.errors import NoSpace
from blockstore.log import LogImage
from blockstore.node.hosted_replica import AnswerMessage
from blockstore.replication.messages import Answer, FencedBy, ResetLog
from blockstore.units import BLOCK_SIZE, MIB, Epoch
from tests.stack import LIMIT_S, in_loop, running_stack, until

SIZE = 16 * MIB


class Inbox:
    def __init__(self) -> None:
        self.messages: list[AnswerMessage] = []

    def deliver(self, message: AnswerMessage) -> None:
        self.messages.append(message)


def test_what_waited_for_a_checkpoint_follows_also_where_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next checkpoint's image would state records that the tables were never given."""
    entered, full = threading.Event(), threading.Event()

    def finds_no_room(image: LogImage, mark: int) -> None:
        entered.set()
        full.wait(LIMIT_S)
        raise NoSpace("the disk is full")

    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            await volume.write(0, b"x" * BLOCK_SIZE)
            hosted, inbox = stack.hosted(0), Inbox()
            with monkeypatch.context() as patched:
                patched.setattr(hosted.store, "checkpoint", finds_no_room)
                checkpoint = asyncio.create_task(hosted.checkpoint())
                await until(entered.is_set, "the checkpoint has begun")
                message = FencedBy(Epoch(9), 1)
                hosted.carry_out([ResetLog(), Answer(inbox, message)])
                assert inbox.messages == []
                full.set()
                with pytest.raises(NoSpace):
                    await checkpoint
                assert inbox.messages == [message]

    in_loop(test)


def test_a_checkpoint_that_failed_is_due_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finds_no_room(image: LogImage, mark: int) -> None:
        raise NoSpace("the disk is full")

    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=60) as stack:
            volume = await stack.open(SIZE)
            await volume.write(0, b"x" * BLOCK_SIZE)
            hosted = stack.hosted(0)
            await stack.until_all_whole(volume)
            await until(lambda: hosted.follower.commit == volume.status().commit, "all is committed here")
            since = hosted.dirty_since
            assert since is not None
            with monkeypatch.context() as patched:
                patched.setattr(hosted.store, "checkpoint", finds_no_room)
                with pytest.raises(NoSpace):
                    await hosted.checkpoint()
            assert hosted.dirty_since == since
            await hosted.checkpoint()
            assert hosted.dirty_since is None

    in_loop(test)


def test_a_deletion_whose_caller_hangs_up_goes_on_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the directory stayed, with nobody to answer for it, and pinned the journal until the next start."""
    entered, go_on = threading.Event(), threading.Event()

    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            await volume.write(0, b"x" * BLOCK_SIZE)
            hosted, node = stack.hosted(0), stack._nodes[0].node
            close = hosted.store.close

            def waits() -> None:
                entered.set()
                go_on.wait(LIMIT_S)
                close()

            monkeypatch.setattr(hosted.store, "close", waits)
            deletion = asyncio.create_task(node.delete(hosted.address))
            await until(entered.is_set, "the deletion has begun")
            deletion.cancel()
            with pytest.raises(asyncio.CancelledError):
                await deletion
            go_on.set()
            directory = hosted.store.directory
            await until(lambda: not directory.exists(), "the directory is gone")
            await until(lambda: hosted.replica in node.journal._forgotten, "the journal has forgotten it")

    in_loop(test)
