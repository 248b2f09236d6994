"""Hooks around a snapshot: in which order, whatever happens, and never longer than their limit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from blockstore.cli.hooks import Hooks
from blockstore.errors import CairnError, Conflict
from tests.daemons import wait_for


def hooks(log: Path, pre: str = "true", post: str = "true", limit_s: float = 60.0) -> Hooks:
    """Hooks that note in `log` that they ran."""
    return Hooks(f"echo pre >> {log}; {pre}", f"echo post >> {log}; {post}", limit_s, {"CAIRN_VOLUMES": "db log"})


def noted(log: Path) -> list[str]:
    return log.read_text().split()


def work_in(log: Path, error: BaseException | None = None) -> str:
    with log.open("a") as file:
        file.write("work\n")
    if error is not None:
        raise error
    return "done"


def test_before_and_after(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert hooks(log).around(lambda: work_in(log)) == "done"
    assert noted(log) == ["pre", "work", "post"]


def test_without_hooks_nothing_is_run() -> None:
    none = Hooks("", "", 1.0, {})
    assert not none
    assert none.around(lambda: 5) == 5


def test_one_of_them_is_enough(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert Hooks("", f"echo post >> {log}", 10, {}).around(lambda: work_in(log)) == "done"
    assert noted(log) == ["work", "post"]


def test_they_know_the_volumes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hooks(log, pre=f'echo "$CAIRN_VOLUMES" >> {log}').around(lambda: None)
    assert noted(log) == ["pre", "db", "log", "post"]


def test_their_words_go_to_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hooks(tmp_path / "log", pre="echo frozen").around(lambda: None)
    assert capfd.readouterr() == ("", "frozen\n")


def test_nothing_is_done_after_a_pre_that_failed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(CairnError, match=r"--pre hook ended with exit code 3: echo"):
        hooks(log, pre="exit 3").around(lambda: work_in(log))
    assert noted(log) == ["pre", "post"]


@pytest.mark.parametrize("error", [Conflict("no"), KeyboardInterrupt()])
def test_after_is_also_after_a_failure(tmp_path: Path, error: BaseException) -> None:
    log = tmp_path / "log"
    with pytest.raises(type(error)):
        hooks(log).around(lambda: work_in(log, error))
    assert noted(log) == ["pre", "work", "post"]


def test_a_post_that_failed_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(CairnError, match="--post hook was killed by SIGTERM"):
        hooks(log, post="kill $$").around(lambda: work_in(log))
    assert noted(log) == ["pre", "work", "post"]


def test_the_first_failure_is_not_hidden_by_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Conflict, match="no"):
        hooks(tmp_path / "log", post="exit 4").around(lambda: work_in(tmp_path / "log", Conflict("no")))
    assert "--post hook ended with exit code 4" in capsys.readouterr().err


@pytest.mark.parametrize("late", ["pre", "post"])
def test_who_takes_too_long_is_killed_with_all_that_it_started(tmp_path: Path, late: str) -> None:
    for limit_s in (1.0, 4.0, 16.0):  # within the first a slow machine may not even have begun
        log, pid = tmp_path / f"log-{limit_s:g}", tmp_path / f"pid-{limit_s:g}"
        stuck = f"sh -c 'trap \"\" TERM INT; echo $$ > {pid}; while :; do sleep 1; done'"
        began = time.monotonic()
        with pytest.raises(CairnError, match=rf"hook did not end within {limit_s:g} s and was killed") as killed:
            hooks(log, limit_s=limit_s, **{late: stuck}).around(lambda log=log: work_in(log))  # type: ignore[misc]
        if pid.exists() and pid.read_text() and time.monotonic() - began < limit_s + 4:
            break
    else:
        pytest.fail("it was not killed in time, or did not begin to run in 16 s")
    assert f"--{late} hook" in str(killed.value)
    wait_for("the end of what it started", lambda: not Path(f"/proc/{pid.read_text().strip()}").exists())
    assert noted(log) == (["pre", "post"] if late == "pre" else ["pre", "work", "post"])


SCRIPT = """
import sys, time
from blockstore.cli.hooks import Hooks
log = sys.argv[1]
hooks = Hooks("", f"touch {log}.begun; while [ ! -e {log}.go ]; do sleep 0.01; done; echo post >> {log}", 60.0, {})
hooks.around(lambda: (print("works", flush=True), [time.sleep(0.1) for _ in range(600)]))
"""


def wait_for_naps(process: "subprocess.Popen[bytes]", count: int) -> None:
    """Until it has gone to sleep so often: then it has acted upon every signal that came before."""
    shown = psutil.Process(process.pid)
    enough = shown.num_ctx_switches().voluntary + count
    wait_for("the command to go on", lambda: process.poll() is not None or shown.num_ctx_switches().voluntary > enough)
    assert process.returncode is None, "ended by a signal"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_after_is_also_after_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    """And a second one, while --post runs, does not keep it from its end."""
    log = tmp_path / "log"
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, log], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"works\n"
        process.send_signal(number)
        wait_for("--post to begin", (tmp_path / "log.begun").exists)
        os.kill(process.pid, number)
        wait_for_naps(process, 15)
        (tmp_path / "log.go").touch()
        process.wait(60)
    assert noted(log) == ["post"]
    assert process.returncode != 0
