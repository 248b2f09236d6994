"""A replica's tables, read by another process than the one that has them, while that one goes on, or dies."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from blockstore.domain import ORIGIN, Position, TablesPlace
from blockstore.errors import CairnError, Corrupt
from blockstore.log import Filling, LogImage
from blockstore.storage.fence import NO_EPOCH, Fence, this_host
from blockstore.storage.node_store import NodeStore
from blockstore.storage.replica_store import ReplicaStore
from blockstore.storage.shared_tables import SharedTables
from blockstore.storage.tables import FILE_NAME, INITIAL_MAP_BYTES, lock_of, replacement_of
from blockstore.units import BLOCK_SIZE, Epoch, Sequence
from tests.storage_crash import BLOCKS, story
from tests.storage_model import EPOCH, Log, address, apply, block, new_store, position, write
from tests.table_flips import flip

ROOT = Path(__file__).parent.parent
#: LMDB opens an environment once in a process: who reads beside the store is another one.
ASKED = """
import sys
from pathlib import Path
from blockstore.domain import Position, TablesPlace
from blockstore.errors import CairnError
from blockstore.storage.shared_tables import SharedTables
directory, device, inode, epoch = sys.argv[1], *map(int, sys.argv[2:5])
try:
    tables = SharedTables(TablesPlace("", directory, (device, inode)), epoch)
except CairnError as error:
    print("not opened:", error, flush=True)
    sys.exit()
print("opened", flush=True)
for line in sys.stdin:
    start, count, of_epoch, sequence = map(int, line.split())
    try:
        found = tables.read(start, count, Position(of_epoch, sequence))
    except CairnError as error:
        print("Corrupt", error, flush=True)
    else:
        print("None" if found is None else bytes(found).hex(), tables.is_current, flush=True)
"""


def raised(directory: Path) -> Fence:
    """As a node has it that was sealed by EPOCH."""
    fence = Fence(directory)
    fence.put(EPOCH)
    return fence


class Reader:
    """The other process."""

    def __init__(self, directory: Path, fence: Fence, epoch: int = EPOCH) -> None:
        arguments = [str(directory), *map(str, fence.identity), str(epoch)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", ASKED, *arguments],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said = self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def read(self, start: int, count: int, needed: Position) -> bytes | None:
        """Raises Corrupt."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{start} {count} {needed.epoch} {needed.sequence}\n")
        self._process.stdin.flush()
        found, current = self._line().split(maxsplit=1)
        if found == "Corrupt":
            raise Corrupt(current)
        self.is_current = current == "True"
        return None if found == "None" else bytes.fromhex(found)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[tuple[ReplicaStore, Log, Fence]]:
    store = new_store(tmp_path)
    with closing(store), closing(raised(tmp_path)) as fence:
        yield store, Log(), fence


Parts = tuple[ReplicaStore, Log, Fence]


@contextmanager
def reader_of(parts: Parts, epoch: int = EPOCH) -> Iterator[Reader]:
    with closing(Reader(parts[0].directory, parts[2], epoch)) as reader:
        yield reader


def test_it_shows_what_is_checkpointed_and_only_where_that_is_enough(parts: Parts) -> None:
    store, log, _ = parts
    apply(store, log, [log.record(write(0, block(1), block(2)))])
    with reader_of(parts) as reader:
        assert reader.said == "opened"
        assert reader.read(0, 3, position(1)) == log.content(0, 3)
        assert reader.read(0, 1, position(2)) is None
        assert reader.read(0, 1, Position(Epoch(2), Sequence(0))) is None
        store.commit([log.record(write(0, block(3)))])
        assert reader.read(0, 1, position(1)) == block(1)
        store.checkpoint(log.image(), 0)
        assert reader.read(0, 1, position(2)) == block(3)


def test_another_epoch_at_the_fence_ends_it(parts: Parts) -> None:
    store, log, fence = parts
    apply(store, log, [log.record(write(0, block(1)))])
    with reader_of(parts) as reader:
        assert reader.read(0, 1, ORIGIN) == block(1)
        for other in (EPOCH + 1, 0, NO_EPOCH):
            fence.put(other)
            assert reader.read(0, 1, ORIGIN) is None
        fence.put(EPOCH)
        assert reader.read(0, 1, ORIGIN) == block(1)


def test_a_filling_replica_shows_nothing(parts: Parts) -> None:
    store, log, _ = parts
    apply(store, log, [log.record(write(0, block(1)))])
    with reader_of(parts) as reader:
        filling = replace(log.image(), filling=Filling(position(9), position(1), Sequence(1)))
        store.checkpoint(filling, 0)
        assert reader.read(0, 1, ORIGIN) is None


def test_tables_with_a_source_behind_them_show_nothing(tmp_path: Path) -> None:
    store, log = new_store(tmp_path, source=b"snap"), Log()
    with closing(store), closing(raised(tmp_path)) as fence:
        apply(store, log, [log.record(write(0, block(1)))])
        with reader_of((store, log, fence)) as reader:
            assert reader.read(0, 1, ORIGIN) is None


def test_a_map_that_grows_is_followed(parts: Parts) -> None:
    store, log, _ = parts
    apply(store, log, [log.record(write(0, block(1)))])
    with reader_of(parts) as reader:
        assert reader.read(0, 1, ORIGIN) == block(1)
        run = [block(i) for i in range(256)]
        for start in range(256, 256 + 2 * INITIAL_MAP_BYTES // BLOCK_SIZE, 256):
            store.commit([log.record(write(start, *run))])
        store.checkpoint(log.image(), 0)
        assert reader.read(start, 256, position(log.sequence)) == b"".join(run)


def test_it_notices_that_the_tables_were_replaced(parts: Parts) -> None:
    store, log, _ = parts
    apply(store, log, [log.record(write(0, block(1)))])
    with reader_of(parts) as reader:
        assert reader.read(0, 1, ORIGIN) == block(1)
        assert reader.is_current
        assert store.compact()
        apply(store, log, [log.record(write(0, block(2)))])
        assert reader.read(0, 1, position(1)) == block(1)  # as of what it reflects
        assert not reader.is_current
        assert reader.read(0, 1, position(2)) is None
    with reader_of(parts) as reader:
        assert reader.read(0, 1, position(2)) == block(2)


def test_nothing_is_opened_while_the_tables_are_being_replaced(parts: Parts) -> None:
    store = parts[0]
    half = lock_of(replacement_of(store.directory / FILE_NAME))
    half.touch()
    with reader_of(parts) as reader:
        assert "being replaced" in reader.said
    half.unlink()
    with reader_of(parts) as reader:
        assert reader.said == "opened"


def test_another_directory_than_the_nodes_is_not_opened(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    with closing(new_store(other)), closing(raised(other)), closing(Reader(other, parts[2])) as reader:
        assert "another one than the node's" in reader.said
    with closing(Reader(other / "missing", parts[2])) as reader:
        assert reader.said.startswith("not opened")


def test_a_damaged_block_is_told(parts: Parts) -> None:
    store, log, _ = parts
    apply(store, log, [log.record(write(0, block(1)))])
    flip(store.directory / FILE_NAME, block(1)[:4080], 100)
    with reader_of(parts) as reader, pytest.raises(Corrupt):
        reader.read(0, 1, ORIGIN)


def test_this_process_has_no_second_environment(parts: Parts) -> None:
    """A node and a front-end in one process, as tests have them: the reads go to the node."""
    store, _, fence = parts
    with pytest.raises(CairnError):
        SharedTables(TablesPlace(this_host(), str(store.directory), fence.identity), EPOCH)


# ---- the store lets readers finish, and no longer


@contextmanager
def holding(store: ReplicaStore, fence: Fence) -> Iterator[subprocess.Popen[str]]:
    """Another process inside a read."""
    arguments = [str(store.directory), *map(str, fence.identity)]
    holder = subprocess.Popen(
        [sys.executable, "-m", "tests.tables_holder", *arguments],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "inside\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def overwrite(store: ReplicaStore, log: Log, times: int) -> None:
    """64 blocks, in a checkpoint of their own each time."""
    for i in range(times):
        apply(store, log, [log.record(write(0, *[block(i + 1)] * 64))])


@pytest.mark.parametrize("compacted", [False, True])
def test_a_reader_keeps_what_it_has_begun_to_read(parts: Parts, *, compacted: bool) -> None:
    """Also behind a compaction: it shares the lock file of the new tables, or pages under it would be used again."""
    store, log, fence = parts
    overwrite(store, log, 1)
    if compacted:
        assert store.compact()
    with holding(store, fence) as holder:
        overwrite(store, log, 30)
        shown, _ = holder.communicate("look\n", timeout=60)
    assert shown.strip() == block(1)[:8].hex()


def test_a_reader_that_is_killed_keeps_no_pages(parts: Parts) -> None:
    store, log, fence = parts
    overwrite(store, log, 10)
    with holding(store, fence):
        pass
    before = store.file_bytes()
    overwrite(store, log, 40)
    assert store.file_bytes() <= 2 * before


# ---- whatever becomes of who writes

#: Dies as a process does that is killed in the last step of a commit: the new meta page is written, and the number of
#: its transaction, which readers go by, is not (in LMDB 0.9's lock file at byte 48).
DYING = """
import os, signal, sys, lmdb
environment = lmdb.open(sys.argv[1], subdir=False, max_dbs=6)
transaction = environment.begin(write=True)
with open(sys.argv[1] + "-lock", "r+b", buffering=0) as lock:
    lock.seek(48)
    newest = int.from_bytes(lock.read(8), "little")
    assert newest == environment.info()["last_txnid"]
    lock.seek(48)
    lock.write((newest - 1).to_bytes(8, "little"))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_start_beside_a_reader_finds_the_last_commit_of_a_process_that_was_killed(parts: Parts) -> None:
    store, log, _ = parts
    apply(store, log, [log.record(write(0, block(1)))])
    apply(store, log, [log.record(write(0, block(2)))])
    with reader_of(parts):  # without one the lock file is made anew
        store.close()
        path = store.directory / FILE_NAME
        died = subprocess.run([sys.executable, "-c", DYING, path], cwd=ROOT, timeout=60, check=False)
        assert died.returncode == -signal.SIGKILL
        with closing(ReplicaStore.open(store.directory)) as again:
            assert again.applied == position(2)
            assert again.read(0, 1) == block(2)


#: Compacts, takes a checkpoint in between, and dies after the tables were renamed and before their lock file was.
DYING_BETWEEN_RENAMES = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from blockstore.storage import tables
from blockstore.storage.node_store import NodeStore
from blockstore.storage.replica_store import ReplicaStore
store = ReplicaStore.open(Path(sys.argv[1]))
copy, rename = store._tables.copy_compacted, os.replace
def copied(target):
    copy(target)
    store.checkpoint(replace(store.image, epoch=9), 99)
def renamed(old, new):
    rename(old, new)
    os.kill(os.getpid(), signal.SIGKILL)
store._tables.copy_compacted, tables.os.replace = copied, renamed
store.compact()
"""


@pytest.mark.parametrize("transactions", [20, 21])  # LMDB has two meta pages, used in turn
@pytest.mark.parametrize("read_beside", [False, True])
def test_a_process_that_dies_while_it_replaces_the_tables_loses_nothing(
    parts: Parts, transactions: int, *, read_beside: bool
) -> None:
    """Somebody has the old tables open, and with them the lock file that the new ones find."""
    store, log, _ = parts
    for i in range(transactions):
        apply(store, log, [log.record(write(i, block(i)))])
    with ExitStack() as stack:
        if read_beside:
            assert stack.enter_context(reader_of(parts)).said == "opened"
        store.close()
        command = [sys.executable, "-c", DYING_BETWEEN_RENAMES, str(store.directory)]
        assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == -signal.SIGKILL
        with closing(ReplicaStore.open(store.directory)) as again:
            assert (again.mark, again.image.epoch) == (99, 9)
            assert again.read(0, transactions) == log.content(0, transactions)


def test_a_node_that_starts_lets_nothing_count_that_is_read_before_the_next_seal(tmp_path: Path) -> None:
    replica = address().replica
    with closing(NodeStore.open(tmp_path)) as node:
        node.create_replica(address(), LogImage()).close()
        directory = tmp_path / "replicas" / replica
        raised(directory).close()
    fence = directory / "fence"
    assert int.from_bytes(fence.read_bytes(), "little") == EPOCH
    NodeStore.open(tmp_path).close()
    assert int.from_bytes(fence.read_bytes(), "little") == NO_EPOCH


def test_reads_show_one_state_while_the_writer_is_killed_again_and_again(tmp_path: Path) -> None:
    """It checkpoints, merges and compacts; what is read is compared with the same story, at what the read reflects."""
    new_store(tmp_path).close()
    chance = random.Random(7)
    log = Log()
    expected = story(log)
    states = 0
    with ExitStack() as stack:
        fence = stack.enter_context(closing(raised(tmp_path)))
        place = TablesPlace(this_host(), str(tmp_path), fence.identity)
        for life in range(6):
            writer = subprocess.Popen(
                [sys.executable, "-m", "tests.storage_crash", str(tmp_path)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(writer.communicate)
            stack.callback(writer.kill)
            assert writer.stdout is not None
            acknowledged = int(writer.stdout.readline())
            kill_at = time.monotonic() + chance.random()
            tables: SharedTables | None = None
            while writer.poll() is None:
                if time.monotonic() > kill_at:
                    os.kill(writer.pid, signal.SIGKILL)
                    writer.wait()
                if tables is None or not tables.is_current:
                    if tables is not None:
                        tables.close()
                    tables = opened(place)
                    continue
                start = chance.randrange(BLOCKS - 64)
                before = tables.applied
                found = tables.read(start, 64, position(min(acknowledged, 1)))
                assert found is not None
                states += tables.applied != before
                while log.sequence < tables.applied.sequence:
                    next(expected)
                assert tables.applied.sequence == log.sequence, "it went back"
                assert bytes(found) == log.content(start, 64), (life, tables.applied)
            if tables is not None:
                tables.close()
    assert states > 6
    assert log.sequence > 300, "no compaction came"


def opened(place: TablesPlace) -> SharedTables | None:
    """None where they were being replaced just then."""
    try:
        return SharedTables(place, EPOCH)
    except CairnError:
        return None
