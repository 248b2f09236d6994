"""How a command ends: exit codes of the error table, one line on stderr, a stack only where asked for."""

import shlex
import subprocess
from pathlib import Path

import pytest

from blockstore.cli.daemons import CAIRN
from blockstore.cli.main import run
from blockstore.errors import BY_GRPC, CairnError
from tests.cli_control import canned_control
from tests.loopback import free_address


@pytest.mark.parametrize("kind", BY_GRPC.values(), ids=lambda kind: kind.__name__)
def test_every_error_has_its_exit_code(kind: type[CairnError], capsys: pytest.CaptureFixture[str]) -> None:
    with canned_control() as control:
        control.error = kind("what was wrong,\nand what to do")
        assert run(["volume", "list", "--control", control.address]) == kind.codes.exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "cairn: what was wrong, and what to do\n" or kind.codes.grpc == "UNAVAILABLE"
    assert captured.err.count("\n") == 1


def test_nobody_at_the_address(capsys: pytest.CaptureFixture[str]) -> None:
    address = free_address()
    assert run(["volume", "list", "--control", address]) == 8
    error = capsys.readouterr().err
    assert address in error
    assert "cairn up" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("address", ["nowhere", "a b:7300", "user@host:7300", "host/path:7300", ":7300", "host:65536"])
def test_an_address_that_is_none(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--control", address]) == 2
    assert "HOST:PORT" in capsys.readouterr().err


def test_a_stack_only_with_debug(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--debug", "status", "--control", "nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert run(["status", "--control", "nowhere"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nonsense"], ["volume", "nonsense"], ["volume", "list", "--nonsense"]])
def test_a_command_that_makes_no_sense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert "nonsense" in error
    assert "-h`" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["volume"], ["node"]])
def test_a_noun_alone_shows_its_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "Commands:" in capsys.readouterr().err


def test_the_console_script_ends_with_the_exit_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [*CAIRN, "control", "run", "--lease-s", "0"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "--lease-s 0" in done.stderr


def test_a_full_disk_has_the_exit_code_of_no_space() -> None:
    with canned_control() as control, open("/dev/full", "w") as full:
        argv = [*CAIRN, "volume", "list", "--control", control.address]
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (6, "cairn: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_what_is_closed_goes_nowhere(closed: str) -> None:
    with canned_control() as control:
        line = shlex.join([*map(str, CAIRN), "volume", "list", "--control", control.address])
        done = subprocess.run(["sh", "-c", f"{line} {closed}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ID") == (closed == "2>&-")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cairn 0.")


def test_a_size_that_no_message_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["volume", "create", "--size", "99999999999999T"]) == 2
    assert "too large" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["node", "run", "--zone", ""], "--zone '' is empty"),
        (["node", "run", "--heartbeat-s", "0.001"], "--heartbeat-s 0.001 is below 0.05"),
        (["nbd", "run", "--lease-s", "nan"], "--lease-s nan is no finite number"),
        (["nbd", "run", "--lease-s", "inf"], "--lease-s inf is no finite number"),
        (["nbd", "run", "--lease-s", "1.5"], "--lease-s 1.5 is outside 0.05 to 1.0"),
        (["control", "run", "--replace-after-s", "1e300"], "--replace-after-s 1e+300 is above 31622400, a year"),
        (["node", "run", "--heartbeat-s", "1e300"], "--heartbeat-s 1e+300 is above 31622400, a year"),
        (["node", "repair", "--replace-after", "1e300"], "1e+300 is not in the range 0<=x<=31622400"),
        (["volume", "attach", "v", "--wait", "nan"], "nan is no number"),
        (["volume", "attach", "v", "--wait", "1e300"], "1e+300 is not in the range 0<=x<=31622400"),
        (["snapshot", "wait", "s", "--timeout", "nan"], "nan is no number"),
        (["snapshot", "create", "v", "--hook-timeout", "nan"], "nan is no number"),
        (["snapshot", "verify", "--sample", "nan"], "nan is no number"),
        (["store", "prune", "--repack-share", "nan"], "nan is no number"),
        (["node", "repair", "--replace-after", "nan"], "nan is no number"),
        (["snapshot", "wait", "s", "--timeout", "1e300"], "1e+300 is not in the range 0<=x<=31622400"),
        (["control", "run", "--rebuilds", "99999999999"], "--rebuilds 99999999999 is outside 1 to 1000000"),
    ],
)
def test_settings_that_make_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert message in capsys.readouterr().err
