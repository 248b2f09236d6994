"""python -m tests.cluster_simulation: simulate many seeds; a failure says how to replay it."""

import argparse
import os
import sys
import time
import traceback
from collections import Counter

from tests.cluster_simulation.run import log_of, simulate


def main(arguments: list[str]) -> int:
    """The exit code: 1 where a simulation failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster_simulation", description=__doc__)
    parser.add_argument("--seeds", default="0-9", help="FIRST-LAST, or one (0-9)")
    parser.add_argument("--lasts", type=float, default=40.0, metavar="S", help="virtual seconds under faults (40)")
    chosen = parser.parse_args(arguments)
    first, _, last = chosen.seeds.partition("-")
    faults: Counter[str] = Counter()
    operations, failed = 0, 0
    for seed in range(int(first), int(last or first) + 1):
        began = time.perf_counter()
        try:
            report = simulate(seed, chosen.lasts)
        except Exception:
            failed += 1
            traceback.print_exc()
            replay = f"python -m tests.cluster_simulation --seeds {seed} --lasts {chosen.lasts:g}"
            print(f"FAILED; again: {replay}; what the daemons said: {log_of(seed)}", flush=True)
            continue
        faults.update(report.faults)
        operations += report.operations
        print(
            f"seed {seed}: {report.operations} operations in {report.virtual_s:.0f} virtual s "
            f"({time.perf_counter() - began:.1f} s), {report.snapshots} snapshots restored, "
            f"longest {report.longest_s:.1f} s, faults {sum(report.faults.values())}",
            flush=True,
        )
    print(f"{operations} operations checked, faults survived: {dict(faults)}, failed seeds: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of sets is chance, too.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.cluster_simulation", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    sys.exit(main(sys.argv[1:]))
