"""Commands of the user's around a snapshot: --pre before it, --post after it, whatever happened in between.

They make an application's data consistent (fsfreeze, a database's flush), so what they stop must go on
again. Invariants: once `around` is entered --post is run exactly once: also where --pre failed, the snapshot
failed, or Ctrl-C or SIGTERM came; and no hook runs longer than its limit: then all its processes are killed,
and that is said. A signal during --post waits for its end, which is bounded.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final, TypeVar

from blockstore.cli.screen import say
from blockstore.errors import CairnError

_STDERR: Final = 2
_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
_INTERRUPTING: Final = (signal.SIGINT, *_ENDING)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Hooks:
    """Shell commands, empty for none. limit_s: of each. environment: what they find in theirs."""

    pre: str
    post: str
    limit_s: float
    environment: dict[str, str]

    def __bool__(self) -> bool:
        return bool(self.pre or self.post)

    def around(self, work: Callable[[], T]) -> T:
        """What `work` returns, with the hooks around it.

        Raises what `work` raises, and CairnError where --pre failed (then nothing was done). A --post that
        failed is told on stderr where something failed before it.
        """
        if not self:
            return work()
        with _signals_interrupt():
            try:
                if self.pre:
                    self._run("--pre", self.pre)
                result = work()
            except BaseException:
                self._run_post(only_tell=True)
                raise
            # Outside of the try: a --post that fails is not run again.
            self._run_post()
            return result

    def _run_post(self, *, only_tell: bool = False) -> None:
        if not self.post:
            return
        with _signals_wait():
            try:
                self._run("--post", self.post)
            except CairnError as error:
                if not only_tell:
                    raise
                say(f"cairn: {error}")

    def _run(self, option: str, command: str) -> None:
        """Run a hook to its end or its limit. Raises CairnError unless it ended with exit code 0."""
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,  # ours is for what was asked for
            start_new_session=True,  # Ctrl-C is for us; and so that all that it starts can be killed
            env={**os.environ, **self.environment},
        )
        try:
            code = process.wait(self.limit_s)
        except subprocess.TimeoutExpired:
            raise CairnError(
                f"the {option} hook did not end within {self.limit_s:g} s and was killed: {command}"
            ) from None
        finally:
            _kill_session(process)
        if code != 0:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise CairnError(f"the {option} hook {how}: {command}")


def _kill_session(process: "subprocess.Popen[bytes]") -> None:
    """End the hook and, where it did not end by itself, all that it started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _ENDING}
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """A signal that comes meanwhile is acted upon at the end."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _INTERRUPTING}
    try:
        yield
    finally:
        _restore(before)
        if came:
            raise KeyboardInterrupt


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
