"""Replicas that are moved or made good in a real cluster, in what is more than one plain volume.

Nothing is removed while it is the last good copy: whatever is killed in the middle of it, guests and snapshots find
every acknowledged byte.
"""

import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.storage.keys import version_key
from blockstore.storage.tables import FILE_NAME, Tables
from blockstore.units import FIRST_GENERATION, KIB, MIB
from tests.cli_guest import read, write
from tests.cluster import CONTROL, FRONT_END, Cluster
from tests.crash.model import SECTOR_SIZE
from tests.crash.offline import assert_replicas_agree
from tests.crash.workload import Workload
from tests.daemons import Daemon, wait_for
from tests.etcd_server import running_etcd

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(600)]

SEGMENT: Final = 8 * MIB
ORIGIN: Final = 10 * MIB
SIZE: Final = 14 * MIB
#: Behind what the pieces cover: for guests that go on all the time.
SECTORS: Final = range(ORIGIN // SECTOR_SIZE, SIZE // SECTOR_SIZE)
PIECE: Final = 64 * KIB
PROGRESS: Final = 100
LIMIT_S: Final = 120.0
#: Nothing is replaced because it is away: what moves here is moved for another reason.
PATIENT: Final = dataclasses.replace(CONTROL, replace_after_s=0.0)
#: Of newcomers: none is whole before all that take part were killed, however long these take to start.
SLOW: Final = MIB // 32


class Pieces:
    """What a guest wrote, here and there over both segments, and what all of it is then."""

    def __init__(self) -> None:
        self.content = bytearray(ORIGIN)
        self._random = random.Random(11)

    def write(self, uri: str, count: int = 6) -> None:
        for number in range(count):
            offset = SEGMENT - PIECE // 2 if not number else self._random.randrange(ORIGIN - PIECE)
            data = self._random.randbytes(PIECE)
            write(uri, offset, data)
            self.content[offset : offset + PIECE] = data

    def check(self, uri: str, content: bytes | None = None) -> None:
        expected = bytes(self.content) if content is None else content
        for offset in range(0, ORIGIN, MIB):
            assert read(uri, offset, MIB) == expected[offset : offset + MIB], f"the MiB at {offset}"


def configurations(cluster: Cluster, volume: str) -> list[control_pb2.Configuration]:
    return [each.configuration for each in cluster.volume(volume).segments]


def changing(configuration: control_pb2.Configuration) -> bool:
    return bool(configuration.old_members) or configuration.HasField("replacement")


def holders(cluster: Cluster, volume: str) -> set[str]:
    """The nodes of all members, once no change is under way; else none."""
    found = configurations(cluster, volume)
    return set() if any(map(changing, found)) else {each.node for one in found for each in one.members}


def has_left(cluster: Cluster, volume: str, node: str) -> bool:
    """Every segment, and no change is under way."""
    found = holders(cluster, volume)
    return bool(found) and node not in found


def newcomers(cluster: Cluster, volume: str) -> list[str]:
    return [each.replica for each in cluster.health(volume).replicas if each.replaces]


def newcomer_node(cluster: Cluster, volume: str) -> str:
    """Where a newcomer is filled now; empty where none is."""
    filled = [each for each in cluster.health(volume).replicas if each.replaces and each.state == "filling"]
    return filled[0].node if filled else ""


def wait_until(what: str, cluster: Cluster, volume: str, condition: Callable[[], object]) -> None:
    try:
        wait_for(what, condition, LIMIT_S)
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {cluster.health(volume)} {cluster.status().problems}") from error


def active_control(cluster: Cluster) -> Daemon:
    address = next(each.address for each in cluster.status().controls if each.active)
    return next(each for each in cluster.controls if each.read_address() == address)


def test_segments_move_on_etcd_while_they_hydrate_and_ship_and_all_that_take_part_are_killed(tmp_path: Path) -> None:
    with running_etcd(tmp_path / "etcd") as etcd:
        control = dataclasses.replace(
            PATIENT, metastore=etcd.url(), segment_size_bytes=SEGMENT, hold_limit_s=15.0, rebuild_rate_bytes=SLOW
        )
        front_end = dataclasses.replace(FRONT_END, retry_limit_s=60.0)  # longer than a node takes to start
        with Cluster(
            tmp_path,
            zones=("a", "b", "c", "d"),
            controls=2,
            snapshotds=1,
            control_settings=control,
            front_end_settings=front_end,
        ) as cluster:
            volume, pieces = restored(cluster)
            uri = cluster.uri(volume)
            (base,) = cluster.snapshot(volume)
            pieces.write(uri)

            ids = {each.id: index for each in cluster.status().nodes for index in [index_of(cluster, each.address)]}
            everywhere = set.intersection(*({m.node for m in each.members} for each in configurations(cluster, volume)))
            leaving, source = sorted(everywhere)[:2]
            with Workload(lambda: cluster.uri_now(volume), SECTORS) as load:
                cluster.call("DrainNode", control_pb2.DrainNodeRequest(node=leaving))
                wait_until("a newcomer", cluster, volume, lambda: newcomer_node(cluster, volume))
                (pending,) = cluster.snapshot(volume, wait=False)
                at_pending = bytes(pieces.content)
                target = cluster.nodes[ids[newcomer_node(cluster, volume) or leaving]]
                for victim in (target, cluster.nodes[ids[source]], active_control(cluster)):
                    victim.kill()
                    cluster.start(victim)
                    load.wait_progress(PROGRESS)
                    pieces.write(uri, 2)
                cluster.call("SetRepair", control_pb2.SetRepairRequest(rebuild_rate_bytes=0))
                wait_until("it to leave the node", cluster, volume, lambda: has_left(cluster, volume, leaving))
                load.wait_progress(PROGRESS)
            pieces.check(uri)
            load.verify(uri)
            wait_until("it to be shipped", cluster, volume, lambda: cluster._is_completed(pending))
            pieces.write(uri, 2)
            (last,) = cluster.snapshot(volume)
            check_shipped(cluster, base, pending, last)
            cluster.call("SetHydration", snapshot_pb2.SetHydrationRequest(volume=volume, rate_bytes=0))
            for snapshot, content in ((pending, at_pending), (last, bytes(pieces.content))):
                other = cluster.create(0, snapshot=snapshot)
                pieces.check(cluster.attach(other), content)
            wait_until("it to be hydrated", cluster, volume, lambda: not cluster.volume(volume).HasField("source"))
            pieces.check(uri)
            assert_replicas_agree(cluster, volume)


def restored(cluster: Cluster) -> tuple[str, Pieces]:
    """A volume of two segments that hydrates slowly, attached."""
    pieces = Pieces()
    origin = cluster.create(ORIGIN)
    pieces.write(cluster.attach(origin), 40)
    (snapshot,) = cluster.snapshot(origin)
    volume = cluster.create(SIZE, snapshot=snapshot, init_rate_bytes=16 * KIB)
    uri = cluster.attach(volume)
    pieces.write(uri)
    assert cluster.volume(volume).HasField("source")
    return volume, pieces


def index_of(cluster: Cluster, address: str) -> int:
    return next(index for index, daemon in enumerate(cluster.nodes) if daemon.read_address() == address)


def check_shipped(cluster: Cluster, base: str, pending: str, last: str) -> None:
    """Each as the change of the one before: the newcomers keep the generations that the others do."""
    found = {}
    for each in (pending, last):
        found[each] = cluster.call("GetSnapshot", snapshot_pb2.GetSnapshotRequest(snapshot=each))
    assert (found[pending].parent, found[last].parent) == (base, pending)
    assert found[last].statistics.changed_bytes < SIZE - ORIGIN + 16 * PIECE


# ---- several replicas that rotted


def lose_entry(directory: Path, number: int) -> None:
    """As a bit that flips in a key leaves it, and found: the node says so when it starts."""
    [path] = directory.rglob(FILE_NAME)
    tables = Tables(path, create=False)
    tables.change(lambda transaction: transaction.delete(version_key(number, FIRST_GENERATION), db=tables.index))
    tables.close()
    (path.parent / "damage").write_text(f"block {number} has lost its entry")


def test_two_replicas_that_rotted_are_made_good_one_after_the_other_by_themselves(tmp_path: Path) -> None:
    """In a volume that nobody has attached; each lacks a block that only one of the two others is sure to have.

    All that take part are killed meanwhile, the one good replica's node among them.
    """
    with Cluster(tmp_path, control_settings=dataclasses.replace(PATIENT, rebuild_rate_bytes=SLOW)) as cluster:
        volume = cluster.create(SIZE)
        uri, content = cluster.attach(volume), os.urandom(2 * MIB)
        write(uri, 0, content)
        cluster.wait_whole(volume, idle=True)
        cluster.detach(volume)
        nodes = {each.id: cluster.nodes[index_of(cluster, each.address)] for each in cluster.status().nodes}
        [before] = configurations(cluster, volume)
        held = [nodes[each.node] for each in before.members]
        for daemon in held:
            assert daemon.stop() == 0
        for daemon, number in zip(held[:2], (3, 300), strict=True):
            lose_entry(daemon.directory, number)
        cluster.start(*held)
        for victim in (held[2], cluster.control, cluster.front_ends[0]):
            wait_until("a newcomer", cluster, volume, lambda: newcomers(cluster, volume))
            victim.kill()
            cluster.start(victim)
        cluster.call("SetRepair", control_pb2.SetRepairRequest(rebuild_rate_bytes=0))

        def good() -> bool:
            [now] = configurations(cluster, volume)
            replicas = cluster.health(volume).replicas
            mended = all(each.state == "up" and not each.damage for each in replicas)
            return mended and not changing(now) and now.number == 3

        wait_until("all replicas to be good", cluster, volume, good)
        [after] = configurations(cluster, volume)
        stayed = {each.replica for each in before.members} & {each.replica for each in after.members}
        assert len(stayed) == 2, "one was replaced, and the other one filled anew where it is"
        assert before.members[2].replica in stayed, "the good one"
        assert len({each.node for each in after.members}) == 3
        uri = cluster.attach(volume)
        for offset in range(0, len(content), MIB):
            assert read(uri, offset, MIB) == content[offset : offset + MIB]
        assert_replicas_agree(cluster, volume)
