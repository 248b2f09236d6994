"""A machine of a network of namespaces that sends back what it gets: whether packets arrive, and when."""

import socket
import subprocess
import sys
from types import TracebackType
from typing import Final, Self

from tests.faults.namespaces import Network

_ECHO: Final = """
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((sys.argv[1], 7))
print("ready", flush=True)
while True:
    data, sender = server.recvfrom(100)
    print(data.decode(), flush=True)
    server.sendto(data, sender)
"""


class Echo:
    """A machine that prints and sends back every datagram, while the `with` block lasts."""

    def __init__(self, network: Network, machine: str) -> None:
        self.address = (network.address(machine), 7)
        command = [*network.prefix(machine), sys.executable, "-c", _ECHO, self.address[0]]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.heard() == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def heard(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def answers(client: socket.socket, echo: Echo, text: str, limit_s: float = 60.0) -> bool:
    """Whether it comes back."""
    client.sendto(text.encode(), echo.address)
    client.settimeout(limit_s)
    try:
        return client.recv(100).decode() == text
    except TimeoutError:
        return False
