"""The report says what was measured: medians, shape, tables. No figure is judged."""

from typing import Any

from bench.report import make_document, make_markdown
from bench.runner import Outcome, Plan

MACHINE = {
    "cores": 2,
    "memory_mib": 4096,
    "kernel": "6.1",
    "python": "3.11",
    "load_average": 0.1,
    "fdatasync_4k_ms": 0.3,
}


def round_of(iops: float) -> dict[str, Any]:
    figures = {"iops": iops, "mib_s": iops / 256, "p50_us": 100.0, "p99_us": 2000.0, "client_cores": 0.5}
    return {**figures, "processes": {"node-0": {"cores": iops / 1000, "private_mib": 50.0}}}


def outcome() -> Outcome:
    space = {
        "user_bytes": 1 << 20, "replicas": 3, "tables_bytes": 3 << 20, "journal_bytes": 0, "ballast_bytes": 0,
        "tables_per_user_byte_and_replica": 1.0,
    }  # fmt: skip
    return Outcome(
        results={"cairn": {"randwrite-4k-1": [round_of(iops) for iops in (900.0, 700.0, 800.0)]}},
        space={"cairn": {"after fill": space}},
        sustained={"cairn": {"mib_s": 120.0, "low_mib_s": 90.0, "high_mib_s": 200.0}},
    )


def test_the_document_has_medians_of_every_figure() -> None:
    document = make_document(Plan(), outcome(), MACHINE)
    median = document["medians"]["cairn"]["randwrite-4k-1"]
    assert (median["iops"], median["processes"]["node-0"]["cores"]) == (800.0, 0.8)
    assert len(document["rounds"]["cairn"]["randwrite-4k-1"]) == 3


def test_the_tables_show_it() -> None:
    text = make_markdown(make_document(Plan(), outcome(), MACHINE))
    assert "| randwrite-4k-1 | 800 (0.10 / 2.00) |" in text
    assert "| cairn | 120 | 90 | 200 |" in text
    assert "| cairn: node-0 | 0.80 | 50 |" in text
    assert "| cairn after fill | 1.000 | 3 MiB | 0 B | 0 B |" in text
    widths = {line.count(" | ") for line in text.split("\n\n")[-1].strip().splitlines()}
    assert len(widths) == 1, "a row has another number of cells than its head"
