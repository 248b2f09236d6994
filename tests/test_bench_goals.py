"""Each goal is judged by the figures that it names, and what was not measured is not met."""

from typing import Any

from bench.goals import GOALS, judge
from bench.markdown import make_markdown
from bench.report import make_document
from bench.runner import Outcome, Plan
from tests.test_bench_report import MACHINE, round_of

CEPH, QEMU = "ceph-rbd", "qemu-nbd-directsync"


def judged(outcome: Outcome) -> dict[str, dict[str, Any]]:
    return {each["goal"]: each for each in make_document(Plan(), outcome, MACHINE)["goals"]}


def rounds(iops: float, **figures: float) -> list[dict[str, Any]]:
    return [{**round_of(iops * drift), **figures} for drift in (1.0, 0.9, 1.1)]


def test_a_goal_is_met_by_the_median_of_the_rounds_ratios() -> None:
    fast, slow = "randwrite-4k-32", "randread-4k-32"
    outcome = Outcome(
        results={
            "cairn": {fast: rounds(11_000), slow: rounds(2_900)},
            CEPH: {fast: rounds(1_000), slow: rounds(1_000)},
            QEMU: {fast: rounds(11_500), slow: rounds(1)},
        }
    )
    goals = judged(outcome)
    assert goals[f"{fast}, rate: at least 10 times {CEPH}"] == {
        "goal": f"{fast}, rate: at least 10 times {CEPH}",
        "reached": "11,000", "ratio": "11.00", "met": True,
    }  # fmt: skip
    assert goals[f"{fast}, rate: at least 1 times {QEMU}"]["met"] is False
    assert goals[f"{slow}, rate: at least 3 times {CEPH}"]["met"] is False


def test_a_latency_is_to_be_low_and_a_rate_high() -> None:
    workload = "randwrite-4k-1"
    outcome = Outcome(
        results={"cairn": {workload: rounds(10, p50_us=350.0, cpu_us=101.0)}, CEPH: {workload: rounds(10, p50_us=1e3)}}
    )
    goals = judged(outcome)
    assert goals[f"{workload}, p50: at most 0.35 times {CEPH}"]["met"] is True
    assert goals[f"{workload}, CPU of all processes for each: at most 100 us"]["met"] is False


def test_backups_are_judged_by_speed_and_sustained_writes_by_their_mean() -> None:
    outcome = Outcome(
        sustained={"cairn": {"mib_s": 119.0}, CEPH: {"mib_s": 100.0}},
        backup_seconds={"cairn": {"full": 2.0, "increment": 1.0}, "restic": {"full": 3.0, "increment": 19.9}},
    )
    goals = judged(outcome)
    assert goals["full, speed (--backups): at least 1.5 times restic"]["met"] is True
    assert goals["increment, speed (--backups): at least 20 times restic"]["met"] is False
    assert goals[f"sequential write with checkpoints (--sustained): at least 1.2 times {CEPH}"]["met"] is False


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    empty = Outcome(results={"cairn": {"read-1m-8": rounds(10)}})
    outcomes = judge(make_document(Plan(), empty, MACHINE))
    assert [each["met"] for each in outcomes] == [None] * len(GOALS)


def test_the_tables_begin_with_the_goals() -> None:
    outcome = Outcome(results={"cairn": {"read-1m-8": rounds(12)}, CEPH: {"read-1m-8": rounds(10)}})
    outcome.sustained = {name: {"mib_s": 1.0, "low_mib_s": 1.0, "high_mib_s": 1.0} for name in ("cairn", CEPH)}
    text = make_markdown(make_document(Plan(), outcome, MACHINE))
    assert f"| read-1m-8, rate: at least 1 times {CEPH} | 12 | 1.20 | met |" in text
    assert f"(--sustained): at least 1.2 times {CEPH} | 1 MiB/s | 1.00 | not met |" in text
    assert "| full, speed (--backups): at least 1.5 times restic |  |  | not measured |" in text
    assert text.index("Goals:") < text.index("Rate, and latency")
