"""What a process imports until it serves: the front-end, nodes and control are back in the time that this takes.

Each process is a real one. A library that it does not need costs tens to hundreds of milliseconds at every start.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Parsers and tables, for people.
_FOR_PEOPLE = {"typer", "pydantic", "rich", "pygments", "psutil"}
_OBJECT_STORE = {"obstore", "zstandard", "cryptography", "blake3"}
_KERNEL = {"pyroute2"}
#: What only somebody who looks in with grpcurl needs.
_REFLECTION = {"grpc_reflection.v1alpha.reflection", "google.protobuf.descriptor_pb2"}

#: What only somebody who looks at metrics needs: imported when the first of them asks.
_METRICS = {"prometheus_client"}

_SAY = "import sys; print('imported', *sys.modules)"


def imported_by(code: str, directory: Path) -> set[str]:
    """All that a new interpreter has imported after `code`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{_SAY}"],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return set(done.stdout.rpartition("imported ")[2].split())


def started(name: str) -> str:
    """Code that does all that `cairn NAME run` does until the daemon itself begins: that is imported, and not run."""
    return f"""
from blockstore.cli import daemon_process, main
daemon_process.find_daemon({name!r})
async def end(settings): return 7
daemon_process.find_daemon = lambda name: end
assert main.run([{name!r}, "run", "--listen", "127.0.0.1:0"]) == 7
"""


@pytest.mark.parametrize(
    ("name", "unneeded"),
    [
        ("nbd", {"lmdb"} | _OBJECT_STORE | _KERNEL),
        ("node", _OBJECT_STORE | _KERNEL),
        ("control", _OBJECT_STORE | _KERNEL),
        ("snapshotd", _KERNEL),
    ],
)
def test_a_daemon_imports_what_it_needs(name: str, unneeded: set[str], tmp_path: Path) -> None:
    reached = imported_by(started(name), tmp_path)
    assert {"uvloop", "structlog", "grpc"} <= reached, "that was no daemon's start"
    assert reached & (unneeded | _FOR_PEOPLE | _REFLECTION | _METRICS) == set()


@pytest.mark.parametrize(
    ("line", "module"),
    [("volume list -h", "volume"), ("status -h", "status"), ("node list -h", "node"), ("nbd run -h", "nbd")],
)
def test_a_command_imports_its_own_module(line: str, module: str, tmp_path: Path) -> None:
    reached = imported_by(f"from blockstore.cli import main; main.run({line.split()!r})", tmp_path)
    nouns = {
        "up",
        "demo",
        "host",
        "snapshot",
        "store",
        "key",
        "control",
        "snapshotd",
        "volume",
        "status",
        "node",
        "nbd",
    }
    assert {noun for noun in nouns if f"blockstore.cli.{noun}" in reached} == {module}
    assert reached & ({"psutil", "uvloop", "lmdb"} | _OBJECT_STORE | _KERNEL) == set()
