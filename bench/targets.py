"""What is measured against what: Cairn with three replicas, and servers that keep one copy.

Each target serves one empty volume of a given size on the loopback while its block lasts. The peers
say how fast the machine's disk, NBD and fio are; none of them replicates, and only qemu-nbd with
cache=directsync is durable on acknowledgement, as Cairn is.
"""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.space import Space, measure_nodes
from blockstore.config import ControlSettings, FrontEndSettings, NodeSettings
from tests.cluster import Cluster
from tests.daemons import Daemon, wait_for
from tests.programs import find_program
from tests.proxy import free_address


@dataclass(frozen=True)
class Target:
    """A server that runs. pids: of its processes, by name. measure_space: None where it stores plain bytes."""

    name: str
    uri: str
    pids: dict[str, int]
    measure_space: Callable[[int], Space] | None = None


Start = Callable[[Path, int], AbstractContextManager[Target]]
"""A directory for its data, and the volume's size in bytes."""


@contextmanager
def _cairn(directory: Path, size: int) -> Iterator[Target]:
    with Cluster(
        directory,
        control_settings=ControlSettings(),
        node_settings=NodeSettings(),
        front_end_settings=FrontEndSettings(),
    ) as cluster:
        volume = cluster.create(size)
        uri = cluster.attach(volume)
        pids = {daemon.name: daemon.pid for daemon in cluster.daemons}
        nodes = [node.directory for node in cluster.nodes]
        yield Target("cairn", uri, pids, lambda user_bytes: measure_nodes(nodes, user_bytes))


def _qemu_nbd(cache: str) -> Start:
    def start(directory: Path, size: int) -> AbstractContextManager[Target]:
        host, port = free_address().split(":")
        command = ["qemu-nbd", "--persistent", "--shared=0", "--format=raw", f"--cache={cache}"]
        command += ["--discard=unmap", f"--bind={host}", f"--port={port}", str(_image(directory, size))]
        return _server(f"qemu-nbd-{cache}", command, host, port, directory)

    return start


def _nbdkit_file(directory: Path, size: int) -> AbstractContextManager[Target]:
    host, port = free_address().split(":")
    command = ["nbdkit", "-f", "-i", host, "-p", port, "file", str(_image(directory, size))]
    return _server("nbdkit-file", command, host, port, directory)


def _nbdkit_memory(directory: Path, size: int) -> AbstractContextManager[Target]:
    host, port = free_address().split(":")
    return _server(
        "nbdkit-memory", ["nbdkit", "-f", "-i", host, "-p", port, "memory", str(size)], host, port, directory
    )


#: By the names that the command line takes; what each promises stands in the report.
TARGETS: Final[dict[str, Start]] = {
    "cairn": _cairn,
    "qemu-nbd-directsync": _qemu_nbd("directsync"),
    "qemu-nbd-writeback": _qemu_nbd("writeback"),
    "nbdkit-file": _nbdkit_file,
    "nbdkit-memory": _nbdkit_memory,
}
PROMISES: Final = {
    "cairn": "3 copies, on disk on 2 nodes before a write is acknowledged",
    "qemu-nbd-directsync": "1 copy, on disk before a write is acknowledged",
    "qemu-nbd-writeback": "1 copy, in the page cache until a flush",
    "nbdkit-file": "1 copy, in the page cache until a flush",
    "nbdkit-memory": "1 copy in memory, never on disk",
}


def _image(directory: Path, size: int) -> Path:
    image = directory / "image"
    with image.open("wb") as file:
        file.truncate(size)
    return image


@contextmanager
def _server(name: str, command: list[str], host: str, port: str, directory: Path) -> Iterator[Target]:
    command[0] = str(find_program(command[0]))
    server = Daemon(name, command, directory / "none", directory / "log")
    server.start()
    uri = f"nbd://{host}:{port}"
    try:
        wait_for(f"{name} to listen", lambda: _answers(uri))
        yield Target(name, uri, {"server": server.pid})
    finally:
        server.kill()


def _answers(uri: str) -> bool:
    return not subprocess.run(["nbdinfo", "--size", uri], capture_output=True, check=False).returncode
