"""Daemons of Cairn in one process, started without the second that Python takes to import them all.

    python -m tests.faults.launch --journal-file-bytes 8388608 --log daemons.log

reads the names of files with pickled lists of (daemon, settings) from its input. For each it forks a child that runs
these daemons, prints the child's pid, waits for its end and prints how it ended. With --unsynced-journal the daemons
have that defect, to see that it is found.
"""

import argparse
import asyncio
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import uvloop

from blockstore.cli.daemon_process import die_with_parent, find_daemon
from blockstore.cli.logs import set_up_logging
from blockstore.config import ControlSettings
from blockstore.daemon import keep_freed_memory
from blockstore.storage.journal import Journal
from blockstore.storage.journal_disk import Disk

_NAMES = ("control", "node", "nbd", "snapshotd")


async def run_all(daemons: list[tuple[str, Any]]) -> None:
    """Until one of them ends. Control comes first: nobody shall have to try again because it was not there yet."""
    tasks = []
    for name, settings in daemons:
        tasks.append(asyncio.create_task(find_daemon(name)(settings), name=name))
        address = settings.state / "address" if isinstance(settings, ControlSettings) else None
        while address and not address.exists() and not tasks[0].done():  # noqa: ASYNC110 (a file tells nobody)
            await asyncio.sleep(0.01)
    ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in ended:
        print(f"{task.get_name()} ended: {task.exception() or task.result()}", file=sys.stderr, flush=True)


def run_child(order: Path, parent: int, log: Path) -> None:
    die_with_parent(str(parent))
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    set_up_logging()
    keep_freed_memory()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_all(pickle.loads(order.read_bytes())))


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.faults.launch", description=__doc__)
    parser.add_argument("--journal-file-bytes", type=int, help="size of the journal's files instead of 64 MiB")
    parser.add_argument("--unsynced-journal", action="store_true", help="the defect: the journal is never synced")
    parser.add_argument("--log", type=Path, required=True, help="file for what the daemons print")
    given = parser.parse_args()
    die_with_parent(os.environ.get("CAIRN_PARENT", ""))
    for name in _NAMES:
        find_daemon(name)
    if given.journal_file_bytes:
        Journal.__dict__["open"].__func__.__kwdefaults__["file_bytes"] = given.journal_file_bytes
    if given.unsynced_journal:
        Disk.sync = lambda self, fd: None  # type: ignore[method-assign]
    parent = os.getpid()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            status = 1
            try:
                run_child(Path(line.strip()), parent, given.log)
                status = 0
            finally:
                os._exit(status)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else status, flush=True)


if __name__ == "__main__":
    main()
