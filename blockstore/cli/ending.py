"""How a command that failed ends: a line on stderr, the stack with --debug only, and the exit code."""

import sys
import traceback
from typing import Final

EXIT_INTERRUPTED: Final = 130
EXIT_TERMINATED: Final = 143
EXIT_DEFECT: Final = 1


class Terminated(BaseException):
    """SIGTERM: the command ends, and clears away what it has half done. No Exception, as KeyboardInterrupt is none."""


def fail(message: str, exit_code: int, debug: bool) -> int:
    """Say what was wrong, in one line; returns exit_code. debug: with the stack of the error that is being handled."""
    if debug:
        traceback.print_exc()
    print("cairn: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return exit_code
