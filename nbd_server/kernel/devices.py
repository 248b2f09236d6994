"""The NBD devices of this host, as sysfs, /proc and the devices themselves tell. Nothing is kept anywhere else.

The kernel keeps a *backend* text for each device that it connected: ours names the volume, the client, and how many
links the device has if not one, so that any later process knows whose device it is, and the kernel itself refuses
another one's sockets.
"""

import errno
import fcntl
import hmac
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from blockstore.errors import Conflict, InvalidRequest, NotFound

#: How often the kernel looks whether a request in flight has to be sent again over a new socket, where there is one
#: (for several, see handover.SLOW_S). Its timers are rounded up to whole seconds, so a shorter time than this gains
#: nothing.
RETRY_MS: Final = 500
_SECTOR_BYTES: Final = 512
_DEVICE: Final = re.compile(r"(?:/dev/)?nbd(\d{1,5})")
_BACKEND: Final = re.compile(r"cairn:([^:]+):([^:]+)(?::([1-9]\d?))?")
#: Fields of /sys/block/*/stat (Linux, Documentation/block/stat.rst): completed reads, writes, discards, flushes.
_COMPLETED_FIELDS: Final = (0, 4, 11, 15)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a device is. connections: how many links it has; that stays so while it is connected."""

    volume: str
    client: str
    connections: int = field(default=1, compare=False)

    @property
    def backend(self) -> str:
        """The text that the kernel keeps."""
        return f"cairn:{self.volume}:{self.client}" + (f":{self.connections}" if self.connections > 1 else "")


@dataclass(frozen=True, slots=True)
class LocalDevice:
    """A device that is connected. owner: None where it was not `cairn attach` that connected it.

    used_by: where it is mounted, and what else has it open; empty where nobody does.
    """

    index: int
    owner: Owner | None
    size_bytes: int
    read_only: bool
    used_by: tuple[str, ...]

    @property
    def path(self) -> str:
        return f"/dev/nbd{self.index}"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of a device: in flight now, and completed since it is there."""

    in_flight: int
    completed: int


def device_index(name: str) -> int:
    """The index of /dev/nbdN, with or without /dev/. Raises InvalidRequest."""
    found = _DEVICE.fullmatch(name)
    if found is None:
        raise InvalidRequest(f"{name!r} is no NBD device: write it as /dev/nbd0")
    return int(found[1])


def is_device_name(name: str) -> bool:
    """Whether `name` means a device rather than a volume."""
    return _DEVICE.fullmatch(name) is not None


class Host:
    """The devices of this host. root: of its file system; another one for tests."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._sys = root / "sys" / "block"
        self._proc = root / "proc"
        self._dev = root / "dev"
        self._run = root / "run" / "cairn"
        self._machine_id = root / "etc" / "machine-id"

    def devices(self) -> Iterator[LocalDevice]:
        """All that are connected, by index."""
        names = (each.name for each in self._sys.glob("nbd*"))
        for index in sorted(device_index(name) for name in names if is_device_name(name)):
            if (found := self.find(index)) is not None:
                yield found

    def find(self, index: int) -> LocalDevice | None:
        """The device of that index; None where it is not connected."""
        place = self._sys / f"nbd{index}"
        try:
            (place / "pid").read_text()
            size = int((place / "size").read_text()) * _SECTOR_BYTES
            read_only = (place / "ro").read_text().strip() == "1"
        except FileNotFoundError:
            return None
        return LocalDevice(index, self.owner(index), size, read_only, tuple(self._uses(index)))

    def owner(self, index: int) -> Owner | None:
        """Whose device it is now; None where it is not connected, or by somebody else than `cairn attach`."""
        place = self._sys / f"nbd{index}"
        try:
            (place / "pid").read_text()
            found = _BACKEND.fullmatch((place / "backend").read_text().strip())
        except OSError:  # it is being disconnected
            return None
        return Owner(found[1], found[2], int(found[3] or 1)) if found else None

    def traffic(self, index: int) -> Traffic:
        """Its requests."""
        place = self._sys / f"nbd{index}"
        counts = [int(each) for each in (place / "stat").read_text().split()]
        in_flight = sum(int(each) for each in (place / "inflight").read_text().split())
        return Traffic(in_flight, sum(counts[field] for field in _COMPLETED_FIELDS if field < len(counts)))

    def set_retry_interval(self, index: int) -> None:
        """See RETRY_MS; NBD_ATTR_TIMEOUT sets another one each time that it is given."""
        (self._sys / f"nbd{index}" / "queue" / "io_timeout").write_text(f"{RETRY_MS}\n")

    def flush(self, index: int) -> None:
        """What was written to the device and not yet sent goes to the replicas. Raises OSError."""
        with self._opened(index, os.O_RDWR) as device:
            os.fsync(device)

    def is_claimed(self, index: int) -> bool:
        """Whether a file system, swap, LVM or the like has the device; nobody can from then on, until it is let go."""
        try:
            with self._opened(index, os.O_RDONLY | os.O_EXCL):
                return False
        except OSError as error:
            if error.errno == errno.EBUSY:
                return True
            raise

    # ---- who watches

    def client(self) -> str:
        """This host's name for control: the same after a restart, and no other host's. Raises InvalidRequest.

        machine-id(5) asks to be hashed before anybody else sees it.
        """
        try:
            machine = self._machine_id.read_text().strip()
        except FileNotFoundError:
            machine = ""
        if not machine:
            raise InvalidRequest(f"{self._machine_id} holds no id: name this host with --client")
        return "host-" + hmac.digest(machine.encode(), b"cairn attach", "sha256").hex()[:16]

    @contextmanager
    def watching(self, volume: str) -> Iterator[None]:
        """This process attaches and watches the volume. Raises Conflict where another one does."""
        self._run.mkdir(parents=True, exist_ok=True)
        with self._lock_file(volume, os.O_RDWR | os.O_CREAT) as number:
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Conflict(f"another `cairn attach` of {volume} is running on this host") from error
            yield

    def is_watched(self, volume: str) -> bool:
        """Whether a process attaches and watches the volume."""
        try:
            with self._lock_file(volume, os.O_RDONLY) as number:
                fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def _lock_file(self, volume: str, flags: int) -> Iterator[int]:
        number = os.open(self._run / f"attach-{volume}.lock", flags | os.O_CLOEXEC, 0o644)
        try:
            yield number
        finally:
            os.close(number)

    # ---- inside

    @contextmanager
    def _opened(self, index: int, flags: int) -> Iterator[int]:
        path = self._dev / f"nbd{index}"
        try:
            number = os.open(path, flags | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound(f"there is no device {path}") from error
        try:
            yield number
        finally:
            os.close(number)

    def _uses(self, index: int) -> Iterator[str]:
        place = self._sys / f"nbd{index}"
        names = [f"nbd{index}", *sorted(each.name for each in place.glob(f"nbd{index}p*"))]
        for name in names:
            part = place if name == place.name else place / name
            yield from self._mounts(name, (part / "dev").read_text().strip() if (part / "dev").exists() else "")
            yield from (f"held by {each.name}" for each in sorted((part / "holders").glob("*")))
            if any(line.split(" ")[0] == f"/dev/{name}" for line in self._lines("swaps")):
                yield "swap"

    def _mounts(self, name: str, number: str) -> Iterator[str]:
        """Source: proc(5), mountinfo: 3rd field major:minor, 5th mount point, after " - " type and source."""
        for line in self._lines("self/mountinfo"):
            fields, _, rest = line.partition(" - ")
            about = fields.split(" ")
            if about[2] == number or rest.split(" ")[1] == f"/dev/{name}":
                yield f"mounted at {about[4].encode().decode('unicode_escape')}"

    def _lines(self, name: str) -> list[str]:
        path = self._proc / name
        return path.read_text().splitlines() if path.exists() else []
