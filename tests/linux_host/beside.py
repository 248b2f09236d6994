"""A guest that runs beside the test, which waits for what it says and answers it.

with running(kernel, script, directory, uri) as guest:
    guest.wait_for("MOUNTED")
    guest.tell("go on")         # a line for the script's file descriptor 3
assert guest.end().status == 0
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blockstore.config import split_address
from tests.daemons import wait_for
from tests.linux_host import guest
from tests.linux_host.kernel import Kernel


def script(name: str, **variables: int) -> str:
    """The script of that name, with these variables set."""
    settings = "".join(f"{variable}={value}\n" for variable, value in variables.items())
    return settings + (Path(__file__).parent / f"{name}.sh").read_text()


class Guest:
    """directory: for its files, see `guest.run`. limit_s: after it the guest is ended, and waiting fails."""

    def __init__(
        self, kernel: Kernel, text: str, directory: Path, uri: str, limit_s: float, *, disk: Path | None
    ) -> None:
        address, _, export = uri.removeprefix("nbd://").partition("/")
        self.directory = directory
        self._limit_s = limit_s
        self._results: list[guest.Result] = []
        port = split_address(address)[1]

        def run() -> None:
            found = guest.run(kernel, text, directory, port=port, export=export, timeout_s=limit_s, disk=disk)
            self._results.append(found)

        self._thread = threading.Thread(target=run, name="guest")
        self._thread.start()

    @property
    def output(self) -> Path:
        """What its script prints."""
        return self.directory / "output"

    def said(self, pattern: str) -> list[str]:
        """All that it has said so far that fits."""
        return re.findall(pattern, self.output.read_text(errors="replace")) if self.output.exists() else []

    def wait_for(self, pattern: str) -> None:
        """Raises AssertionError, with all that it said, where it ends without having said this."""
        wait_for(
            f"the guest to say {pattern}", lambda: self.said(pattern) or not self._thread.is_alive(), self._limit_s
        )
        assert self.said(pattern), str(self.end())

    def tell(self, word: str) -> None:
        """A line, once it has begun to speak: before that nobody reads."""
        with guest.words_of(self.directory).open("w") as words:
            words.write(f"{word}\n")

    def end(self) -> guest.Result:
        """Wait for it."""
        self._thread.join()
        return self._results[0]


@contextmanager
def running(
    kernel: Kernel, text: str, directory: Path, uri: str, limit_s: float, *, disk: Path | None = None
) -> Iterator[Guest]:
    """A guest, which has ended when this does. disk: see `guest.run`."""
    started = Guest(kernel, text, directory, uri, limit_s, disk=disk)
    try:
        yield started
    finally:
        started.end()
