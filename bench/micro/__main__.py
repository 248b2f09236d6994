"""python -m bench.micro: costs of single parts, each beside a calibration that makes machines alike.

Never fails because of a time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from bench.markdown import table
from bench.micro.baseline import compare, make_baseline, read_run

_FOLDER: Final = Path(__file__).parent
_ROOT: Final = _FOLDER.parent.parent
BASELINE: Final = _FOLDER / "baseline.json"
#: Of each benchmark at most, so that all of them take about a minute.
_SECONDS: Final = 0.5


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.micro", description=__doc__)
    parser.add_argument("-k", metavar="WORDS", help="only these, as pytest chooses by -k")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for each of them, at least (0.5)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--compare", action="store_true", help="beside the baseline: now / baseline of the ratios")
    action.add_argument("--save", action="store_true", help="make the baseline anew from this run")
    options = parser.parse_args(arguments)
    if options.save and options.k:
        parser.error("--save with -k would leave the others out of the baseline: save a whole run")
    return options


def main(arguments: list[str]) -> int:
    """Run and report; fails only where a benchmark does not work."""
    options = read_arguments(arguments)
    document = _run(options.seconds, options.k)
    if document is None:
        return 1
    figures = read_run(document)
    if options.save:
        BASELINE.write_text(json.dumps(make_baseline(figures), indent=2) + "\n")
        print(f"{BASELINE}: {len(figures)} ratios", file=sys.stderr)
    before = json.loads(BASELINE.read_text()) if options.compare else {}
    head, rows = compare(figures, before)
    shown = len(head) if options.compare else 3
    print("\n".join(table(head[:shown], [row[:shown] for row in rows])))
    return 0


def _run(seconds: float, words: str | None) -> dict[str, Any] | None:
    """pytest-benchmark's document; None where a benchmark failed, after pytest has said which."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "run.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", str(_FOLDER)]
        command += [f"--benchmark-max-time={seconds}", "--benchmark-min-rounds=3", "--timeout=0"]
        command += ["--benchmark-quiet", f"--benchmark-json={made}", f"--basetemp={scratch}/data"]
        command += ["-k", words] if words else []
        done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            return None
        document: dict[str, Any] = json.loads(made.read_text())
        return document


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
