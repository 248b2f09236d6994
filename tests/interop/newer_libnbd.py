"""Where .ci/newer-libnbd has unpacked the libnbd of a newer Debian, which speaks extended headers."""

import subprocess
from pathlib import Path
from typing import Final

from tests.interop.clients import run
from tests.programs import require_found

_SCRIPT: Final = Path(__file__).parent.parent.parent / ".ci" / "newer-libnbd"


def newer_libnbd() -> Path:
    """What runs nbdinfo, nbdcopy, or python3 with the module nbd, of that release. Skips where it is not there."""
    place = Path(subprocess.run([_SCRIPT, "--path"], check=True, capture_output=True, text=True).stdout.strip())
    if not (place / "run").exists():
        require_found(["libnbd of Debian 13 (.ci/newer-libnbd)"])
    return place / "run"


def run_newer(*command: str) -> str:
    """Run one of these; what it printed."""
    return run(str(newer_libnbd()), *command)
