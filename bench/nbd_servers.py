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
    """The one of the NetworkBlockDevice project. In the foreground it would serve a single client."""
    host, port = split_address(free_address())
    image, config, pid_file = directory / "image", directory / "config", directory / "pid"
    _make_image(image, size)
    config.write_text(_NBD_SERVER_CONFIG.format(host=host, port=port, image=image))
    command = [str(find_program("nbd-server")), "-C", str(config), "-p", str(pid_file)]
    subprocess.run(command, check=True, capture_output=True)
    pid = wait_for("nbd-server to write its pid", lambda: pid_file.read_text().strip() if pid_file.exists() else "")
    server = psutil.Process(int(pid))
    uri = f"nbd://{host}:{port}/volume"
    try:
        wait_for(f"nbd-server to serve {uri}", lambda: _answers(uri))
        yield Serving(Disk.nbd(uri), {"server": server.pid}, (" ".join(command),))
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
    name = command[0]
    command[0] = str(find_program(name))
    server = Daemon(name, command, directory / "none", directory / "log")
    server.start()
    try:
        wait_for(f"{name} to serve {uri}", lambda: _answers(uri))
        yield Serving(Disk.nbd(uri), {"server": server.pid}, (" ".join(command),))
    finally:
        server.kill()


def _answers(uri: str) -> bool:
    return not subprocess.run(["nbdinfo", "--size", uri], capture_output=True, check=False).returncode
