"""What a daemon's metrics page says, read by Prometheus' own parser."""

import urllib.request
from collections.abc import Iterator
from typing import Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from blockstore.control.metrics import METRICS as OF_CONTROL
from blockstore.metrics import Metric
from blockstore.node.metrics import METRICS as OF_NODES
from nbd_server.metrics import METRICS as OF_FRONT_ENDS
from snapshotd.metrics import METRICS as OF_SNAPSHOTD
from tests.daemons import Daemon

#: All that are declared, by the daemon that has them.
DECLARED: Final[dict[str, tuple[Metric, ...]]] = {
    "control": OF_CONTROL,
    "node": OF_NODES,
    "nbd": OF_FRONT_ENDS,
    "snapshotd": OF_SNAPSHOTD,
}
_LIMIT_S: Final = 30.0


class Sample(NamedTuple):
    """One line of the page."""

    name: str
    labels: dict[str, str]
    value: float


class Page:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        self.samples = [Sample(each.name, each.labels, each.value) for family in families for each in family.samples]

    @property
    def names(self) -> set[str]:
        return {each.name for each in self.samples}

    def find(self, name: str, **labels: str) -> Iterator[Sample]:
        """Those of that name with at least these labels."""
        return (each for each in self.samples if each.name == name and labels.items() <= each.labels.items())

    def value(self, name: str, **labels: str) -> float:
        """Of the one sample with these labels."""
        (found,) = self.find(name, **labels)
        return found.value

    def sum(self, name: str, **labels: str) -> float:
        return sum(each.value for each in self.find(name, **labels))


def fetch(address: str, accept: str = "") -> str:
    """The text that a daemon serves at HOST:PORT."""
    request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=_LIMIT_S) as answer:
        text: str = answer.read().decode()
    return text


def scrape(daemon: Daemon) -> Page:
    """Of a daemon that was started with --metrics."""
    return Page(fetch(daemon.read_address("metrics_address")))
