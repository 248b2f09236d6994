"""A node finds damage by itself, has it mended by its peers, and keeps its files small."""

import os
from pathlib import Path

from blockstore.units import BLOCK_SIZE, MIB
from tests.stack import in_loop, running_stack, until

SIZE = 32 * MIB


def damage(path: Path, content: bytes) -> None:
    """Flip a byte in the one place of the file where `content` stands."""
    data = path.read_bytes()
    assert data.count(content) == 1
    at = data.index(content) + 100
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))
        os.fsync(file.fileno())


def test_a_damaged_block_is_never_shown_and_is_mended_from_a_peer(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            content = os.urandom(BLOCK_SIZE)
            await volume.write(77, content)
            await stack.until_all_whole(volume)
            await until(lambda: stack.hosted(1).follower.commit == volume.status().commit, "the commit arrives")
            await stack.hosted(1).checkpoint()
            damage(next((tmp_path / "node1").rglob("tables.mdb")), content[:4080])
            for _ in range(48):  # every member has its turn, sixteen reads long
                assert await volume.read(77, 1) == content
            await until(lambda: not damaged(stack.hosted(1)), "the block is mended")

    def damaged(hosted: object) -> bool:
        try:
            hosted.store.read(77, 1)  # type: ignore[attr-defined]
        except Exception:
            return True
        return False

    in_loop(test)


def test_scrub_finds_what_nobody_reads(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, scrub_s=1, upkeep_s=0.1) as stack:
            volume = await stack.open(SIZE)
            content = os.urandom(BLOCK_SIZE)
            await volume.write(5, content)
            await stack.until_all_whole(volume)
            await until(lambda: stack.hosted(2).follower.commit == volume.status().commit, "the commit arrives")
            await stack.hosted(2).checkpoint()
            damage(next((tmp_path / "node2").rglob("tables.mdb")), content[:4080])
            await until(lambda: stack.repaired(2) == 1, "scrub has the block mended")
            assert stack.hosted(2).store.read(5, 1) == content

    in_loop(test)


def test_trimmed_space_goes_back_to_the_file_system(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, upkeep_s=0.2, checkpoint_s=0.2) as stack:
            volume = await stack.open(256 * MIB)
            for at in range(0, 128 * MIB // BLOCK_SIZE, MIB // BLOCK_SIZE):
                await volume.write(at, os.urandom(MIB))
            store = stack.hosted(0).store
            await until(lambda: store.file_bytes() > 128 * MIB and not store.unapplied_bytes, "all is in the tables")
            await volume.trim(0, 256 * MIB // BLOCK_SIZE)
            await volume.write(0, b"x" * BLOCK_SIZE)
            await until(lambda: store.file_bytes() < 8 * MIB, "the file is small again")
            assert await volume.read(0, 2) == b"x" * BLOCK_SIZE + bytes(BLOCK_SIZE)

    in_loop(test)
