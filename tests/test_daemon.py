"""What every daemon does the same way."""

import subprocess
import sys

import pytest

#: Takes and gives back 1 MiB 200 times, and prints how many pages the kernel had to bring for it.
_CHURN = """
import resource, sys
from blockstore.daemon import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def touch():
    held = [bytearray(b"x" * (1 << 20)) for _ in range(8)]
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(25):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", _CHURN, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_large_buffers_are_reused() -> None:
    assert page_faults("keep") < 1000 < page_faults("give back")
