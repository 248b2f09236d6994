"""This interpreter and `cairn` as a disk for a guest, so that the very code under test runs there.

An ext4 image, made by mke2fs without privileges: the standard library, those packages that `cairn attach` imports, and
the shared libraries of all of them. All is compiled: an emulated processor would take seconds for it at each start. The
guest mounts it at /host, read-only, and `cairn` there is a function of the shell (`SHELL`).
"""

import compileall
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Final

from tests.linux_host.initramfs import libraries_of
from tests.programs import find_program

#: What is imported on the way decides which packages the guest has.
_RUN: Final = "import nbd_server.kernel.session, blockstore.cli.main; blockstore.cli.main.run(['attach', '--list'])"
_TELL: Final = "import sys; print('reached', *{name.partition('.')[0] for name in sys.modules})"
#: Of the standard library, what no daemon ever needs.
_LEFT_OUT: Final = (
    "test",
    "idlelib",
    "tkinter",
    "lib2to3",
    "ensurepip",
    "turtledemo",
    "site-packages",
    "config-*",
    "*.pyc.*",
)
_SIZE: Final = "320M"

SHELL: Final = """
export PYTHONHOME=/host/python PYTHONPATH=/host/packages PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
cairn() { LD_LIBRARY_PATH=/lib:/host/lib /host/python/bin/python -m blockstore.cli "$@"; }
cairn_exec() { LD_LIBRARY_PATH=/lib:/host/lib exec /host/python/bin/python -m blockstore.cli "$@"; }
"""
"""For the beginning of a script."""


def make_python_disk(directory: Path) -> Path:
    """The image, in `directory`, which must be empty."""
    root = directory / "root"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    _link_tree(Path(sysconfig.get_path("stdlib")), root / "python" / "lib" / version)
    program = root / "python" / "bin" / "python"
    program.parent.mkdir(parents=True)
    shutil.copy2(Path(sys.executable).resolve(), program)
    for package in _packages():
        _link_tree(package, root / "packages" / package.name)
    for place in (root / "python", root / "packages"):
        # What is not compiled yet; the rest is found to be of its source by the time of that, which the image keeps.
        mode = PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(place, quiet=1, stripdir=str(root), prependdir="/host", invalidation_mode=mode)
    (root / "lib").mkdir()
    for library in libraries_of([program, *root.rglob("*.so")]):
        shutil.copy2(library, root / "lib" / library.name)
    image = directory / "python.ext4"
    subprocess.run([str(find_program("mke2fs")), "-q", "-t", "ext4", "-d", root, image, _SIZE], check=True)
    shutil.rmtree(root)
    return image


def _packages() -> Iterable[Path]:
    """Each package or module that is reached and no part of the standard library."""
    done = subprocess.run([sys.executable, "-c", f"{_RUN}; {_TELL}"], capture_output=True, text=True, check=True)
    reached = set(done.stdout.partition("reached ")[2].split())
    places = [Path(__file__).parents[2], *(Path(each) for each in sys.path if each.endswith("site-packages"))]
    for name in sorted(reached - set(sys.stdlib_module_names)):
        candidates = [(place / name, *place.glob(f"{name}.*py"), *place.glob(f"{name}.*so")) for place in places]
        found = ([each for each in candidate if each.exists()] for candidate in candidates)
        yield from next(filter(None, found), [])


def _link_tree(source: Path, target: Path) -> None:
    """A copy that takes no room, where both are on one file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        left_out = shutil.ignore_patterns(*_LEFT_OUT)
        shutil.copytree(source, target, copy_function=_link, ignore=left_out, ignore_dangling_symlinks=True)
    else:
        _link(str(source), str(target))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
