"""A node's directory replaced by an older copy of itself, with no control to say so: the other nodes know."""

import os
import shutil
from pathlib import Path

from blockstore.units import BLOCK_SIZE, MIB
from tests.stack import in_loop, running_stack, until

SIZE = 32 * MIB


def test_an_old_copy_that_answered_first_is_sealed_again_and_filled(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            await volume.write(7, b"o" * BLOCK_SIZE)
            await stack.until_all_whole(volume)
            await stack.stop_node(1)
            shutil.copytree(tmp_path / "node1", tmp_path / "old")
            await stack.start_node(1)
            await stack.until_all_whole(volume)
            content = os.urandom(BLOCK_SIZE)
            await volume.write(7, content)
            await stack.until_all_whole(volume)
            acked = volume.status().end
            known = (stack.hosted(0).follower, stack.hosted(2).follower)
            await until(
                lambda: all(dict(each.image().known).get(stack.replicas[1]) == acked for each in known), "they are told"
            )
            await volume.close()
            for index in range(3):
                await stack.stop_node(index)
            shutil.rmtree(tmp_path / "node1")
            shutil.move(tmp_path / "old", tmp_path / "node1")
            await stack.start_node(1)
            volume = await stack.open(SIZE, served=False)
            await until(lambda: volume.status().members[1].sealed, "the old copy answers")
            assert volume.status().members[1].whole
            await stack.start_node(0)
            await until(lambda: not volume.status().members[1].whole, "its answer is not believed any more")
            await until(lambda: stack.hosted(1).follower.filling is not None, "it knows that itself")
            assert not volume.status().serving, "two of three, and one of them may have acked anything"
            await stack.start_node(2)
            await stack.until_all_whole(volume)
            await volume.wait_until_served()
            for _ in range(48):  # every member has its turn, sixteen reads long
                assert await volume.read(7, 1) == content

    in_loop(test)
