"""A bad link delays, loses and repeats packets as it was told to, both ways, and is gone afterwards."""

import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.daemons import wait_for
from tests.faults.bad_link import QUEUED_FRAMES, Conditions, Queue
from tests.faults.echo import Echo, answers
from tests.faults.namespaces import Network

#: Reads all, and answers with the hash and as many bytes again.
PEER = """
import hashlib, socket, sys
server = socket.create_server((sys.argv[1], 7))
print("ready", flush=True)
while True:
    client = server.accept()[0]
    with client, client.makefile("rb") as sent:
        data = sent.read()
        client.sendall(hashlib.sha256(data).digest() + data)
"""
#: So long is waited for answers that may have been lost; those that come later still count.
PATIENCE_S = 0.05
LAST_PATIENCE_S = 1.0
SENT = 200


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(["a", "b"]) as made:
        yield made


@pytest.fixture
def echo(network: Network) -> Iterator[Echo]:
    with Echo(network, "a") as running:
        yield running


def answered(echo: Echo, count: int) -> list[str]:
    """Of so many datagrams, those that came back, in the order in which they did."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        came: list[str] = []
        for number in range(count):
            client.sendto(str(number).encode(), echo.address)
            came += received(client, PATIENCE_S)
        return came + received(client, LAST_PATIENCE_S)


def received(client: socket.socket, patience_s: float) -> list[str]:
    """The next one, and those that are there."""
    came = []
    client.settimeout(patience_s)
    try:
        while True:
            came.append(client.recv(100).decode())
            client.settimeout(0)
    except (TimeoutError, BlockingIOError):
        return came


def round_trip_s(echo: Echo) -> float:
    """Of one datagram; one that was sent while the link was being changed may be lost."""

    def measured() -> float:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            began = time.monotonic()
            came = answers(client, echo, "measured", 5.0)
            return time.monotonic() - began if came else 0.0

    return wait_for("an answer", measured)


def test_a_round_trip_takes_the_delay_of_both_ways(network: Network, echo: Echo) -> None:
    network.degrade("a", Conditions(least_s=0.3, most_s=0.3), seed=1)
    assert round_trip_s(echo) >= 0.6
    network.heal()
    assert min(round_trip_s(echo) for _ in range(20)) < 0.3


def test_a_share_is_lost_and_all_arrive_again(network: Network, echo: Echo) -> None:
    """Of those that are lost with a probability of 0.2 on each of two ways, 64% come back."""
    network.degrade("a", Conditions(lost=0.2), seed=1)
    lossy = answered(echo, SENT)
    assert 0.4 * SENT < len(set(lossy)) < 0.85 * SENT
    network.heal()
    wait_for("the link to be as it was", lambda: len(answered(echo, 20)) == 20)


def test_packets_overtake_each_other_and_come_twice(network: Network, echo: Echo) -> None:
    network.degrade("a", Conditions(most_s=0.5, repeated=0.5), seed=1)
    round_trip_s(echo)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for number in range(20):
            client.sendto(str(number).encode(), echo.address)
        came: list[int] = []

        def all_came() -> bool:
            came.extend(map(int, received(client, PATIENCE_S)))
            return set(came) == set(range(20))

        wait_for("all to come back", all_came)
    assert any(after < before for before, after in pairwise(came))
    assert len(came) > 20


def test_tcp_carries_everything_across_a_bad_link(network: Network) -> None:
    """Between two machines and with this one: checksums and segments are what each expects."""
    command = [*network.prefix("a"), sys.executable, "-c", PEER, network.address("a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peer:
        try:
            assert peer.stdout is not None
            assert peer.stdout.readline() == "ready\n"
            for conditions in (Conditions(), Conditions(least_s=0.01, most_s=0.03, lost=0.02, repeated=0.02)):
                network.degrade("a", conditions, seed=1)
                carry(network.address("a"), 256 << 10)
            network.heal()
            carry(network.address("a"), 4 << 20)
        finally:
            peer.kill()


def carry(address: str, size: int) -> None:
    """So many random bytes there and back."""
    data = os.urandom(size)
    with socket.create_connection((address, 7), timeout=60) as client, client.makefile("rb") as back:
        sender = threading.Thread(target=send_all, args=(client, data))
        sender.start()
        answer = back.read()
        sender.join()
    assert answer == hashlib.sha256(data).digest() + data


def send_all(client: socket.socket, data: bytes) -> None:
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)


def test_nothing_is_left_of_it(network: Network, echo: Echo) -> None:
    """Interfaces are as they were, and the others' packets never came by."""
    before = interfaces()
    network.degrade("a", Conditions(lost=1.0), seed=1)
    assert taps()
    with Echo(network, "b") as other:
        wait_for("the other one to answer to all", lambda: len(answered(other, 5)) == 5)
    assert not answered(echo, 5)
    network.heal()
    assert interfaces() == before
    wait_for("the link to be as it was", lambda: len(answered(echo, 5)) == 5)


def test_it_ends_with_the_network() -> None:
    with Network(["a"]) as network:
        network.degrade("a", Conditions(lost=0.5), seed=1)
        assert taps()
    assert not taps()


def interfaces() -> list[str]:
    """Those that this process made on this machine, with their settings."""
    listed = subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout
    return sorted(line.split(maxsplit=1)[1] for line in listed.splitlines() if f"{os.getpid()}-" in line)


def taps() -> list[str]:
    return [each for each in interfaces() if re.match(r"c\d+t", each)]


# ---- the queue, without a clock


def test_the_same_seed_has_the_same_fates() -> None:
    def fates(seed: int) -> list[tuple[int, bytes]]:
        queue = Queue(Conditions(0.1, 0.9, lost=0.3, repeated=0.3), seed)
        for number in range(100):
            queue.put(number / 100, 5, bytes([number]))
        return list(queue.due(10.0))

    assert fates(1) == fates(1) != fates(2)


def test_frames_arrive_when_they_are_due() -> None:
    queue = Queue(Conditions(0.25, 0.25), seed=1)
    assert queue.wait_s(0.0) is None
    queue.put(1.0, 5, b"first")
    queue.put(1.0, 6, b"second")
    assert list(queue.due(1.2)) == []
    assert queue.wait_s(1.0) == 0.25
    assert list(queue.due(1.25)) == [(5, b"first"), (6, b"second")]
    assert queue.wait_s(2.0) is None
    assert queue.fates == {"came": 2, "lost": 0, "repeated": 0}


def test_frames_beyond_the_limit_are_lost() -> None:
    queue = Queue(Conditions(1.0, 1.0), seed=1)
    for _ in range(QUEUED_FRAMES + 2):
        queue.put(0.0, 5, b"frame")
    assert queue.fates["lost"] == 2
    assert len(list(queue.due(1.0))) == QUEUED_FRAMES
