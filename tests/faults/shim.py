"""The shim between a process and the C library (shim.c): built once, and steered while the process runs.

steering = Steering(directory)
daemon.environment |= steering.environment
steering.set(sync_least_us=200_000, sync_most_us=200_000)     # its disk is slow from here on

A program that goes past the C library, as those in Go do, has only its wall clock moved, by clock.c: its command then
begins with `steering.clock()`.
"""

import functools
import mmap
import platform
import struct
import subprocess
import tempfile
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Final

from tests.programs import require_found, require_programs

_HERE: Final = Path(__file__).parent
_FLAGS: Final = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


@functools.cache
def _built(source: str, *options: str) -> Path:
    """What gcc makes of it, once in this process."""
    require_programs("gcc")
    directory = tempfile.TemporaryDirectory(prefix="cairn-shim-")
    _kept.append(directory)
    target = Path(directory.name) / source.removesuffix(".c")
    subprocess.run(["gcc", *_FLAGS, "-o", target, _HERE / source, *options], check=True, timeout=60)
    return target


#: Removed when this process ends.
_kept: Final[list[tempfile.TemporaryDirectory[str]]] = []


@dataclass(frozen=True)
class Conditions:
    """The fields of shim.c's `struct control`, in its order."""

    clock_offset_ns: int = 0
    sync_least_us: int = 0
    sync_most_us: int = 0
    real_syncs: int = 1


class Steering:
    """What one process, or several, run under; `set` changes it at once."""

    def __init__(self, path: Path, conditions: Conditions = Conditions()) -> None:
        self._path = path
        self._conditions = conditions
        path.write_bytes(_packed(conditions))

    @property
    def environment(self) -> dict[str, str]:
        shim = _built("shim.c", "-shared", "-fPIC", "-ldl", "-lpthread")
        return {"LD_PRELOAD": str(shim), "CAIRN_SHIM_CONTROL": str(self._path)}

    def clock(self) -> list[str]:
        """What to put before the command of a program in Go, so that its wall clock can be moved."""
        if platform.machine() != "x86_64":
            require_found(["an x86-64 machine, whose registers tests/faults/clock.c knows"])
        return ["env", f"CAIRN_SHIM_CONTROL={self._path}", str(_built("clock.c"))]

    def set(self, **changes: int) -> None:
        """Change fields of Conditions; the others stay."""
        self._conditions = replace(self._conditions, **changes)
        with self._path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory[:] = _packed(self._conditions)


def _packed(conditions: Conditions) -> bytes:
    values = astuple(conditions)
    return struct.pack(f"<{len(values)}q", *values)
