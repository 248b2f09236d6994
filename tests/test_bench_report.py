"""The report says what was measured: medians, ratios, tables, charts. No figure is judged."""

from typing import Any

from bench.html_page import make_html
from bench.markdown import make_markdown
from bench.report import make_document
from bench.runner import Outcome, Plan

MACHINE = {
    "cores": 2,
    "cpu": "some",
    "memory_mib": 4096,
    "kernel": "6.1",
    "python": "3.11",
    "load_average": 0.1,
    "fdatasync_4k_ms": 0.3,
    "versions": {"fio": "fio-<3>"},
}


def round_of(iops: float) -> dict[str, Any]:
    figures = {
        "iops": iops,
        "mib_s": iops / 256,
        "p50_us": 100.0,
        "p99_us": 2000.0,
        "client_cores": 0.5,
        "cpu_us": 90.0,
    }
    return {**figures, "processes": {"node-0": {"cores": iops / 1000, "private_mib": 50.0}}}


def outcome() -> Outcome:
    space = {
        "user_bytes": 1 << 20, "replicas": 3, "tables_bytes": 3 << 20, "journal_bytes": 0, "ballast_bytes": 0,
        "tables_per_user_byte_and_replica": 1.0,
    }  # fmt: skip
    return Outcome(
        results={
            "cairn": {"randwrite-4k-1": [round_of(iops) for iops in (900.0, 700.0, 800.0)]},
            "nbd-server": {"randwrite-4k-1": [round_of(iops) for iops in (300.0, 700.0, 200.0)]},
        },
        space={"cairn": {"after fill": space}},
        sustained={"cairn": {"mib_s": 120.0, "low_mib_s": 90.0, "high_mib_s": 200.0}},
        commands={"cairn": {"servers": ["cairn node run"], "environment": {"A": "b"}, "fio": {"w": "fio --rw=w"}}},
        backups={"cairn": {"full": "3 s"}, "borg": {"full": "9 s", "restore": "1 s"}},
    )


def test_the_document_has_medians_of_every_figure() -> None:
    document = make_document(Plan(), outcome(), MACHINE)
    median = document["medians"]["cairn"]["randwrite-4k-1"]
    assert (median["iops"], median["processes"]["node-0"]["cores"]) == (800.0, 0.8)
    assert len(document["rounds"]["cairn"]["randwrite-4k-1"]) == 3


def test_each_round_is_compared_with_the_same_round_of_a_peer() -> None:
    (peer,) = make_document(Plan(), outcome(), MACHINE)["ratios"].items()
    assert peer[0] == "nbd-server"
    assert peer[1]["randwrite-4k-1"]["iops"] == [1.0, 3.0, 4.0]


def test_the_tables_show_it() -> None:
    text = make_markdown(make_document(Plan(), outcome(), MACHINE, {"ceph-rbd": ["ceph-osd"]}))
    assert "| randwrite-4k-1 | 800 (0.10 / 2.00) | 300 (0.10 / 2.00) |" in text
    assert "| randwrite-4k-1 | 3.00 (1.00 to 4.00), 1.00 |" in text
    assert "| randwrite-4k-1 | 90 | 90 |" in text
    assert "| cairn | 120 | 90 | 200 |" in text
    assert "| cairn: node-0 | 0.80 | 50 |" in text
    assert "| cairn after fill | 1.000 | 3 MiB | 0 B | 0 B |" in text
    assert "| restore |  | 1 s |" in text
    assert "ceph-rbd was left out: ceph-osd missing" in text
    for block in text.split("\n\n"):
        lines = [line for line in block.strip().splitlines() if line.startswith("|")]
        assert len({line.count(" | ") for line in lines}) <= 1, "a row has another number of cells than its head"


def test_the_page_needs_nothing_else_and_shows_all_of_it() -> None:
    page = make_html(make_document(Plan(), outcome(), MACHINE, {"ceph-rbd": ["ceph-osd"]}))
    assert page.count("<svg") == page.count("</svg>") == 2
    for shown in ("3.00 (1.00 to 4.00)", "fio --rw=w", "export A=b", "fio-&lt;3&gt;", "ceph-rbd was left out"):
        assert shown in page
    assert "<script" not in page
    assert "src=" not in page
