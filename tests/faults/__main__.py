"""`python -m tests.faults`: faults for as long as you like. It ends with the first thing that is wrong."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults.power_cluster import cut_again_and_again


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--power-cuts", type=int, metavar="N", help="take the power of all machines so many times")
    parser.add_argument("--seed", type=int, default=1, help="what happens, and when; printed where something is wrong")
    parser.add_argument("--directory", type=Path, help="where to work instead of a temporary directory; it is kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cairn-faults-") as scratch:
        directory = given.directory or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        if given.power_cuts:
            lost = cut_again_and_again(directory, given.power_cuts, given.seed, said=say)
            say(f"nothing acknowledged was lost: {dict(lost)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
