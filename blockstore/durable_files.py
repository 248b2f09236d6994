"""Files and directories that survive a power cut: a name is durable only once the directory that holds it is synced."""

import errno
import os
from pathlib import Path
from typing import Final

from blockstore.errors import InvalidRequest

#: What is wrong with the path, or with who asks, and not with the disk.
_UNFIT: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT})


def sync_path(path: Path) -> None:
    """fsync of a file, or of a directory so that the names in it are durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make it and what is missing above it.

    Its own name is synced also where it is there: whoever made it may not have come so far. Raises InvalidRequest where
    it can be none, or not for this user.
    """
    try:
        missing = [each for each in path.parents if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        for each in (path, *missing):
            sync_path(each.parent)
    except OSError as error:
        if error.errno not in _UNFIT:
            raise
        raise InvalidRequest(
            f"{path} cannot be a directory for this user ({error.strerror}): choose another one, or give it to them"
        ) from error


def write_durably(path: Path, text: str) -> None:
    """Replace the file at `path` by one that holds `text` and a newline: a reader sees the old one or the new one."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text + "\n")
    sync_path(scratch)
    scratch.replace(path)
    sync_path(path.parent)
