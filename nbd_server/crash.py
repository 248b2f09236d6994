"""What a bad page of a replica's tables may do to a front-end that reads them beside their node, and what follows.

LMDB trusts its pages: one that the disk spoilt may end the process by a signal, as it may end a node, whose next start
then looks at the file with a verifier of its own. A front-end keeps no such file. So the signal's handler writes where
it was into STATE/crash, which costs nothing before it happens; and as long as a report lies there of a process that
was reading tables, reads go to the nodes. No front-end dies twice of one page.
"""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

_log = structlog.get_logger(__name__)
_NAME: Final = "crash"
_READER: Final = b"shared_tables.py"


@contextmanager
def reporting_crashes(state: Path) -> Iterator[bool]:
    """Inside, a signal that ends the process leaves a report. Yields whether tables may be read beside their nodes."""
    path = state / _NAME
    found = path.read_bytes() if path.exists() else b""
    if found:
        _log.error("an earlier process was ended by a signal", report=str(path), what=found.decode(errors="replace"))
    may_read = _READER not in found
    if not may_read:
        _log.error(
            "it was reading a replica's tables: reads go to the nodes until the report is removed and the front-end "
            "started again; do that once `cairn volume scrub` finds nothing",
            report=str(path),
        )
    try:
        report = path.open("ab")
    except OSError as error:
        _log.warning("no report of a crash can be made, so no tables are read", path=str(path), error=str(error))
        yield False
        return
    with report:
        faulthandler.enable(report, all_threads=False)
        try:
            yield may_read
        finally:
            faulthandler.disable()
    with suppress(FileNotFoundError):
        if not path.stat().st_size:
            path.unlink()
