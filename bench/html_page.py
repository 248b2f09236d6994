"""The report as one page that needs nothing else: charts, tables, and the commands that give the figures."""

from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.charts import latency_chart, rate_chart
from bench.markdown import tables
from blockstore.units import format_size

_TEMPLATE: Final = "report.html.jinja"


def make_html(document: dict[str, Any]) -> str:
    """document: as bench.report makes it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    rounds: dict[str, dict[str, Any]] = document["rounds"]
    workloads = next(iter(rounds.values()))
    return environment.get_template(_TEMPLATE).render(
        document=document,
        size=format_size(document["plan"]["size_bytes"]),
        charts=[(rate_chart(each, rounds), latency_chart(each, rounds)) for each in workloads],
        tables=tables(document),
    )
