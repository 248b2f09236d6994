"""The page on metrics, and the sample rules, name what is declared, and nothing else."""

import re
from pathlib import Path

import pytest

from blockstore.metrics import Kind, Metric
from tests.metrics_page import DECLARED

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "metrics.md").read_text()
RULES = (ROOT / "docs" / "prometheus" / "alerts.yml").read_text()
_SUFFIXES = {Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}


def row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind.value} | {labels} | {metric.help} |"


@pytest.mark.parametrize("daemon", DECLARED)
def test_the_page_has_each_metric_as_it_is_declared(daemon: str) -> None:
    rows = [row(metric) for metric in DECLARED[daemon]]
    (section,) = re.findall(
        rf"^## Of [^\n]*`cairn {daemon} run`[^\n]*\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE
    )
    found = [line for line in section.splitlines() if line.startswith("| `")]
    assert found == rows, "put these lines there:\n" + "\n".join(rows)


def sample_names() -> set[str]:
    """As they stand in expressions."""
    metrics = [metric for declared in DECLARED.values() for metric in declared]
    return {metric.name + suffix for metric in metrics for suffix in _SUFFIXES.get(metric.kind, ("",))}


def test_the_rules_name_metrics_that_are_there() -> None:
    expressions = re.findall(r"^ +expr: (.+)$", RULES, re.MULTILINE)
    assert len(expressions) == RULES.count("- alert: ")
    named = {name for each in expressions for name in re.findall(r"\bcairn_\w+", each)}
    assert len(named) > 15
    assert named <= sample_names()


def test_examples_on_the_page_name_metrics_that_are_there() -> None:
    examples = re.findall(r"^    (.*cairn_.*)$", PAGE, re.MULTILINE)
    named = {name for each in examples for name in re.findall(r"\bcairn_\w+", each)}
    assert len(named) > 3
    assert named <= sample_names()


def test_alerts_on_the_page_are_there() -> None:
    alerts = set(re.findall(r"- alert: (\w+)", RULES))
    assert set(re.findall(r"`(Cairn\w+)`", PAGE)) <= alerts
