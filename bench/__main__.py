"""python -m bench: Cairn and its peers side by side, in one run: volumes with fio, and backups."""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from bench.html_page import make_html
from bench.markdown import make_markdown
from bench.report import describe_machine, make_document
from bench.runner import Outcome, Plan, run
from bench.snapshots import measure_backups, seconds_of, texts_of
from bench.targets import TARGETS
from bench.workloads import ALL, QUICK
from blockstore.units import GIB, MIB, parse_size

#: Less than three minutes, on two cores and with all peers.
QUICK_PLAN = Plan(workloads=QUICK, size=128 * MIB, seconds=1, warm_s=0.2, rounds=1, settle_s=1)


def read_arguments(arguments: list[str]) -> tuple[argparse.Namespace, Plan]:
    """The options, and the plan that they make. Ends the program where a target was named that cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="within three minutes: a first look, in one round")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), help="default: all whose programs are installed")
    parser.add_argument("--workloads", nargs="+", choices=[each.name for each in ALL], help="default: all")
    parser.add_argument("--size", type=parse_size, help="of each volume, such as 1G (the default)")
    parser.add_argument("--seconds", type=float, help="of each measurement (5)")
    parser.add_argument("--rounds", type=int, help="of each measurement; medians are reported (3)")
    parser.add_argument(
        "--sustained", type=float, default=0, metavar="SECONDS", help="of sequential write besides, such as 60"
    )
    parser.add_argument(
        "--backups", type=parse_size, nargs="?", const=GIB, metavar="SIZE",
        help="also back up and restore an image of so much (1G), beside restic and borg",
    )  # fmt: skip
    parser.add_argument(
        "--directory",
        type=Path,
        help="for the data: on the disk to measure (default: the system's for temporary files)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("bench/results/report"), metavar="NAME",
        help="NAME.json and NAME.html are written (bench/results/report)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    for name in options.targets or ():
        if missing := TARGETS[name].missing():
            parser.error(f"{name} cannot be measured here: install {', '.join(missing)}")
    return options, _plan(options)


def _plan(options: argparse.Namespace) -> Plan:
    targets = options.targets or [each.name for each in TARGETS.values() if not each.missing()]
    plan = dataclasses.replace(
        QUICK_PLAN if options.quick else Plan(), targets=tuple(targets), sustained_s=options.sustained
    )
    given = {name: getattr(options, name) for name in ("size", "seconds", "rounds") if getattr(options, name)}
    if options.workloads:
        given["workloads"] = tuple(each for each in ALL if each.name in options.workloads)
    return dataclasses.replace(plan, **given)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Measure and report."""
    options, plan = read_arguments(arguments)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        scratch = Path(name)
        machine = describe_machine(scratch)
        (scratch / "volumes").mkdir()
        outcome: Outcome = run(plan, scratch / "volumes", _say)
        if options.backups:
            backups = measure_backups(scratch, options.backups, _say)
            outcome.backups, outcome.backup_seconds = texts_of(backups), seconds_of(backups)
    left_out = {} if options.targets else {each.name: lack for each in TARGETS.values() if (lack := each.missing())}
    document = make_document(plan, outcome, machine, left_out)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    page = options.output.with_suffix(".html")
    options.output.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
    page.write_text(make_html(document))
    print(make_markdown(document))
    _say(f"charts: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
