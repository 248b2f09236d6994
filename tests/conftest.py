"""For all tests: where CI=true a skip is a failure, and hypothesis chooses as it did before; a real S3 server."""

import os
from collections.abc import Generator, Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.s3_server import S3Server, running_server

IN_CI = os.environ.get("CI") == "true"

# How long one example takes says how busy the machine is; pytest's timeout finds what hangs. A failure prints a line
# that replays it. `ci` chooses the same examples each time, so that what fails there is of the change that is tried;
# `random` others each time (docs/development.md says how to have more of them), and keeps those that failed.
for name, same in (("ci", True), ("random", False)):
    settings.register_profile(
        name,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
        derandomize=same,
        database=None if same else DirectoryBasedExampleDatabase(".hypothesis/examples"),
    )
settings.load_profile("ci" if IN_CI else "random")


#: Of a value in a test's name, which goes through every report and log.
_LONGEST_IN_NAME = 60


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Of content, the name of a test says only how long it is; None: as pytest does it."""
    if isinstance(val, bytes | str) and len(val) > _LONGEST_IN_NAME:
        return f"{argname} of {len(val)}"
    return None


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and IN_CI:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that is skipped while it runs, or by a mark."""
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A whole module that is skipped."""
    report = yield
    _forbid_skip(report)
    return report


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real one, for all tests of this process."""
    with running_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The same, with the right credential in the environment, and nothing else that S3 clients look for."""
    forget_s3(monkeypatch)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


def forget_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    """No AWS_ variable, and no files of Amazon's tools, whatever the developer has."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
