"""An initramfs of this machine's programs and of a kernel package's modules, made in memory.

A newc archive (Linux, Documentation/driver-api/early-userspace/buffer-format.rst) whose files all
belong to root, so that no privilege is needed to make it. Libraries lie flat in /lib; modules lie in
/modules, in the order in which insmod has to load them, so that the guest needs no depmod.
"""

import lzma
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.programs import find_program

_LOADER: Final = "/lib64/ld-linux-x86-64.so.2"
_LIBRARY: Final = re.compile(r"=> (/\S+) \(0x")
_MODINFO: Final = re.compile(rb"\x00(?:depends=|softdep=pre: )([^\x00]+)\x00")
_XZ_MAGIC: Final = b"\xfd7zXZ\x00"
_DIRECTORY_MODE: Final = 0o040755
_LINK_MODE: Final = 0o120777


@dataclass
class Initramfs:
    """Paths in the guest (without the leading slash) and what is there; directories come by themselves."""

    _entries: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def add(self, path: str, content: bytes, *, executable: bool = False) -> None:
        """A regular file."""
        self._parents(path)
        self._entries[path] = (0o100755 if executable else 0o100644, content)

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._parents(path)
        self._entries[path] = (_LINK_MODE, target.encode())

    def directory(self, path: str) -> None:
        """An empty directory."""
        self._parents(path + "/")

    def add_program(self, name: str) -> None:
        """A program of this machine, in /sbin, and the libraries that it loads. Raises FileNotFoundError."""
        path = find_program(name)
        if path is None:
            raise FileNotFoundError(f"{name} is not installed: run .ci/debian-packages")
        self.add_executable(Path(path), f"sbin/{name}")

    def add_executable(self, path: Path, place: str) -> None:
        """A program or library of this machine, and the libraries that it loads."""
        self.add(place, path.read_bytes(), executable=True)
        for library in libraries_of([path]):
            self.add(f"lib/{library.name}", library.read_bytes())
        if Path(_LOADER).exists():
            self.add(_LOADER[1:], Path(_LOADER).read_bytes(), executable=True)

    def add_modules(self, names: Iterable[str], packed: Mapping[str, Path]) -> None:
        """The modules and all that they need, numbered in the order of loading.

        packed: the modules of a kernel by name, compressed by xz or not; what is not there is taken to
        be a part of the kernel itself.
        """
        loaded: dict[str, bytes] = {}
        for name in names:
            _load(name, packed, loaded)
        for order, (name, module) in enumerate(loaded.items()):
            self.add(f"modules/{order:03}-{name}.ko", module)

    def pack(self) -> bytes:
        """The archive."""
        entries = [*self._entries.items(), ("TRAILER!!!", (0, b""))]
        return b"".join(_entry(index, *entry) for index, entry in enumerate(entries))

    def write(self, directory: Path) -> None:
        """The same as files, for what makes a file system of a directory."""
        for path, (mode, content) in self._entries.items():
            place = directory / path
            if mode == _DIRECTORY_MODE:
                place.mkdir(parents=True, exist_ok=True)
            elif mode == _LINK_MODE:
                place.symlink_to(content.decode())
            else:
                place.write_bytes(content)
                place.chmod(mode & 0o777)

    def _parents(self, path: str) -> None:
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            self._entries.setdefault("/".join(parts[:depth]), (_DIRECTORY_MODE, b""))


def libraries_of(files: Iterable[Path]) -> list[Path]:
    """The shared libraries that programs and libraries of this machine load."""
    listed = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False).stdout
    return [Path(each) for each in dict.fromkeys(_LIBRARY.findall(listed))]


def _entry(index: int, path: str, what: tuple[int, bytes]) -> bytes:
    mode, content = what
    name = path.encode() + b"\0"
    fields = (index, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08x" % value for value in fields) + name
    return _padded(header) + _padded(content)


def _padded(text: bytes) -> bytes:
    return text + bytes(-len(text) % 4)


def _load(name: str, packed: Mapping[str, Path], loaded: dict[str, bytes]) -> None:
    """Put a module into `loaded` behind all that it depends on."""
    key = name.replace("-", "_")
    if key in loaded or key not in packed:
        return
    content = packed[key].read_bytes()
    module = lzma.decompress(content) if content.startswith(_XZ_MAGIC) else content
    for needed in _MODINFO.findall(module):
        for other in re.split(r"[ ,]+", needed.decode()):
            _load(other, packed, loaded)
    loaded[key] = module
