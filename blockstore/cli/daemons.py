"""How the command starts daemons: in this process, or by a command line in another.

What a daemon is made of is imported where one runs (blockstore.cli.daemon_process), and nowhere else.
"""

import sys
from collections.abc import Sequence
from typing import Any, Final

from blockstore.cli.settings import DAEMON_SETTINGS, read_plain_options

CAIRN: Final = (sys.executable, "-P", "-m", "blockstore.cli")
"""This very installation's command. -P: the directory that it is started in is no place to import from."""


def run_daemon(name: str, settings: Any) -> int:
    """Run the daemon `name` in this process to its end; its exit code. Raises what it raises."""
    # An event loop and a log, which a command that only asks control has no use for.
    from blockstore.cli.daemon_process import run  # noqa: PLC0415

    return run(name, settings)


def run_plain_line(arguments: Sequence[str]) -> int | None:
    """Run the daemon of `NAME run --option value …` to its end; its exit code. None for any other line."""
    if len(arguments) < 2 or arguments[0] not in DAEMON_SETTINGS or arguments[1] != "run":
        return None
    settings = read_plain_options(DAEMON_SETTINGS[arguments[0]], arguments[2:])
    return None if settings is None else run_daemon(arguments[0], settings)
