"""What `cairn node check` found, as a document and as a table."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from blockstore.cli import tables
from blockstore.cli.documents import Document
from blockstore.units import format_size

if TYPE_CHECKING:
    # No other command needs the storage: it is imported when a check runs.
    from blockstore.storage.check import CheckReport, ReplicaSummary


def run(data: Path) -> CheckReport:
    """What the check of a stopped node's directory found."""
    check_node: Callable[[Path], CheckReport] = import_module("blockstore.storage.check").check_node
    return check_node(data)


def document(report: CheckReport) -> Document:
    return {
        "ok": not report.problems,
        "problems": [
            {"where": str(each.where), "what": each.what, "what_to_do": each.what_to_do} for each in report.problems
        ],
        "replicas": [_replica(each) for each in report.replicas],
    }


def _replica(value: ReplicaSummary) -> Document:
    return {
        "replica": value.address.replica,
        "volume": value.address.volume,
        "segment": value.address.segment,
        "applied": {"epoch": value.applied.epoch, "sequence": value.applied.sequence},
        "epoch": value.epoch,
        "whole": value.whole,
        "blocks": value.blocks,
        "generations": list(value.generations),
        "file_bytes": value.file_bytes,
        "digest": value.digest,
        "digests": {str(generation): digest for generation, digest in value.digests.items()},
    }


def table(report: CheckReport) -> RenderableType:
    """Replicas, then problems, each with what to do."""
    replicas = tables.grid(
        ("REPLICA", "VOLUME", "STATE", "APPLIED>", "BLOCKS>", "GENERATIONS>", "ON DISK>"),
        [
            (
                each.address.replica,
                each.address.volume,
                "whole" if each.whole else "filling",
                f"{each.applied.epoch}.{each.applied.sequence}",
                f"{each.blocks:,}",
                str(len(each.generations)),
                format_size(each.file_bytes),
            )
            for each in report.replicas
        ],
    )
    if not report.problems:
        return Group(replicas, Text(), tables.state("healthy"))
    problems = tables.grid(
        ("WHERE", "PROBLEM", "WHAT TO DO"), [(str(each.where), each.what, each.what_to_do) for each in report.problems]
    )
    return Group(replicas, Text(), problems)
