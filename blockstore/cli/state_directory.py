"""The directory in which `cairn up` keeps a cluster, and what is where in it.

    lock            held while a cluster runs here; holds the pid of its supervisor
    cluster.json    the plan: which nodes there are, and where everything listens
    processes.json  the pids of the processes that run now
    prometheus-targets.json  where each process serves its metrics, for file_sd_configs of Prometheus
    control/  node-1/ … node-N/  nbd/  snapshotd/       the data of each process
    store/          snapshots, unless an object store elsewhere was given; not the keys, which are in snapshotd/
    log/            what each process says

The plan is what the next `up` resumes with, and how commands find control without being told.
Files that others read are replaced as a whole, so nobody ever sees half of one.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from blockstore.durable_files import sync_path
from blockstore.errors import Conflict, Corrupt

#: The state directory holds guests' data: nobody else may look.
_PRIVATE: Final = 0o700
_FORMAT: Final = 1
_LATER: Final = ("snapshotd", "store", "s3_endpoint", "metrics")


#: For Prometheus: "File-based service discovery".
TARGETS_FILE: Final = "prometheus-targets.json"


@dataclass(frozen=True, slots=True)
class PlannedNode:
    """A node of the cluster. name: also of its directory and its log."""

    name: str
    zone: str
    listen: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each process of a cluster listens, HOST:PORT. nbd is for NBD clients, front_end for gRPC.

    store: URL or path of the object store, empty for the directory's own; s3_endpoint: of its server, if it has one.
    metrics: where each process serves its own, by the process's name.
    A plan of an older cairn has none of the last four.
    """

    control: str
    nbd: str
    front_end: str
    nodes: tuple[PlannedNode, ...]
    snapshotd: str = ""
    store: str = ""
    s3_endpoint: str = ""
    metrics: Mapping[str, str] = field(default_factory=dict)

    @property
    def processes(self) -> tuple[str, ...]:
        """The names of all that run."""
        return ("control", *(node.name for node in self.nodes), "nbd", "snapshotd")


def _is_alive(pid: int) -> bool:
    """Whether a process has that pid now, whosever it is."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


class StateDirectory:
    """Paths and files of one cluster; nothing is made before `make`."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def make(self) -> None:
        """Create it where it is missing."""
        self.path.mkdir(parents=True, exist_ok=True, mode=_PRIVATE)
        (self.path / "log").mkdir(exist_ok=True)

    def data(self, name: str) -> Path:
        """The directory of the process `name`."""
        return self.path / name

    @property
    def targets(self) -> Path:
        """The file that tells Prometheus where metrics are."""
        return self.path / TARGETS_FILE

    def log(self, name: str) -> Path:
        """The file for what the process `name` says."""
        return self.path / "log" / f"{name}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else runs a cluster here meanwhile. Raises Conflict.

        The lock goes with the process, however it ends; the file stays.
        """
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Conflict(
                    f"a cluster runs in {self.path} already (pid {file.read().strip()}): "
                    "stop it with `cairn down`, or choose another directory with --state"
                ) from error
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield
            file.seek(0)
            file.truncate()

    def supervisor(self) -> int | None:
        """The pid of the `cairn up` that runs here now; None where none does.

        The lock is tried only where the pid in it is alive, so that a look never gets in the way of a start.
        """
        try:
            file = (self.path / "lock").open()
        except (FileNotFoundError, NotADirectoryError):
            return None
        with file:
            text = file.read().strip()
            if not text.isdigit() or not _is_alive(int(text)):
                return None
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(text)
        return None

    def read_plan(self) -> Plan | None:
        """What was written last; None in a new directory. Raises Corrupt."""
        document = self._read("cluster.json")
        if document is None:
            return None
        try:
            nodes = tuple(PlannedNode(**each) for each in document["nodes"])
            later = {name: document[name] for name in _LATER if name in document}
            return Plan(document["control"], document["nbd"], document["front_end"], nodes, **later)
        except (KeyError, TypeError) as error:
            raise Corrupt(
                f"{self.path / 'cluster.json'} is no plan of a cluster ({error}): mend or remove it"
            ) from error

    def write_plan(self, plan: Plan) -> None:
        """Durably: the next `up` must find the nodes that have data."""
        self._write("cluster.json", {"format": _FORMAT, **asdict(plan)}, durable=True)
        targets = [{"targets": [address], "labels": {"process": name}} for name, address in plan.metrics.items()]
        self._write(TARGETS_FILE, targets, durable=False)

    def read_processes(self) -> dict[str, int]:
        """The pid of each process that runs, by name. Raises Corrupt."""
        return self._read("processes.json") or {}

    def write_processes(self, pids: Mapping[str, int]) -> None:
        self._write("processes.json", dict(pids), durable=False)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            document = json.loads((self.path / name).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise Corrupt(f"{self.path / name} is no JSON ({error}): mend or remove it") from error
        return document if isinstance(document, dict) else {}

    def _write(self, name: str, document: object, durable: bool) -> None:
        fresh = self.path / f"{name}.new"
        with fresh.open("w") as file:
            json.dump(document, file, indent=2)
            file.write("\n")
            file.flush()
            if durable:
                os.fsync(file.fileno())
        fresh.rename(self.path / name)
        if durable:
            sync_path(self.path)
