"""`python -m tests.faults`: faults for as long as you like. It ends with the first thing that is wrong.

python -m tests.faults --hours 2 --seed 5          # all kinds of faults, in an order that the seed gives
python -m tests.faults --power-cuts 1000 --seed 7  # all machines lose their power at once, again and again
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from tests.faults.kinds import KINDS
from tests.faults.power_cluster import cut_again_and_again
from tests.faults.schedule import LASTING_S, run_schedule


def say(text: str) -> None:
    print(text, flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=0.0, help="how long the schedule of faults goes on")
    parser.add_argument("--minutes", type=float, default=0.0, help="and minutes")
    parser.add_argument("--rounds", type=int, metavar="N", help="at least so many of each kind of fault")
    parser.add_argument(
        "--kind",
        action="append",
        choices=KINDS,
        metavar="KIND",
        help="only this kind of fault, as docs/reliability.md names it; may be repeated",
    )
    parser.add_argument(
        "--lasting", type=float, nargs=2, default=LASTING_S, metavar=("LEAST", "MOST"), help="seconds of each fault"
    )
    parser.add_argument("--embedded", action="store_true", help="one control with the embedded metastore, no etcd")
    parser.add_argument("--power-cuts", type=int, metavar="N", help="instead: so many power cuts of all machines")
    parser.add_argument("--seed", type=int, default=1, help="what happens, and to whom; the same for the same seed")
    parser.add_argument("--directory", type=Path, help="where to work instead of a temporary directory; it is kept")
    given = parser.parse_args()
    if not (given.hours or given.minutes or given.rounds or given.power_cuts):
        parser.error("say for how long (--hours, --minutes) or how often (--rounds, --power-cuts)")
    if not 0 <= given.lasting[0] <= given.lasting[1]:
        parser.error(f"--lasting {given.lasting[0]:g} {given.lasting[1]:g}: the least first, and none below 0")
    return given


def main() -> int:
    given = parsed()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and nothing is left behind
    with tempfile.TemporaryDirectory(prefix="cairn-faults-") as scratch:
        directory = given.directory or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        if given.power_cuts:
            lost = cut_again_and_again(directory, given.power_cuts, given.seed, said=say)
            say(f"{given.power_cuts} cuts, and nothing acknowledged was lost: {dict(lost)}")
            return 0
        duration_s = given.hours * 3600 + given.minutes * 60
        report = run_schedule(
            directory,
            given.seed,
            duration_s,
            say,
            given.kind,
            rounds=given.rounds or 1,
            lasting_s=tuple(given.lasting),
            embedded=given.embedded,
        )
        say("\n".join(report.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
