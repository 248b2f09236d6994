"""python -m bench.repair: what a guest feels of a rebuild, how fast that is, and how soon a node is back.

A cluster of four nodes with the defaults of every process, but for heartbeats five times as often, which is how finely
the times are known. Each round measures random writes with nothing else going on, then the same while a node is
drained, so a replica of the whole volume is made anew on another: both in one run, by turns. Then a node is killed
under that load, started again after a minute, and timed until its replica has all there is.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.fio import Disk, Measurement, run_once, run_timed
from bench.workloads import FILL, Workload
from blockstore.config import ControlSettings, FrontEndSettings, NodeSettings
from blockstore.rpc import control_pb2
from blockstore.units import GIB, KIB, MIB, parse_size
from tests.cluster import Cluster
from tests.daemons import wait_for

#: What a guest does that is not idle and does not fill the machine by itself.
LOAD: Final = Workload("randwrite", 4 * KIB, 8)
_ZONES: Final = ("a", "b", "c", "d")
_HEARTBEAT_S: Final = 0.2
#: Of one run of fio; figures are medians of such runs.
_SLICE_S: Final = 5.0
_LIMIT_S: Final = 1800.0

Said = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """size: of the volume. slices: runs of fio in each round before the rebuild. away_s: of the node."""

    size: int = 1 * GIB
    rounds: int = 3
    slices: int = 3
    away_s: float = 60.0


class Repairs:
    """One cluster, and one volume that is full."""

    def __init__(self, cluster: Cluster, plan: Plan, directory: Path, said: Said) -> None:
        self._cluster = cluster
        self._plan = plan
        self._directory = directory
        self._said = said
        self._volume = cluster.create(plan.size)
        self._disk = Disk.nbd(cluster.attach(self._volume))
        run_once(FILL, self._disk, plan.size, directory)

    def rebuild(self) -> tuple[float, float, float]:
        """p99 in ms without and with a rebuild, and its rate in MiB/s, from the drain to the end of the change."""
        quiet = [self._load() for _ in range(self._plan.slices)]
        node = next(each.node for each in self._members())
        with self._loading() as slices:
            began = time.monotonic()
            self._drain(node)
            wait_for(f"{node} to be empty", lambda: self._has_left(node), _LIMIT_S)
            took_s = time.monotonic() - began
        self._drain(node, undo=True)
        busy = [each for ended_at, each in slices if ended_at - began <= took_s] or [slices[0][1]]
        quiet_ms, busy_ms = (statistics.median(each.p99_us for each in some) / 1000 for some in (quiet, busy))
        rate = self._plan.size / MIB / took_s
        self._said(f"p99 {quiet_ms:.2f} ms, with a rebuild {busy_ms:.2f} ms; {rate:.0f} MiB/s")
        return quiet_ms, busy_ms, rate

    def rejoin(self) -> tuple[float, float, int]:
        """Seconds from a node's start, and from its listening, until it has all; and how many bytes were written."""
        node = self._members()[0].node
        addresses = {each.id: each.address for each in self._cluster.status().nodes}
        daemon = next(each for each in self._cluster.nodes if each.read_address() == addresses[node])
        with self._loading() as slices:
            daemon.kill()
            wait_for(f"{node} to be missed", lambda: self._state(node) != "up", _LIMIT_S)
            away_since = time.monotonic()
            time.sleep(self._plan.away_s)  # it is away for so long
            meanwhile = [each for ended_at, each in slices if ended_at > away_since]
            written = sum(int(each.iops * each.seconds) * LOAD.block_size for each in meanwhile)
            began = time.monotonic()
            self._cluster.start(daemon)
            listening = time.monotonic()
            wait_for(f"{node} to have all", lambda: self._state(node) == "up", _LIMIT_S)
            done = time.monotonic()
        self._cluster.wait_whole(self._volume)
        self._said(f"back after {done - began:.1f} s, {done - listening:.1f} s of them once it listened")
        return done - began, done - listening, written

    # ---- inside

    def _load(self) -> Measurement:
        return run_timed(LOAD, self._disk, self._plan.size, _SLICE_S, self._directory)

    @contextmanager
    def _loading(self) -> Iterator[list[tuple[float, Measurement]]]:
        """Load while the block lasts, in slices: when each ended, and what it measured."""
        slices: list[tuple[float, Measurement]] = []
        ended = threading.Event()

        def run() -> None:
            while not ended.is_set():
                measured = self._load()
                slices.append((time.monotonic(), measured))

        with ThreadPoolExecutor(1) as threads:
            running: Future[None] = threads.submit(run)
            try:
                yield slices
            finally:
                ended.set()
            running.result()

    def _members(self) -> list[control_pb2.Member]:
        return list(self._cluster.volume(self._volume).segments[0].configuration.members)

    def _has_left(self, node: str) -> bool:
        now = self._cluster.volume(self._volume).segments[0].configuration
        changing = now.old_members or now.HasField("replacement")
        return not changing and all(each.node != node for each in now.members)

    def _state(self, node: str) -> str:
        return next(each.state for each in self._cluster.health(self._volume).replicas if each.node == node)

    def _drain(self, node: str, *, undo: bool = False) -> None:
        self._cluster.call("DrainNode", control_pb2.DrainNodeRequest(node=node, undo=undo))


def measure(plan: Plan, directory: Path, said: Said) -> str:
    """A table in Markdown."""
    with Cluster(
        directory,
        zones=_ZONES,
        control_settings=ControlSettings(),
        node_settings=NodeSettings(heartbeat_s=_HEARTBEAT_S),
        front_end_settings=FrontEndSettings(heartbeat_s=_HEARTBEAT_S),
    ) as cluster:
        repairs = Repairs(cluster, plan, directory, said)
        rounds = [repairs.rebuild() for _ in range(plan.rounds)]
        back_s, copied_s, written = repairs.rejoin()
    quiet, busy, rate = (statistics.median(values) for values in zip(*rounds, strict=True))
    rows = [
        (f"p99 of {LOAD.name}, nothing else going on", f"{quiet:.2f} ms"),
        ("the same while a replica is rebuilt", f"{busy:.2f} ms, {busy / quiet:.1f} times"),
        (f"rebuild of {plan.size // MIB} MiB under that load", f"{rate:.0f} MiB/s"),
        (
            f"a node is back after {plan.away_s:.0f} s away, {written // MIB} MiB written meanwhile",
            f"{back_s:.1f} s after its start, {copied_s:.1f} s after it listened",
        ),
    ]
    lines = [f"| {what} | {figure} |" for what, figure in rows]
    return "\n".join([f"| median of {plan.rounds} rounds | |", "|---|---|", *lines])


def main(arguments: list[str]) -> int:
    """Measure and report."""
    default = Plan()
    parser = argparse.ArgumentParser(prog="python -m bench.repair", description=__doc__)
    parser.add_argument("--size", type=parse_size, default=default.size, help="of the volume, such as 1G (the default)")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="medians are reported (3)")
    parser.add_argument("--slices", type=int, default=default.slices, help="of 5 s without a rebuild, each round (3)")
    parser.add_argument("--away-s", type=float, default=default.away_s, help="how long the node is away (60)")
    parser.add_argument("--directory", type=Path, help="for the data (default: the system's for temporary files)")
    given = parser.parse_args(arguments)
    plan = Plan(given.size, given.rounds, given.slices, given.away_s)
    with tempfile.TemporaryDirectory(dir=given.directory) as scratch:
        print(measure(plan, Path(scratch), lambda line: print(line, file=sys.stderr, flush=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
