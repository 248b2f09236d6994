"""The kinds of faults that a schedule chooses from: each is there for the `with` block, and healed at its end.

A fault takes the cluster and a source of chance, which says who is hit. What it yields is said in the report.
"""

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Final, TypeAlias

from blockstore.rpc import snapshot_pb2
from tests.daemons import Daemon, wait_for
from tests.faults.fault_cluster import FaultCluster

Fault: TypeAlias = Callable[[FaultCluster, random.Random], AbstractContextManager[str]]

_HOUR_NS: Final = 3_600_000_000_000
#: Of the packets of a lossy machine: half of the time, for so long each.
_FLAP_S: Final = 0.05
_FRONT_END: Final = "front-end-0"
"""The one that serves."""


# ---- processes


@contextmanager
def _killed(cluster: FaultCluster, daemons: Sequence[Daemon]) -> Iterator[str]:
    for daemon in daemons:
        daemon.kill()
    yield ", ".join(daemon.name for daemon in daemons)
    cluster.start(*daemons)


def node_killed(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    return _killed(cluster, [chance.choice(cluster.nodes)])


def control_killed(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    return _killed(cluster, [cluster.control])


def all_nodes_killed(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    return _killed(cluster, cluster.nodes)


@contextmanager
def front_end_restarted(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """At once, as a supervisor would."""
    cluster.front_ends[0].kill()
    cluster.start(cluster.front_ends[0])
    yield _FRONT_END


@contextmanager
def everything_restarted(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    for daemon in cluster.daemons:
        daemon.kill()
    cluster.start(*cluster.daemons)
    yield "all"


@contextmanager
def snapshotd_killed(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """While it ships a snapshot, which is completed afterwards."""
    volume = cluster.status().volumes[0].volume.id
    (snapshot,) = cluster.snapshot(volume, wait=False)
    with _killed(cluster, cluster.snapshotds) as who:
        yield who

    def completed() -> bool:
        found = cluster.call("GetSnapshot", snapshot_pb2.GetSnapshotRequest(snapshot=snapshot))
        if found.state == snapshot_pb2.SNAPSHOT_STATE_ERROR:
            cluster.call("RetrySnapshot", snapshot_pb2.RetrySnapshotRequest(snapshot=snapshot))
        return bool(found.state == snapshot_pb2.SNAPSHOT_STATE_COMPLETED)

    wait_for(f"{snapshot} to be completed", completed)
    cluster.call("DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(snapshot=snapshot))


@contextmanager
def paused(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    daemon = chance.choice(cluster.daemons)
    daemon.pause()
    try:
        yield daemon.name
    finally:
        daemon.resume()


@contextmanager
def node_stutters(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """It stops half of the time: it answers late, and is never away."""
    daemon = chance.choice(cluster.nodes)
    with _now_and_then(daemon.pause, daemon.resume):
        yield daemon.name


# ---- the network


@contextmanager
def _healed(cluster: FaultCluster) -> Iterator[None]:
    try:
        yield
    finally:
        cluster.network.heal()


@contextmanager
def node_unplugged(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    node = chance.choice(cluster.nodes).name
    with _healed(cluster):
        cluster.network.unplug(node)
        yield node


@contextmanager
def one_way(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """What one sends the other does not arrive; the way back is fine."""
    pair = [_FRONT_END, chance.choice(cluster.nodes).name]
    chance.shuffle(pair)
    with _healed(cluster):
        cluster.network.drop(*pair)
        yield " -> ".join(pair)


@contextmanager
def front_end_sees_two(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """The third is up, and everybody else says so."""
    node = chance.choice(cluster.nodes).name
    with _healed(cluster):
        cluster.network.cut([_FRONT_END], [node])
        yield f"{_FRONT_END} | {node}"


@contextmanager
def front_end_sees_one(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """No quorum: guests wait."""
    nodes = [node.name for node in chance.sample(cluster.nodes, 2)]
    with _healed(cluster):
        cluster.network.cut([_FRONT_END], nodes)
        yield f"{_FRONT_END} | {', '.join(nodes)}"


@contextmanager
def cut_from_control(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """Control takes them for down; guests' data goes on."""
    daemons = chance.sample([*cluster.nodes, cluster.front_ends[0], *cluster.snapshotds], chance.randint(1, 3))
    names = [each.name for each in daemons]
    with _healed(cluster):
        cluster.network.cut(["control"], names)
        yield f"control | {', '.join(names)}"


@contextmanager
def nodes_cut_from_each_other(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    with _healed(cluster):
        for one, other in itertools.combinations([node.name for node in cluster.nodes], 2):
            cluster.network.cut([one], [other])
        yield "node | node | node"


@contextmanager
def packets_lost(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """All packets between the front-end and a node are lost half of the time."""
    node = chance.choice(cluster.nodes).name
    network = cluster.network

    def restore() -> None:
        network.restore(_FRONT_END, node)
        network.restore(node, _FRONT_END)

    with _healed(cluster), _now_and_then(lambda: network.cut([_FRONT_END], [node]), restore):
        yield f"{_FRONT_END} - {node}"


@contextmanager
def taken_away(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """The front-end is cut off from control and one node, and the volume attached elsewhere; then it goes back."""
    volume = cluster.status().volumes[0].volume.id
    with _healed(cluster):
        cluster.network.cut([_FRONT_END], ["control", chance.choice(cluster.nodes).name])
        cluster.attach(volume, 1, force=True)
        yield f"{volume} to front-end-1"
    cluster.attach(volume, 0, force=True)


@contextmanager
def cut_off_and_replaced(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """The front-end and one node are alone, and its guests still ask it; others write at its successor and the rest."""
    volume = cluster.status().volumes[0].volume.id
    nodes = [node.name for node in cluster.nodes]
    alone = nodes.pop(chance.randrange(len(nodes)))
    with _healed(cluster):
        cluster.network.cut([_FRONT_END, alone], ["control", "front-end-1", *nodes])
        cluster.attach(volume, 1, force=True)
        yield f"{_FRONT_END}, {alone} | front-end-1, {', '.join(nodes)}"
    cluster.attach(volume, 0, force=True)


# ---- disks and clocks


@contextmanager
def disk_full(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    cluster.fill_disk()
    try:
        wait_for("control to hear of a full node", lambda: any(node.full for node in cluster.status().nodes))
        yield "node-0"
    finally:
        cluster.make_room()


@contextmanager
def disk_slow(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """Each sync takes a fifth of a second."""
    node = chance.choice(cluster.nodes).name
    cluster.steering[node].set(sync_least_us=200_000, sync_most_us=200_000)
    try:
        yield node
    finally:
        cluster.steering[node].set(sync_least_us=0, sync_most_us=0)


@contextmanager
def clock_jumps(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """By hours, there and back."""
    name = chance.choice(sorted(cluster.steering))
    hours = chance.choice([-30, -1, 1, 30])
    cluster.steering[name].set(clock_offset_ns=hours * _HOUR_NS)
    try:
        yield f"{name} by {hours} h"
    finally:
        cluster.steering[name].set(clock_offset_ns=0)


@contextmanager
def _now_and_then(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """From a thread: begin, end, begin, end, until the block ends. Raises what they raised."""
    stopping = threading.Event()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            while not stopping.is_set():
                begin()
                stopping.wait(_FLAP_S)
                end()
                stopping.wait(_FLAP_S)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="now and then")
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
    if failure:
        raise failure[0]


KINDS: Final[dict[str, Fault]] = {
    fault.__name__: fault
    for fault in (
        node_killed, node_unplugged, front_end_restarted, control_killed, one_way, front_end_sees_two, paused,
        disk_full, cut_from_control, packets_lost, snapshotd_killed, node_stutters, disk_slow, clock_jumps,
        front_end_sees_one, nodes_cut_from_each_other, taken_away, cut_off_and_replaced, all_nodes_killed,
        everything_restarted,
    )
}  # fmt: skip
