"""The bytes of a table file, looked at without handing them to LMDB, which may crash the process on bad pages."""

from pathlib import Path

import lmdb.verify

from blockstore.errors import Corrupt


def file_problems(path: Path) -> list[str]:
    """What py-lmdb's verifier finds in a file that no process has open; reads all of it."""
    try:
        found: list[str] = lmdb.verify.verify(str(path))  # type: ignore[no-untyped-call]
    except lmdb.verify.VerifyError as error:
        return [str(error)]
    return found


def check_file(path: Path) -> None:
    """Raises Corrupt where the file may not be opened."""
    problems = file_problems(path)
    if problems:
        raise Corrupt(f"the tables at {path} are damaged: {problems[0]}")
