"""Debian's kernels for virtual machines, which .ci/kernels has fetched and unpacked; none of them is installed.

Those of both series are the client of an NBD server in ways of their own: only 6.12 sends WRITE_ZEROES.
"""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from tests.programs import require_found

_SCRIPT: Final = Path(__file__).parent.parent.parent / ".ci" / "kernels"
_MODULE: Final = re.compile(r"([^/]+)\.ko(?:\.xz)?")


class Series(Enum):
    """Of Debian 12, and of Debian 13."""

    LINUX_6_1 = "6.1"
    LINUX_6_12 = "6.12"


@dataclass(frozen=True)
class Kernel:
    """image: a file that QEMU boots. modules: .ko files, packed by xz or not, by name, with _ for each -."""

    image: Path
    modules: Mapping[str, Path]


def find_kernel(series: Series) -> Kernel:
    """That of the series; where it was not fetched, the test is skipped, or fails if CI=true."""
    place = Path(subprocess.run([_SCRIPT, "--path"], check=True, capture_output=True, text=True).stdout.strip())
    directory = place / series.value
    if not directory.is_dir():
        require_found([f"Linux {series.value} (.ci/kernels)"])
    (image,) = directory.glob("boot/vmlinuz-*")
    found = ((_MODULE.fullmatch(path.name), path) for path in directory.rglob("*.ko*"))
    return Kernel(image, {name[1].replace("-", "_"): path for name, path in found if name})
