"""Processes of a test: started, killed, paused and started again by their own handle, with their logs.

A process that listens at port 0 writes where into a file, atomically; `Daemon.read_address` waits for
it. Waiting is always for a condition, with a limit.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import psutil

#: A machine with two cores starts five Python processes in a few seconds; one that is overloaded takes far longer.
START_LIMIT_S: Final = 60.0
_STOP_LIMIT_S: Final = 60.0
_POLL_S: Final = 0.05
_LOG_SHOWN_BYTES: Final = 6_000

T = TypeVar("T")


def is_gone(pid: int) -> bool:
    """Whoever reaps orphans here may be slow: a zombie is gone all the same."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(what: str, condition: Callable[[], T | None], limit_s: float = START_LIMIT_S) -> T:
    """The first true value of `condition`. Raises TimeoutError, which names `what`, after limit_s."""
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {limit_s:g} s for {what}")
        time.sleep(_POLL_S)
    return value


def listens(host: str, port: int, pid: int) -> bool:
    """Whether somebody listens at that IPv4 address in the network of the process, found without connecting to it."""
    wanted = f"{bytes(reversed(bytes(map(int, host.split('.'))))).hex().upper()}:{port:04X}"
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1] == wanted and line.split()[3] == "0A" for line in lines)


class Daemon:
    """A process that may be run several times.

    command, environment: changeable between two runs; the latter is added to this process's own.
    directory: where it writes its address. log: gets all that it prints, over all runs.
    """

    def __init__(self, name: str, command: Sequence[str | Path], directory: Path, log: Path) -> None:
        self.name = name
        self.command = list(command)
        self.environment: dict[str, str] = {}
        self.directory = directory
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self._process is not None, f"{self.name} does not run"
        return self._process.pid

    def start(self) -> None:
        """Start it; `read_address` waits until it listens."""
        assert not self.running, f"{self.name} runs already"
        for file in self.directory.glob("*address"):
            file.unlink()
        with self.log.open("ab") as log:
            log.write(f"--- {self.command}\n".encode())
            log.flush()
            # Cairn's daemons end with the process that this names, also where it is killed.
            environment = os.environ | self.environment | {"CAIRN_PARENT": str(os.getpid())}
            self._process = subprocess.Popen(
                self.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def read_address(self, file: str = "address") -> str:
        """HOST:PORT from a file in its directory. Raises TimeoutError, and RuntimeError where it ended."""

        def find() -> str:
            if not self.running:
                raise RuntimeError(f"{self.name} ended as it started:\n{self.tail()}")
            path = self.directory / file
            return path.read_text().strip() if path.exists() else ""

        return wait_for(f"{self.name} to write {file}", find)

    def kill(self) -> None:
        """kill -9, whatever state it is in; nothing where it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> int:
        """SIGTERM; its exit status. Raises TimeoutExpired where it does not end."""
        assert self._process is not None, f"{self.name} does not run"
        self._process.terminate()
        return self._process.wait(_STOP_LIMIT_S)

    def pause(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_bytes()[-_LOG_SHOWN_BYTES:].decode(errors="replace") if self.log.exists() else ""

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, f"{self.name} does not run"
        self._process.send_signal(number)
