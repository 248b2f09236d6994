"""fio as a witness that is not ours: it writes a pattern over NBD and verifies each block's checksum."""

import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.background_load import BackgroundLoad
from tests.nbd_client import Disconnected
from tests.programs import find_program

_LIMIT_S: Final = 200
_WRONG: Final = re.compile(r"verify failed|verify: bad")
#: fio 3.33, whose connection ended while it waited for nothing: it asks again, as fast as it can, for ever.
_SPINS: Final = re.compile(r"nothing to poll for in state DEAD")
_PAUSE_S: Final = 0.1


class Interrupted(AssertionError):
    """A request ended with an error, or with its connection."""


def verify(
    uri: str, directory: Path, *, offset: int, size: int, seed: int, only: bool = False, most_iops: int = 0
) -> None:
    """Write `size` bytes from `offset` on in random order, and read them back; only: just read; most_iops: 0, no limit.

    The same offset, size and seed make the same pattern. Raises AssertionError with what fio says: Interrupted where
    a request failed, and nothing that fio had looked at was wrong.
    """
    command = [str(find_program("fio")), "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite"]
    command += ["--thread"]  # else it is two processes, and the one that works would outlive the one that is ended
    command += [f"--offset={offset}", f"--size={size}", f"--randseed={seed}", "--bs=4k", "--iodepth=16"]
    command += ["--verify=crc32c", "--verify_fatal=1", *(["--verify_only=1"] if only else ["--do_verify=1"])]
    command += [f"--rate_iops={most_iops}"] if most_iops else []
    status, said = _run(command, directory)
    if status or _SPINS.search(said):
        kind = AssertionError if _WRONG.search(said) else Interrupted
        raise kind(f"{' '.join(command)}\n{said[-6000:]}")


def _run(command: list[str], directory: Path) -> tuple[int, str]:
    """Its exit status, and what it said. Raises TimeoutExpired."""
    said: list[str] = []
    is_late = threading.Event()
    with subprocess.Popen(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None

        def end() -> None:
            is_late.set()
            process.kill()

        limit = threading.Timer(_LIMIT_S, end)
        limit.start()
        try:
            for line in process.stdout:
                said.append(line)
                if _SPINS.search(line):
                    process.kill()
                    break
            status = process.wait()
        finally:
            limit.cancel()
            process.kill()
    if is_late.is_set():
        raise subprocess.TimeoutExpired(command, _LIMIT_S, "".join(said))
    return status, "".join(said)


class FioLoop(BackgroundLoad):
    """Runs `verify` over and over in a thread, each time with another seed, until the block ends.

    interruptible: a round that is Interrupted, or finds no server, is followed by the next one.
    """

    def __init__(
        self,
        uri_now: Callable[[], str],
        directory: Path,
        *,
        offset: int,
        size: int,
        interruptible: bool = False,
        most_iops: int = 0,
    ) -> None:
        super().__init__("fio")
        self.rounds = self.interrupted = 0
        self._interruptible = interruptible
        self._uri_now = uri_now
        self._directory = directory
        self._offset, self._size, self._most_iops = offset, size, most_iops

    def check_last(self) -> None:
        """What the last round wrote is still there."""
        self._verify(self.rounds - 1, only=True)

    def _work(self) -> None:
        while not self._stopping or not self.rounds:
            self._round()

    def _round(self) -> None:
        try:
            self._verify(self.rounds + self.interrupted, only=False)
            self.rounds += 1
        except (Interrupted, Disconnected):
            if not self._interruptible:
                raise
            self.interrupted += 1
            time.sleep(_PAUSE_S)  # nobody may be there for a while

    def _verify(self, seed: int, *, only: bool) -> None:
        where = {"offset": self._offset, "size": self._size}
        verify(self._uri_now(), self._directory, **where, seed=seed, only=only, most_iops=self._most_iops)
