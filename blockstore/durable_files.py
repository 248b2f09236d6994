"""Files and directories that survive a power cut: a name is durable only once the directory that holds it is synced."""

import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """fsync of a file, or of a directory so that the names in it are durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make it and what is missing above it.

    Its own name is synced also where it is there: whoever made it may not have come so far.
    """
    missing = [each for each in path.parents if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in (path, *missing):
        sync_path(each.parent)


def write_durably(path: Path, text: str) -> None:
    """Replace the file at `path` by one that holds `text` and a newline: a reader sees the old one or the new one."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text + "\n")
    sync_path(scratch)
    scratch.replace(path)
    sync_path(path.parent)
