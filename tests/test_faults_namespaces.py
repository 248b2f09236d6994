"""The network of namespaces drops what it is told to, one way, and leaves nothing behind."""

import socket
import subprocess
from collections.abc import Iterator

import pytest

from tests.daemons import wait_for
from tests.faults.echo import Echo, answers
from tests.faults.namespaces import HOST, Network

#: So long is waited for what is not to arrive.
LOST_S = 0.5


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(["a"]) as made:
        yield made


@pytest.fixture
def echo(network: Network) -> Iterator[Echo]:
    with Echo(network, "a") as running:
        yield running


def test_packets_are_dropped_one_way_both_ways_and_arrive_again(network: Network, echo: Echo) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        assert answers(client, echo, "plain")
        assert echo.heard() == "plain"
        network.drop("a", HOST)
        assert not answers(client, echo, "one way", LOST_S)
        assert echo.heard() == "one way"
        network.heal()
        assert answers(client, echo, "again")
        assert echo.heard() == "again"
        network.drop(HOST, "a")
        assert not answers(client, echo, "lost", LOST_S)
        network.heal()
        network.unplug("a")
        assert not answers(client, echo, "unplugged", LOST_S)
        network.heal()
        wait_for("the cable to carry", lambda: answers(client, echo, "back", LOST_S))
        # What the host sends without a cable it may keep until it finds the machine again.
        heard = set(iter(echo.heard, "back"))
        assert heard <= {"unplugged"}


def test_nothing_is_left(network: Network) -> None:
    with Network(["b", "c"]) as other:
        names = [other.prefix(machine)[-1] for machine in other.machines]
        assert set(names) <= set(namespaces())
    assert not set(names) & set(namespaces())


def namespaces() -> list[str]:
    """Those of this machine."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines()]
