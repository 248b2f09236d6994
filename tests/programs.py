"""Programs that a test needs from the system: missing ones skip it on a laptop and fail it in CI."""

import os
import shutil

import pytest


def require_programs(*names: str) -> None:
    """Go on if all are installed; else skip the test, or fail it where CI=true (.ci/debian-packages)."""
    require_found([name for name in names if find_program(name) is None])


def require_found(missing: list[str]) -> None:
    """Go on if nothing is missing; else skip the test, or fail it where CI=true."""
    if missing:
        message = f"needs {', '.join(missing)}: run .ci/debian-packages"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


def find_program(name: str) -> str | None:
    """Its path, also where only root's PATH has it (nbd-client, mkfs)."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")))
