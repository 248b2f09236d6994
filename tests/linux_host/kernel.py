"""Debian's kernel for virtual machines: its package is fetched and read, never installed.

Installing it would change what the machine boots. `.ci/debian-packages` has made the package lists
current; the fetch needs no privilege.
"""

import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.programs import find_program

#: Depends on the newest kernel without drivers for real hardware: 26 MB.
METAPACKAGE: Final = "linux-image-cloud-amd64"
_FETCH_TIMEOUT_S: Final = 100
_IMAGE: Final = re.compile(r"boot/vmlinuz-")
_MODULE: Final = re.compile(r"lib/modules/.*/([^/]+)\.ko(\.xz)?$")


@dataclass(frozen=True)
class Kernel:
    """image: a file that QEMU boots. modules: .ko files, packed by xz or not, by name, with _ for each -."""

    image: Path
    modules: dict[str, bytes]


def fetch_kernel(directory: Path) -> Kernel:
    """The kernel's package of this Debian, downloaded to `directory`.

    Raises RuntimeError where apt-get knows no such package or cannot fetch it.
    """
    depends = _run(["apt-cache", "depends", METAPACKAGE], directory)
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise RuntimeError(f"apt-cache knows no {METAPACKAGE}: run .ci/debian-packages\n{depends}")
    _run(
        ["apt-get", "-qq", "-o", "Acquire::Retries=3", "-o", "APT::Sandbox::User=root", "download", found[1]], directory
    )
    (package,) = directory.glob(f"{found[1]}_*.deb")
    return read_kernel(package, directory)


def read_kernel(package: Path, directory: Path) -> Kernel:
    """The kernel of a .deb file; its image is written to `directory`."""
    image, modules = directory / "vmlinuz", {}
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as unpacking,
        tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive,
    ):
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None and _IMAGE.search(member.name):
                image.write_bytes(content.read())
            elif content is not None and (module := _MODULE.search(member.name)):
                modules[module[1].replace("-", "_")] = content.read()
    return Kernel(image, modules)


def missing_programs() -> list[str]:
    """What `fetch_kernel` runs and this machine lacks: all of it, where it is no Debian."""
    return [name for name in ("apt-get", "apt-cache", "dpkg-deb") if find_program(name) is None]


def _run(command: list[str], directory: Path) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=_FETCH_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()} (has .ci/debian-packages been run?)")
    return done.stdout
