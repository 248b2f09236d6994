"""NBD servers that keep one copy of a volume, in a file or in memory."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import psutil

from bench.fio import Disk
from bench.serving import Serving
from blockstore.config import split_address
from tests.daemons import Daemon, wait_for
from tests.loopback import free_address
from tests.programs import find_program

_STOP_LIMIT_S: Final = 20.0
_NBD_SERVER_CONFIG: Final = """
[generic]
listenaddr = {host}
port = {port}
[volume]
exportname = {image}
flush = true
fua = true
"""


def qemu_nbd(image_format: str, cache: str) -> Callable[[Path, int], AbstractContextManager[Serving]]:
    """image_format: raw or qcow2. cache: as QEMU names its modes."""

    def start(directory: Path, size: int) -> AbstractContextManager[Serving]:
        host, port = split_address(free_address())
        image = directory / "image"
        if image_format == "raw":
            _make_image(image, size)
        else:
            make = [str(find_program("qemu-img")), "create", "-q", "-f", image_format, str(image), str(size)]
            subprocess.run(make, check=True)
        command = ["qemu-nbd", "--persistent", "--shared=0", f"--format={image_format}", f"--cache={cache}"]
        command += ["--discard=unmap", f"--bind={host}", f"--port={port}", str(image)]
        return _server(command, f"nbd://{host}:{port}", directory)

    return start


@contextmanager
def nbd_server(directory: Path, size: int) -> Iterator[Serving]:
    """The one of the NetworkBlockDevice project."""
    host, port = split_address(free_address())
    image, config = directory / "image", directory / "config"
    _make_image(image, size)
    config.write_text(_NBD_SERVER_CONFIG.format(host=host, port=port, image=image))
    uri = f"nbd://{host}:{port}/volume"
    with running_nbd_server(config, uri) as (server, command):
        yield Serving(Disk.nbd(uri), {"server": server.pid}, (command,))


@contextmanager
def running_nbd_server(config: Path, uri: str) -> Iterator[tuple[psutil.Process, str]]:
    """nbd-server with that configuration, and its command, once it answers at the URI.

    It goes to the background by itself: in the foreground it would serve a single client.
    """
    pid_file = config.with_suffix(".pid")
    command = [str(find_program("nbd-server")), "-C", str(config), "-p", str(pid_file)]
    subprocess.run(command, check=True, capture_output=True)
    pid = wait_for("nbd-server to write its pid", lambda: pid_file.read_text().strip() if pid_file.exists() else "")
    server = psutil.Process(int(pid))
    try:
        wait_for(f"nbd-server to serve {uri}", lambda: answers(uri))
        yield server, " ".join(command)
    finally:
        server.kill()
        server.wait(_STOP_LIMIT_S)


def nbdkit_file(directory: Path, size: int) -> AbstractContextManager[Serving]:
    """Its file plugin."""
    host, port = split_address(free_address())
    image = directory / "image"
    _make_image(image, size)
    command = ["nbdkit", "-f", "-i", host, "-p", str(port), "file", str(image)]
    return _server(command, f"nbd://{host}:{port}", directory)


def nbdkit_memory(directory: Path, size: int) -> AbstractContextManager[Serving]:
    """Its memory plugin."""
    host, port = split_address(free_address())
    command = ["nbdkit", "-f", "-i", host, "-p", str(port), "memory", str(size)]
    return _server(command, f"nbd://{host}:{port}", directory)


def _make_image(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


@contextmanager
def _server(command: list[str], uri: str, directory: Path) -> Iterator[Serving]:
    with running(command, uri, directory / "log") as server:
        yield Serving(Disk.nbd(uri), {"server": server.pid}, (" ".join(map(str, server.command)),))


@contextmanager
def running(command: list[str], uri: str, log: Path) -> Iterator[Daemon]:
    """A server that stays in the foreground, once it answers at the URI."""
    name = command[0]
    server = Daemon(name, [str(find_program(name)), *command[1:]], log.parent / "none", log)
    server.start()
    try:
        wait_for(f"{name} to serve {uri}", lambda: answers(uri))
        yield server
    finally:
        server.kill()


def answers(uri: str) -> bool:
    """Whether an export is served there; a URI may name certificates."""
    return not subprocess.run(["nbdinfo", "--size", uri], capture_output=True, check=False).returncode
