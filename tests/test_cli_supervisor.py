"""The supervisor, with real processes: restarts, pauses, the exit code that ends them, stopping."""

import asyncio
import math
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockstore.cli import supervisor as module
from blockstore.cli.client import wait_until
from blockstore.cli.settings import PARENT_VARIABLE
from blockstore.cli.supervisor import Child, Supervisor, describe_exit, last_line
from blockstore.config import EXIT_DO_NOT_RESTART
from tests.daemons import is_gone, wait_for

LIMIT_S = 60.0
FOREVER = "import time; print('runs', flush=True)\nwhile True: time.sleep(0.1)"


class Script:
    """A child that runs a Python script, and all that the supervisor says of it."""

    def __init__(self, directory: Path, text: str) -> None:
        self.said: list[str] = []
        self.changes = 0
        self.supervisor = Supervisor(lambda who, what: self.said.append(f"{who}: {what}"), self._changed)
        self.child = Child("child", directory / "child.log", lambda: [sys.executable, "-c", text, str(directory)])

    def _changed(self) -> None:
        self.changes += 1

    async def until(self, condition: Callable[[], object]) -> None:
        async def check() -> object:
            return condition() or None

        await wait_until(check, LIMIT_S, TimeoutError)

    async def until_said(self, word: str, times: int = 1) -> None:
        """Until the script has printed `word` so often, and the supervisor knows its process: it may be the later."""
        log = self.child.log
        await self.until(lambda: log.exists() and log.read_text().split().count(word) >= times and self.supervisor.pids)


def supervised(directory: Path, text: str, test: Callable[[Script], Awaitable[None]]) -> Script:
    """Run `test` while the script is supervised; it is stopped in any case."""
    script = Script(directory, text)

    async def run() -> None:
        script.supervisor.start(script.child)
        try:
            await test(script)
        finally:
            await script.supervisor.stop([script.child])

    asyncio.run(run())
    return script


def test_one_that_is_killed_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEADY_S", math.inf)

    async def test(script: Script) -> None:
        await script.until_said("runs")
        first = script.supervisor.pids["child"]
        os.kill(first, signal.SIGKILL)
        await script.until_said("runs", times=2)
        assert script.supervisor.pids["child"] != first

    script = supervised(tmp_path, FOREVER, test)
    assert "was killed by SIGKILL; starts again" in script.said[0]
    assert script.child.failures == 1
    assert script.supervisor.pids == {}
    assert script.changes == 4


def test_one_that_ran_steadily_is_started_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEADY_S", 0.0)
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 3600.0)

    async def test(script: Script) -> None:
        await script.until_said("runs")
        os.kill(script.supervisor.pids["child"], signal.SIGKILL)
        await script.until_said("runs", times=2)

    script = supervised(tmp_path, FOREVER, test)
    assert "was killed by SIGKILL; starts again at once" in script.said[0]


def test_pauses_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "MAX_PAUSE_S", 0.03)
    monkeypatch.setattr(module, "STEADY_S", math.inf)

    async def test(script: Script) -> None:
        await script.until(lambda: script.child.failures >= 3)

    script = supervised(tmp_path, "print('no such thing'); raise SystemExit(7)", test)
    pauses = [line.split("again in ")[1].split(",")[0] for line in script.said[:3]]
    assert pauses == ["0.01 s", "0.02 s", "0.03 s"]
    assert "ended with exit code 7" in script.said[0]
    assert last_line(script.child.log) == "no such thing"


def test_one_that_may_not_be_started_again_is_not(tmp_path: Path) -> None:
    async def test(script: Script) -> None:
        await script.until(lambda: script.child.given_up)

    script = supervised(tmp_path, f"print('runs'); raise SystemExit({EXIT_DO_NOT_RESTART})", test)
    assert script.child.log.read_text() == "runs\n"
    assert "nothing starts it again" in script.said[0]


def test_one_that_cannot_be_started_at_all(tmp_path: Path) -> None:
    async def test(script: Script) -> None:
        script.child.command = lambda: [str(tmp_path / "missing")]
        await script.until(lambda: script.said)

    script = supervised(tmp_path, "", test)
    assert "cannot be started" in script.said[0]


def test_a_clean_stop_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    text = (
        "import signal, sys, time\n"
        "def stop(*_):\n"
        "    print('stopping', flush=True)\n"
        "    print(open(sys.argv[1] + '/go').read(), flush=True)\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop); print('runs', flush=True)\n"
        "while True: time.sleep(0.1)"
    )

    async def test(script: Script) -> None:
        await script.until_said("runs")
        stopping = asyncio.ensure_future(script.supervisor.stop([script.child]))
        await script.until_said("stopping")
        assert not stopping.done()
        await asyncio.to_thread((tmp_path / "go").write_text, "stopped")
        await stopping
        assert script.child.log.read_text().split() == ["runs", "stopping", "stopped"]

    script = supervised(tmp_path, text, test)
    assert script.said == []


def test_one_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 0.2)
    text = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{FOREVER}"

    async def test(script: Script) -> None:
        await script.until_said("runs")

    script = supervised(tmp_path, text, test)
    assert "killed" in script.said[0]
    assert script.supervisor.pids == {}


def test_stopping_while_it_pauses_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 3600.0)

    async def test(script: Script) -> None:
        await script.until(lambda: script.said)

    script = supervised(tmp_path, "print('runs')", test)
    assert script.child.log.read_text() == "runs\n"


def test_all_at_once(tmp_path: Path) -> None:
    async def test(script: Script) -> None:
        await script.until_said("runs")
        script.supervisor.kill()

    script = supervised(tmp_path, FOREVER, test)
    assert script.said == []


def test_a_long_log_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOG_BYTES", 10)
    (tmp_path / "child.log").write_text("from an earlier day\n")

    async def test(script: Script) -> None:
        await script.until_said("runs")

    supervised(tmp_path, FOREVER, test)
    assert (tmp_path / "child.log.1").read_text() == "from an earlier day\n"


def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    child = "import os; from blockstore.cli.daemon_process import die_with_parent, PARENT_VARIABLE\n" + (
        "die_with_parent(os.environ[PARENT_VARIABLE]); print(os.getpid(), flush=True)\nimport signal; signal.pause()"
    )
    parent = "import subprocess, sys, os\n" + (
        f"os.environ['{PARENT_VARIABLE}'] = str(os.getpid())\nsubprocess.run([sys.executable, '-c', sys.argv[1]])"
    )
    running = subprocess.Popen([sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    orphan = int(running.stdout.readline())
    running.kill()
    running.wait()
    running.stdout.close()
    wait_for("its end", lambda: is_gone(orphan), LIMIT_S)


@pytest.mark.parametrize(("code", "text"), [(0, "ended with exit code 0"), (-11, "was killed by SIGSEGV")])
def test_how_it_ended(code: int, text: str) -> None:
    assert describe_exit(code) == text
