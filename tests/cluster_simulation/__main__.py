"""Simulate many seeds, or break a rule and see it found; a failure says how to replay it."""

import argparse
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence

from tests.cluster_simulation.faults import KINDS
from tests.cluster_simulation.mutations import MUTATIONS, find
from tests.cluster_simulation.run import Report, log_of, simulate

_PROGRAM = "python -m tests.cluster_simulation"
_SEEDS = 10
#: A broken rule that is not found by so many is not found.
_MUTATION_SEEDS = 30


def main(arguments: list[str]) -> int:
    """The exit code: 1 where a simulation failed, or a broken rule was not found."""
    parser = argparse.ArgumentParser(prog=_PROGRAM, description=__doc__)
    parser.add_argument(
        "--seeds",
        type=_seeds,
        help="FIRST-LAST, or one (0-9; 0-29 of a mutation); odd ones have three controls",
    )
    parser.add_argument("--lasts", type=float, default=15.0, metavar="S", help="virtual seconds under faults (15)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of faults (all)")
    parser.add_argument(
        "--mutations", nargs="*", choices=MUTATIONS, metavar="NAME",
        help=f"break these rules instead, each by itself, and see that it is found (all): {', '.join(MUTATIONS)}",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    if chosen.mutations is not None:
        return _mutate(chosen.mutations or list(MUTATIONS), chosen.seeds or range(_MUTATION_SEEDS))
    return _simulate(chosen.seeds or range(_SEEDS), chosen.lasts, chosen.kinds)


def _seeds(text: str) -> range:
    """Raises ArgumentTypeError."""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first)):
        raise argparse.ArgumentTypeError(f"{text!r}: name one seed, or the first and the last one, such as 0-99")
    return range(int(first), int(last or first) + 1)


def _simulate(seeds: Sequence[int], lasts_s: float, kinds: Sequence[str]) -> int:
    faults, done = Counter[str](), Counter[str]()
    operations, lost_writes, failed = 0, 0, list[int]()
    for seed in seeds:
        began = time.perf_counter()
        try:
            report = simulate(seed, lasts_s, {kind: KINDS[kind] for kind in kinds})
        except Exception:
            failed.append(seed)
            traceback.print_exc()
            chosen = "" if len(kinds) == len(KINDS) else f" --kinds {' '.join(kinds)}"
            replay = f"{_PROGRAM} --seeds {seed} --lasts {lasts_s:g}{chosen}"
            print(f"FAILED; again: {replay}; what the daemons said: {log_of(seed)}", flush=True)
            continue
        faults.update(report.faults)
        done.update(report.done)
        operations += report.operations
        lost_writes += report.lost_writes
        print(_line(report, time.perf_counter() - began), flush=True)
    print(f"{len(seeds)} seeds, {operations} operations checked, {lost_writes} writes lost by power cuts")
    print(f"faults: {dict(faults)}")
    print(f"done meanwhile: {dict(done)}")
    print(f"failed seeds: {failed or 'none'}")
    return 1 if failed else 0


def _line(report: Report, took_s: float) -> str:
    return (
        f"seed {report.seed}: {report.operations} operations in {report.virtual_s:.0f} virtual s ({took_s:.1f} s), "
        f"{report.snapshots} snapshots restored, longest {report.longest_s:.1f} s, faults {sum(report.faults.values())}"
    )


def _mutate(names: Sequence[str], seeds: Sequence[int]) -> int:
    missed = []
    for name in names:
        began = time.perf_counter()
        found = find(MUTATIONS[name], seeds)
        took = f"{time.perf_counter() - began:.0f} s"
        if found is None:
            missed.append(name)
            print(f"{name}: NOT FOUND by {len(seeds)} seeds ({took})", flush=True)
        else:
            print(f"{name}: found by seed {found[0]} ({took}): {str(found[1])[:150]}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of sets is chance, too.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.cluster_simulation", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    faulthandler.enable()  # LMDB may end the process
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what is in memory is cleared away
    sys.exit(main(sys.argv[1:]))
