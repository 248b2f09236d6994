"""python -m tests.simulation --seeds A:B [--mutation NAME] [--trace] [--jobs N]

Runs the seeds A to B - 1 over all cores, prints how far it is, and ends at the first that fails:
with its trace, the command that replays it, and exit code 1.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator

from tests.simulation.mutations import MUTATIONS, mutated
from tests.simulation.run import Outcome, run_seed

_TRACE_LINES = 400


def main() -> int:
    arguments = _arguments()
    first, _, last = arguments.seeds.partition(":")
    seeds = range(int(first), int(last) if last else int(first) + 1)
    with mutated(arguments.mutation):
        failed = _run_all(seeds, arguments.jobs)
        if failed is None:
            return 0
        name = f" --mutation {arguments.mutation}" if arguments.mutation else ""
        print(f"\nseed {failed.seed} fails: {failed.violation}")
        if arguments.trace or len(seeds) > 1:
            trace = run_seed(failed.seed, tracing=True).trace
            print("\n".join(trace if arguments.trace else trace[-_TRACE_LINES:]))
        print(f"\nseed {failed.seed} fails: {failed.violation}")
        print(f"replay: python -m tests.simulation --seeds {failed.seed}:{failed.seed + 1} --trace{name}")
    return 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", default="0:1000", help="first:end, end not included")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="break the core on purpose")
    parser.add_argument("--trace", action="store_true", help="print the whole trace of a seed that fails")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def _run_all(seeds: range, jobs: int) -> Outcome | None:
    """The first outcome that failed. Workers are forked, so that they run the core as it is patched here."""
    began = time.perf_counter()
    pool = multiprocessing.get_context("fork").Pool(jobs) if jobs > 1 and len(seeds) > 1 else None
    try:
        outcomes: Iterable[Outcome] = (
            pool.imap_unordered(run_seed, seeds, chunksize=4) if pool else map(run_seed, seeds)
        )
        return next((outcome for outcome in _reported(outcomes, len(seeds), began) if outcome.violation), None)
    finally:
        if pool is not None:
            pool.terminate()


def _reported(outcomes: Iterable[Outcome], total: int, began: float) -> Iterator[Outcome]:
    events = completed = 0
    for count, outcome in enumerate(outcomes, 1):
        yield outcome
        events += outcome.events
        completed += outcome.completed
        if count % 500 == 0 or count == total:
            rate = count / (time.perf_counter() - began)
            print(f"{count} of {total} seeds, {rate:.1f}/s, {events} events, {completed} requests answered", flush=True)


if __name__ == "__main__":
    sys.exit(main())
