"""The `cairn` command: how it begins, and how an error ends it.

An error is one line on stderr that says what to do; the exit code is that of its class
(blockstore.errors). A stack is shown with --debug only, or where the error is none of ours: a defect.

The front-end, the nodes and control come back as fast as this begins: what `cairn up` starts is read without
the parser of the commands (blockstore.cli.commands), which with its libraries takes most of a second.
"""

import errno
import os
import sys

from blockstore.cli.daemons import run_plain_line
from blockstore.cli.ending import EXIT_DEFECT, EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated, fail
from blockstore.errors import CairnError, NoSpace


def run(arguments: list[str]) -> int:
    """Run one command; the exit code."""
    debug = "--debug" in arguments
    try:
        code = run_plain_line(arguments)
        return _parse_and_run(arguments, debug) if code is None else code
    except CairnError as error:
        return fail(str(error), error.codes.exit_code, debug)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return fail(str(error), NoSpace.codes.exit_code if is_full else EXIT_DEFECT, debug)
    except Terminated:
        return fail("terminated", EXIT_TERMINATED, debug)
    except KeyboardInterrupt:
        return fail("interrupted", EXIT_INTERRUPTED, debug)
    except Exception as error:
        message = f"a defect in cairn, please report it: {type(error).__name__}: {error}"
        return fail(message, EXIT_DEFECT, debug)


def _parse_and_run(arguments: list[str], debug: bool) -> int:
    from blockstore.cli import commands  # noqa: PLC0415 - see above

    return commands.run(arguments, debug)


def main() -> None:
    """The console script."""
    _open_closed_streams()
    sys.exit(run(sys.argv[1:]))


def _open_closed_streams() -> None:
    """What was closed before we began goes nowhere: else the next file that is opened would get its number."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == descriptor, f"{name} was closed, and {os.devnull} is {opened}"
            setattr(sys, name, os.fdopen(opened, "r" if name == "stdin" else "w"))
