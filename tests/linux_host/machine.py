"""A virtual machine that runs beside the test, which waits for what it says, answers it, or pulls its plug.

Emulated by QEMU (TCG), because a machine that runs tests may have no KVM. The first serial port is
the kernel's console, the second carries what the script there prints, the third its exit status: so a
guest that dies before the script's end is told apart from a script that fails. The fourth brings the
script, as its file descriptor 3, the lines that the test tells it.

    with Machine(["-kernel", ...], directory, limit_s=60) as machine:
        machine.wait_for("MOUNTED")
        machine.tell("go on")
    assert machine.end().status == 0
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.daemons import wait_for

PROGRAM: Final = "qemu-system-x86_64"
#: no_timer_check: on a busy machine an emulated timer may look broken to a kernel, which panics then.
KERNEL_ARGUMENTS: Final = "console=ttyS0 panic=-1 loglevel=6 no_timer_check"
#: la57, erms, fsrm: a fifth level of page tables, and copies byte by byte that real processors are quick with, took
#: a fifth of all the time of an emulated one.
_MACHINE: Final = (
    *(PROGRAM, "-accel", "tcg,thread=single", "-cpu", "max,la57=off,erms=off,fsrm=off", "-smp", "2", "-m", "768"),
    *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
)
_PORTS: Final = ("console", "output", "status")


@dataclass(frozen=True)
class Result:
    """status: the script's; None where the guest went down or ran out of time before its end."""

    status: int | None
    output: str
    console: str
    seconds: float

    def __str__(self) -> str:
        if self.status is None:
            ended = f"the guest did not reach the script's end in {self.seconds:.0f} s"
            return f"{self.output}\n{ended}:\n{self.console[-4000:]}"
        return f"{self.output}\nstatus {self.status} after {self.seconds:.0f} s"


class Machine:
    """options: QEMU's, for what it boots and its disks. directory: for its files, kept; one for each machine.

    limit_s: after it the guest is ended, and waiting fails. The end of the block waits for it; an error there ends it.
    """

    def __init__(self, options: Sequence[str], directory: Path, limit_s: float) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._limit_s = limit_s
        for path in (self.words, self.words.with_suffix(".out")):
            os.mkfifo(path)
        serial = [f"file:{directory / port}" for port in _PORTS] + [f"pipe:{self.words.with_suffix('')}"]
        command = [*_MACHINE, *options, *(argument for port in serial for argument in ("-serial", port))]
        self._began = time.monotonic()
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        self.end()

    @property
    def words(self) -> Path:
        """The FIFO whose lines the script reads."""
        return self.directory / "words.in"

    @property
    def output(self) -> Path:
        """What the script prints."""
        return self.directory / "output"

    def said(self, pattern: str) -> list[str]:
        """All that it has said so far that fits."""
        return re.findall(pattern, self._read("output"))

    def wait_for(self, pattern: str) -> None:
        """Until it has said what fits."""
        self.wait_until(f"the guest to say {pattern}", lambda: bool(self.said(pattern)))

    def wait_until(self, what: str, condition: Callable[[], bool]) -> None:
        """Until that is so. Raises AssertionError, with all that it said, where it ends without."""
        wait_for(what, lambda: condition() or self._process.poll() is not None, self._limit_s)
        assert condition(), f"waited for {what}: {self.end()}"

    def tell(self, word: str) -> None:
        """A line, once it has begun to speak: before that nobody reads. Raises OSError where it has ended."""
        descriptor = os.open(self.words, os.O_WRONLY | os.O_NONBLOCK)
        with open(descriptor, "w") as words:
            words.write(f"{word}\n")

    def kill(self) -> None:
        """As a power cut does: what it had not written to its disks is gone."""
        self._process.kill()

    def end(self) -> Result:
        """Wait for it."""
        try:
            self._process.wait(max(0.0, self._began + self._limit_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        status = self._read("status").strip()
        seconds = time.monotonic() - self._began
        return Result(int(status) if status.isdigit() else None, self._read("output"), self._read("console"), seconds)

    def _read(self, port: str) -> str:
        path = self.directory / port
        return path.read_text(errors="replace") if path.exists() else ""
