"""The network of namespaces drops what it is told to, one way, and leaves nothing behind."""

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.daemons import wait_for
from tests.faults.namespaces import HOST, Network

ECHO = """
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((sys.argv[1], 7))
print("ready", flush=True)
while True:
    data, sender = server.recvfrom(100)
    print(data.decode(), flush=True)
    server.sendto(data, sender)
"""
#: So long is waited for what is not to arrive.
LOST_S = 0.5


class Echo:
    """A machine that prints and sends back every datagram."""

    def __init__(self, network: Network, machine: str) -> None:
        self.address = (network.address(machine), 7)
        command = [*network.prefix(machine), sys.executable, "-c", ECHO, self.address[0]]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.heard() == "ready"

    def heard(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(["a"]) as made:
        yield made


@pytest.fixture
def echo(network: Network) -> Iterator[Echo]:
    made = Echo(network, "a")
    yield made
    made.process.kill()
    made.process.communicate()


def answers(client: socket.socket, echo: Echo, text: str, limit_s: float = 60.0) -> bool:
    """Whether it comes back."""
    client.sendto(text.encode(), echo.address)
    client.settimeout(limit_s)
    try:
        return client.recv(100).decode() == text
    except TimeoutError:
        return False


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
