"""python -m bench: Cairn and its peers side by side, over NBD, in one run."""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from bench.report import describe_machine, make_document, make_markdown
from bench.runner import Plan, run
from bench.targets import TARGETS
from bench.workloads import ALL
from blockstore.units import MIB, parse_size

#: Says nothing about speed: a check that all of it runs.
SHORT = Plan(workloads=(ALL[1], ALL[4], ALL[7]), size=16 * MIB, seconds=0.5, rounds=1, settle_s=0.2)


def read_arguments(arguments: list[str]) -> tuple[argparse.Namespace, Plan]:
    """The options, and the plan that they make."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="seconds instead of minutes: shows that it runs, not how fast"
    )
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all")
    parser.add_argument("--workloads", nargs="+", choices=[each.name for each in ALL], help="default: all")
    parser.add_argument("--size", type=parse_size, help="of each volume, such as 1G (the default)")
    parser.add_argument("--seconds", type=float, help="of each measurement (5)")
    parser.add_argument("--rounds", type=int, help="of each measurement; medians are reported (3)")
    parser.add_argument(
        "--sustained", type=float, default=0, metavar="SECONDS", help="of sequential write besides, such as 60"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        help="for the data: on the disk to measure (default: the system's for temporary files)",
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--markdown", type=Path, help="file for the tables (default: printed)")
    options = parser.parse_args(arguments)
    plan = dataclasses.replace(
        SHORT if options.short else Plan(), targets=tuple(options.targets), sustained_s=options.sustained
    )
    given = {name: getattr(options, name) for name in ("size", "seconds", "rounds") if getattr(options, name)}
    if options.workloads:
        given["workloads"] = tuple(each for each in ALL if each.name in options.workloads)
    return options, dataclasses.replace(plan, **given)


def main(arguments: list[str]) -> int:
    """Measure and report."""
    options, plan = read_arguments(arguments)
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        machine = describe_machine(Path(scratch))
        outcome = run(plan, Path(scratch), lambda line: print(line, file=sys.stderr, flush=True))
    document = make_document(plan, outcome, machine)
    if options.json:
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    markdown = make_markdown(document)
    if options.markdown:
        options.markdown.write_text(markdown)
    else:
        print(markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
