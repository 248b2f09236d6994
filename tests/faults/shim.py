"""The shim between a process and the C library (shim.c): built once, and steered while the process runs.

steering = Steering(directory)
daemon.environment |= steering.environment
steering.set(sync_least_us=200_000, sync_most_us=200_000)     # its disk is slow from here on
"""

import functools
import mmap
import struct
import subprocess
import tempfile
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Final

from tests.programs import require_programs

_SOURCE: Final = Path(__file__).with_name("shim.c")
_FLAGS: Final = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


@functools.cache
def built() -> Path:
    """The shared object, made by gcc once in this process."""
    require_programs("gcc")
    directory = tempfile.TemporaryDirectory(prefix="cairn-shim-")
    _kept.append(directory)
    target = Path(directory.name) / "shim.so"
    subprocess.run(["gcc", *_FLAGS, "-o", target, _SOURCE, "-ldl", "-lpthread"], check=True, timeout=60)
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
        return {"LD_PRELOAD": str(built()), "CAIRN_SHIM_CONTROL": str(self._path)}

    def set(self, **changes: int) -> None:
        """Change fields of Conditions; the others stay."""
        self._conditions = replace(self._conditions, **changes)
        with self._path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory[:] = _packed(self._conditions)


def _packed(conditions: Conditions) -> bytes:
    values = astuple(conditions)
    return struct.pack(f"<{len(values)}q", *values)
