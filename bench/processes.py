"""CPU and memory of a target's processes over a measurement."""

from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Usage:
    """cpu_s: CPU time. private_mib: resident memory at the end, without pages of mapped files.

    Those pages are the kernel's cache of LMDB's tables, which it takes back when others need the memory.
    """

    cpu_s: float
    private_mib: float

    def document(self, seconds: float) -> dict[str, float]:
        """cores: those that were busy over `seconds`, the time that the work took."""
        return {"cores": round(self.cpu_s / seconds, 3), "private_mib": round(self.private_mib, 1)}


class Meter:
    """with Meter(pids) as meter: ...; then meter.usage, by the names of `pids`."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self.usage: dict[str, Usage] = {}

    def __enter__(self) -> "Meter":
        self._before = {name: _cpu_s(process) for name, process in self._processes.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for name, process in self._processes.items():
            self.usage[name] = Usage(_cpu_s(process) - self._before[name], private_bytes(process) / (1 << 20))


def _cpu_s(process: psutil.Process) -> float:
    """Also of its children that have ended: some servers have one for each client."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def private_bytes(process: psutil.Process) -> int:
    """Resident memory without pages of mapped files; see Usage."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)
