"""A disk that can be filled: a tmpfs in a mount namespace of its own, which ends with the process that holds it.

Other processes reach it through /proc/PID/root, so nothing is mounted where it could be left behind.
It takes root, or a kernel that lets users make namespaces.
"""

import subprocess
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.programs import require_found, require_programs

#: Commands that run another one where it may mount for itself: as root, and as a user where the kernel allows it.
PRIVATE_MOUNTS: Final = (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"])
_HOLD: Final = 'mount -t tmpfs -o size="$1" cairn "$2" && echo mounted && exec cat'


class SmallDisk:
    """path: its root, for any process of this user. filler: a file to make room with."""

    def __init__(self, directory: Path, size_bytes: int, filler_bytes: int) -> None:
        self._directory = directory / "small-disk"
        self._directory.mkdir()
        self._size_bytes = size_bytes
        self._filler_bytes = filler_bytes

    def __enter__(self) -> "SmallDisk":
        require_programs("unshare")
        for way in PRIVATE_MOUNTS:
            command = [*way, "sh", "-c", _HOLD, "sh", str(self._size_bytes), str(self._directory)]
            self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self._holder.stdout is not None
            if self._holder.stdout.readline() == b"mounted\n":
                self._fill()
                return self
            self._end()
        require_found(["the right to mount (root, or user namespaces)"])
        raise AssertionError("require_found came back")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def path(self) -> Path:
        return Path(f"/proc/{self._holder.pid}/root{self._directory}")

    def make_room(self) -> None:
        """Take the filler away."""
        (self.path / "filler").unlink()

    def _fill(self) -> None:
        with (self.path / "filler").open("wb") as filler:
            for _ in range(self._filler_bytes >> 20):
                filler.write(bytes(1 << 20))

    def _end(self) -> None:
        self._holder.communicate()
