"""A front-end beside its nodes: it reads their tables by itself, never less than the truth, and dies of none twice."""

import asyncio
import dataclasses
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from blockstore.config import FrontEndSettings, ShortCircuitMode
from blockstore.storage.tables import FILE_NAME, PAGE_SIZE
from blockstore.units import BLOCK_SIZE, MIB
from nbd_server.metrics import SHORT_CIRCUIT
from tests.cli_guest import read, write
from tests.cluster import FRONT_END, NODE, Cluster
from tests.daemons import Daemon, wait_for
from tests.metrics_page import scrape
from tests.nbd_client import Disconnected, NbdClient

SETTINGS = dataclasses.replace(FRONT_END, metrics="127.0.0.1:0")
SIZE = 64 * MIB
#: Of each read: few enough bytes to be one request.
LENGTH = MIB
_READ_FROM = re.compile(r"a member is read out of its tables.*replica=(rep-[0-9a-f]+)")


def cluster_in(directory: Path, settings: FrontEndSettings = SETTINGS) -> Cluster:
    node = dataclasses.replace(NODE, checkpoint_s=0.2)
    return Cluster(directory, node_settings=node, front_end_settings=settings)


def answered_here(front_end: Daemon) -> float:
    return scrape(front_end).sum(SHORT_CIRCUIT.name)


def until_answered_here(front_end: Daemon, look: Callable[[], object]) -> None:
    """Reads with `look` until the tables have answered one; the first of a few at once goes to a node, as is due."""

    def seen() -> bool:
        for _ in range(4):
            look()
        return answered_here(front_end) > 0

    wait_for("a read to come out of the tables", seen)


def served_again(cluster: Cluster, volume: str) -> str:
    """Its URI, once a read gets through."""

    def served() -> str:
        uri = ""
        with suppress(ConnectionError):
            read(cluster.uri_now(volume), 0, BLOCK_SIZE)
            uri = cluster.uri_now(volume)
        return uri

    return wait_for("the volume to be served again", served)


async def read_at_once_while(uri: str, happens: Callable[[], object]) -> None:
    """Several reads behind it, at once: a node hears of the first one, and the others are through before it does."""
    client = await NbdClient.connect(uri)
    happens()
    reads = [client.read(at, BLOCK_SIZE) for at in range(0, 16 * BLOCK_SIZE, BLOCK_SIZE)]
    found = await asyncio.gather(*reads, return_exceptions=True)
    assert any(isinstance(each, Disconnected) for each in found)
    await client.close()


def state_of(cluster: Cluster) -> Path:
    return cluster.front_ends[0].directory


def test_reads_show_each_write_that_was_acknowledged(tmp_path: Path) -> None:
    """Before a checkpoint has applied it, after one, and while others are under way."""
    with cluster_in(tmp_path) as cluster:
        uri = cluster.attach(cluster.create(SIZE))
        [front_end] = cluster.front_ends
        until_answered_here(front_end, lambda: read(uri, 0, BLOCK_SIZE))
        before = answered_here(front_end)
        shown = bytearray(4 * LENGTH)
        for turn in range(40):
            block, at = os.urandom(BLOCK_SIZE), turn * 37 % 1024 * BLOCK_SIZE
            write(uri, at, block)
            shown[at : at + BLOCK_SIZE] = block
            assert read(uri, at, BLOCK_SIZE) == block
            assert read(uri, turn % 4 * LENGTH, LENGTH) == shown[turn % 4 * LENGTH : (turn % 4 + 1) * LENGTH]
        assert answered_here(front_end) > before


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    never = dataclasses.replace(SETTINGS, short_circuit=ShortCircuitMode.NEVER)
    with cluster_in(tmp_path, never) as cluster:
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        write(uri, 0, b"x" * BLOCK_SIZE)
        cluster.wait_whole(volume, idle=True)
        assert [read(uri, 0, BLOCK_SIZE) for _ in range(50)] == [b"x" * BLOCK_SIZE] * 50
        assert answered_here(cluster.front_ends[0]) == 0


def test_a_front_end_that_died_of_a_bad_page_reads_from_the_nodes(tmp_path: Path) -> None:
    """A file that is cut short ends whoever touches what is missing, by SIGBUS: no page is as bad as none."""
    content = os.urandom(4 * LENGTH)
    with cluster_in(tmp_path) as cluster:
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        [front_end] = cluster.front_ends
        for at in range(0, len(content), LENGTH):
            write(uri, at, content[at : at + LENGTH])
        until_answered_here(front_end, lambda: read(uri, 0, LENGTH))
        [replica] = set(_READ_FROM.findall(front_end.log.read_text()))
        [tables] = tmp_path.rglob(f"{replica}/{FILE_NAME}")
        asyncio.run(read_at_once_while(uri, lambda: os.truncate(tables, 4 * PAGE_SIZE)))
        wait_for("the front-end to touch a page that is missing", lambda: not front_end.running)
        report = state_of(cluster) / "crash"
        assert "Bus error" in report.read_text()
        cluster.start(front_end)
        uri = served_again(cluster, volume)
        for at in range(0, len(content), LENGTH):
            assert read(uri, at, LENGTH) == content[at : at + LENGTH]
        assert answered_here(front_end) == 0
        assert "reads go to the nodes until the report is removed" in front_end.log.read_text()
        front_end.stop()
        assert report.exists()


@pytest.mark.parametrize("end", [Daemon.kill, Daemon.stop])
def test_an_end_that_is_no_crash_keeps_nobody_from_reading_tables(
    tmp_path: Path, end: Callable[[Daemon], object]
) -> None:
    with cluster_in(tmp_path) as cluster:
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        [front_end] = cluster.front_ends
        until_answered_here(front_end, lambda: read(uri, 0, BLOCK_SIZE))
        end(front_end)
        cluster.start(front_end)
        uri = served_again(cluster, volume)
        until_answered_here(front_end, lambda: read(uri, 0, BLOCK_SIZE))
