"""python -m bench.scale: what a large volume, many snapshots and many volumes cost, beside the small case.

A small cluster, with 20 volumes of 1 GiB and 20 snapshots of one, stays up all the time. Beside it stands, one after
the other, a cluster with a volume of 1 TiB, one with 10,000 snapshots of one volume, and one with 1,000 volumes on
each of its three nodes; all processes have their defaults. Both sides are probed by turns, so that what else the
machine does meets both: a volume is attached, blocks are read, a snapshot is made, snapshots and volumes are listed.
The goal is a ratio of 1.2 at most. Lists of everything count per item. On two cores 1,000 volumes took two and a half
minutes to make, and 5,850 snapshots 24 minutes: each one takes longer than the one before.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from bench.default_cluster import default_cluster
from bench.markdown import table
from bench.processes import private_bytes
from bench.report import describe_machine
from bench.scale_cases import DATA_BYTES, SMALL_BYTES, Say, Side, add_volumes, make_side, wait_shipped
from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.units import BLOCK_SIZE, MIB, TIB, format_size, parse_size
from tests.cluster import Cluster
from tests.nbd_client import NbdClient

#: The goal: the large case takes at most so many times as long as the small one.
GOAL: Final = 1.2
_READS: Final = 200


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of the three cases, 0 to leave one out, and how often each is probed.

    listed: volumes of every cluster and snapshots of every probed volume, at least; what a list of the newest asks for.
    """

    volume_bytes: int = TIB
    snapshots: int = 10_000
    volumes: int = 1_000
    rounds: int = 9
    listed: int = 20


# ---- probes: seconds, of what they are named for


def probe_open(side: Side) -> float:
    """From the request to attach it until a client has it open; not until a heartbeat says so."""
    cluster = side.cluster
    request = control_pb2.AttachVolumeRequest(volume=side.volume)

    async def connect() -> None:
        client = await NbdClient.connect(side.uri())
        await client.close()

    cluster.detach(side.volume)
    began = time.monotonic()
    cluster.call("AttachVolume", request)
    asyncio.run(connect())
    return time.monotonic() - began


def probe_read(side: Side) -> float:
    """One block at a random place of what was written: the median of some."""

    async def read() -> float:
        client = await NbdClient.connect(side.uri())
        spent = []
        for _ in range(_READS):
            offset = random.randrange(DATA_BYTES // BLOCK_SIZE) * BLOCK_SIZE
            began = time.perf_counter()
            await client.read(offset, BLOCK_SIZE)
            spent.append(time.perf_counter() - began)
        await client.close()
        return statistics.median(spent)

    return asyncio.run(read())


def probe_snapshot(side: Side) -> float:
    """Until its content is fixed; that it is shipped is waited for, and not counted."""
    began = time.monotonic()
    side.cluster.snapshot(side.volume, wait=False)
    spent = time.monotonic() - began
    wait_shipped(side, 1)
    return spent


def probe_newest(side: Side, count: int) -> float:
    request = snapshot_pb2.ListSnapshotsRequest(volume=side.volume, limit=count)
    return _list(side, "ListSnapshots", request, "snapshots")[0]


def probe_snapshots(side: Side) -> float:
    seconds, count = _list(side, "ListSnapshots", snapshot_pb2.ListSnapshotsRequest(volume=side.volume), "snapshots")
    return seconds / count


def probe_volumes(side: Side) -> float:
    seconds, count = _list(side, "ListVolumes", control_pb2.ListVolumesRequest(), "volumes")
    return seconds / count


def _list(side: Side, method: str, request: Any, field: str) -> tuple[float, int]:
    began = time.monotonic()
    found = getattr(side.cluster.call(method, request), field)
    return time.monotonic() - began, len(found)


def make_probes(listed: int) -> dict[str, Callable[[Side], float]]:
    """By name; listed: how many of the newest snapshots are listed."""
    return {
        "open (attach, and connect)": probe_open,
        "read 4 KiB, depth 1": probe_read,
        "make a snapshot": probe_snapshot,
        f"list the newest {listed} snapshots": lambda side: probe_newest(side, listed),
        "list all snapshots, for each": probe_snapshots,
        "list all volumes, for each": probe_volumes,
    }


def compare(small: Side, large: Side, plan: Plan) -> dict[str, dict[str, float]]:
    """Medians in ms and their ratio, by probe; both sides by turns, and first one, then the other begins.

    What each does for the first time is not counted.
    """
    found: dict[str, dict[str, float]] = {}
    for name, probe in make_probes(plan.listed).items():
        for side in (small, large):
            probe(side)
        pairs = [
            (probe(small), probe(large)) if number % 2 else (probe(large), probe(small))[::-1]
            for number in range(plan.rounds)
        ]
        small_s, large_s = (statistics.median(each) for each in zip(*pairs, strict=True))
        found[name] = {
            "small_ms": round(small_s * 1000, 4),
            "large_ms": round(large_s * 1000, 4),
            "ratio": round(large_s / small_s, 3),
        }
    return found


def memory_of(cluster: Cluster) -> dict[str, dict[str, float]]:
    """MiB of each process: resident, and of that without pages of mapped files."""
    processes = {daemon.name: psutil.Process(daemon.pid) for daemon in cluster.daemons}
    return {
        name: {
            "rss_mib": round(process.memory_info().rss / MIB, 1),
            "private_mib": round(private_bytes(process) / MIB, 1),
        }
        for name, process in processes.items()
    }


# ---- the run


def measure(plan: Plan, directory: Path, say: Say) -> dict[str, Any]:
    """A document: for each case how long it took to make, what the probes gave, and memory on both sides."""
    cases: dict[str, tuple[str, Callable[[Cluster], Side]]] = {}
    if plan.volume_bytes:
        cases["volume size"] = (
            format_size(plan.volume_bytes),
            lambda cluster: _make(cluster, plan, say, size_bytes=plan.volume_bytes),
        )
    if plan.snapshots:
        cases["snapshots of one volume"] = (
            f"{plan.snapshots:,}",
            lambda cluster: _make(cluster, plan, say, snapshots=plan.snapshots),
        )
    if plan.volumes:
        cases["volumes on a node"] = (
            f"{plan.volumes:,}",
            lambda cluster: _make(cluster, plan, say, volumes=plan.volumes),
        )
    found: dict[str, Any] = {}
    with default_cluster(directory / "small", snapshotds=1) as cluster:
        small = _make(cluster, plan, say)
        for name, (size, make) in cases.items():
            with ExitStack() as stack:
                began = time.monotonic()
                place = directory / name.replace(" ", "-")
                large = make(stack.enter_context(default_cluster(place, snapshotds=1)))
                made_s = time.monotonic() - began
                say(f"{name}: made in {made_s:.0f} s; probing")
                found[name] = {
                    "size": size,
                    "made_s": round(made_s, 1),
                    "probes": compare(small, large, plan),
                    "memory": {"small": memory_of(cluster), "large": memory_of(large.cluster)},
                }
    return found


def _make(
    cluster: Cluster, plan: Plan, say: Say, *, size_bytes: int = SMALL_BYTES, snapshots: int = 0, volumes: int = 0
) -> Side:
    """The small case, but for what is given. Lists of both sides have some items, which share a call's own cost."""
    add_volumes(cluster, max(volumes, plan.listed) - 1, say)
    return make_side(cluster, size_bytes, max(snapshots, plan.listed), say)


def report(cases: dict[str, Any]) -> str:
    """Tables in Markdown: times beside the goal, and memory."""
    times = [
        [
            f"{case}, {each['size']}: {probe}",
            *(f"{got[side]:,.3g}" for side in ("small_ms", "large_ms")),
            f"{got['ratio']:.2f}",
            "met" if got["ratio"] <= GOAL else "not met",
        ]
        for case, each in cases.items()
        for probe, got in each["probes"].items()
    ]
    memory = [
        [f"{case}: {process}", *(f"{found[kind]:,.0f}" for found in (small, large) for kind in found)]
        for case, each in cases.items()
        for process, small, large in _both(each["memory"])
    ]
    head = ["", "small, ms", "large, ms", "ratio", f"goal: {GOAL} at most"]
    memory_head = ["MiB", "small: resident", "private", "large: resident", "private"]
    return "\n".join([*table(head, times), "", *table(memory_head, memory)])


def _both(memory: dict[str, Any]) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    return [(name, memory["small"][name], large) for name, large in memory["large"].items()]


def main(arguments: list[str]) -> int:
    """Measure and report."""
    default = Plan()
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--volume-size", type=parse_size, default=default.volume_bytes, help="1T; 0: without this case")
    parser.add_argument("--snapshots", type=int, default=default.snapshots, help="10000; 0: without this case")
    parser.add_argument("--volumes", type=int, default=default.volumes, help="1000; 0: without this case")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="of each probe; medians are reported (9)")
    parser.add_argument(
        "--listed", type=int, default=default.listed, help="volumes and snapshots that each side has at least (20)"
    )
    parser.add_argument("--directory", type=Path, help="for the data (default: the system's for temporary files)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write all of it as JSON")
    options = parser.parse_args(arguments)
    plan = Plan(options.volume_size, options.snapshots, options.volumes, options.rounds, options.listed)
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        machine = describe_machine(Path(scratch))
        cases = measure(plan, Path(scratch), lambda line: print(line, file=sys.stderr, flush=True))
    if options.output is not None:
        options.output.write_text(json.dumps({"machine": machine, "cases": cases}, indent=2) + "\n")
    print(f"Load {machine['load_average']} as it began.\n\n{report(cases)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
