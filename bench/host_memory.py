"""Memory that a virtual machine's host has not given it yet, and what that does to a measurement.

The first write to such a page costs ten times the copy (2.6 s of CPU for a GiB of page cache where one that was used
before takes 0.25 s, measured on the machine of docs/benchmarks.md), and hosts take back what is free for a while. So
whichever benchmark first touches more memory than those before it pays for that, and not for what it measures.
"""

from pathlib import Path

from blockstore.units import MIB


def touch_memory(directory: Path, size: int) -> None:
    """Have `size` bytes of page cache in the machine's hands: a file is written in `directory`, and deleted."""
    path, content = directory / "touched", b"\xa5" * MIB
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(size // MIB):
                file.write(content)
    finally:
        path.unlink(missing_ok=True)
