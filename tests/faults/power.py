"""A disk that loses its power: what it may hold of what a process did to its files.

The process runs under shim.c on ordinary files below `root`. When it has been killed, `cut` reads what the shim wrote
down, decides what of it the disk kept, and lays that out below `root` for the next run. The rules are those of POSIX,
which promises less than any file system gives:

- A write, or a change of size, is kept for sure once a sync of that file has ended that began after it (or when it went
  through a descriptor with O_DSYNC). Else it may be kept or not, each by itself, whatever the order; one write may be
  torn at 512 bytes.
- A name (of a new file or directory, of a rename, link or unlink) is kept for sure once a sync of its directory has
  ended that began after it. Of the others some of the first are kept, in order, as every journalling file system does.
  A rename is kept as a whole.
- What nobody wrote is not there: sizes and names never become durable by a sync of something else.
"""

import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final, TypeAlias

from tests.faults.shim_log import Call, Operation, read_log

SECTOR: Final = 512


class Loss(Enum):
    """What becomes of changes that no sync covered."""

    ALL = "all"  # nothing of them is kept
    SOME = "some"  # each by itself
    TORN = "torn"  # each by itself, and one write by its sectors
    NONE = "none"  # a kill, no power cut


@dataclass(eq=False)
class File:
    """durable: where its kept content lies. pending: changes that no sync covered, in order."""

    durable: Path
    pending: list[Call] = field(default_factory=list)


@dataclass(eq=False)
class Directory:
    """durable: names that are kept for sure; now: as the process saw them."""

    durable: dict[str, "Node"] = field(default_factory=dict)
    now: dict[str, "Node"] = field(default_factory=dict)


Node: TypeAlias = File | Directory
Assignment: TypeAlias = tuple[Directory, str, "Node | None"]


@dataclass(eq=False)
class NameChange:
    """Names that change together: all of them on the disk, or none."""

    assignments: tuple[Assignment, ...]

    def concerns(self, directory: Directory) -> bool:
        return any(each is directory for each, _, _ in self.assignments)

    def keep(self) -> None:
        for directory, name, node in self.assignments:
            if node is None:
                directory.durable.pop(name, None)
            else:
                directory.durable[name] = node


@dataclass
class CutReport:
    """What one cut lost."""

    writes_lost: int = 0
    writes_torn: int = 0
    names_lost: int = 0


class PowerDisk:
    """root: what a process sees; several may run one after the other, and must have ended when `cut` is called."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root = root.resolve()
        self._kept = scratch / "kept"
        self._logs = scratch / "logs"
        for each in (self.root, self._kept, self._logs):
            each.mkdir(parents=True)
        self._top = Directory()
        self._inodes: dict[int, Node] = {self.root.stat().st_ino: self._top}
        self._files = 0

    @property
    def environment(self) -> dict[str, str]:
        """For the processes, beside that of Steering."""
        return {"CAIRN_SHIM_ROOT": str(self.root), "CAIRN_SHIM_LOG": str(self._logs / "log")}

    def cut(self, chance: random.Random, loss: Loss) -> CutReport:
        """Take the power, and lay out what is left."""
        report = CutReport()
        machine = _Machine(self, self._inodes)
        for path in sorted(self._logs.iterdir()):
            machine.begin_process()
            for call in read_log(path):
                machine.take(call)
            path.unlink()
        machine.lose(chance, loss, report)
        self._lay_out()
        return report

    def new_file(self) -> File:
        self._files += 1
        file = File(self._kept / str(self._files))
        file.durable.touch()
        return file

    @property
    def top(self) -> Directory:
        return self._top

    def _lay_out(self) -> None:
        shutil.rmtree(self.root)
        self._inodes = {}
        used: set[Path] = set()
        self._make(self._top, self.root, used)
        for path in self._kept.iterdir():
            if path not in used:
                path.unlink()

    def _make(self, directory: Directory, path: Path, used: set[Path]) -> None:
        path.mkdir()
        directory.now = dict(directory.durable)
        self._inodes[path.stat().st_ino] = directory
        for name, node in directory.durable.items():
            if isinstance(node, Directory):
                self._make(node, path / name, used)
                continue
            _copy_sparse(node.durable, path / name)
            (path / name).chmod(0o600)
            used.add(node.durable)
            self._inodes[(path / name).stat().st_ino] = node


class _Machine:
    """What happened since the last cut, as the logs tell."""

    def __init__(self, disk: PowerDisk, inodes: dict[int, Node]) -> None:
        self._disk = disk
        self._inodes = inodes
        self._touched: list[File] = []
        self._names: list[NameChange] = []
        #: Of a sync under way: what it covers.
        self._syncs: dict[int, list[Call] | list[NameChange]] = {}

    def begin_process(self) -> None:
        """The one before was killed: what it had not synced is still in the page cache, and its syncs never end."""
        self._syncs.clear()

    def take(self, call: Call) -> None:
        match call.operation:
            case Operation.CREATE:
                self._add(call, self._disk.new_file())
            case Operation.MKDIR:
                self._add(call, Directory())
            case Operation.RENAME:
                self._rename(*call.names)
            case Operation.LINK:
                source, name = self._place(call.names[0])
                target, new = self._place(call.names[1])
                self._change((target, new, source.now[name]))
            case Operation.UNLINK:
                directory, name = self._place(call.names[0])
                self._change((directory, name, None))
            case Operation.WRITE | Operation.ZEROES | Operation.TRUNCATE:
                self._write(call)
            case Operation.SYNC_BEGIN:
                node = self._inodes[call.inode]
                covered = node.pending if isinstance(node, File) else self._names_of(node)
                self._syncs[call.a] = list(covered)  # type: ignore[assignment]
            case Operation.SYNC_END:
                self._sync(self._inodes[call.inode], self._syncs.pop(call.a))

    def lose(self, chance: random.Random, loss: Loss, report: CutReport) -> None:
        """Decide what becomes of all that no sync covered."""
        kept = {Loss.ALL: 0, Loss.NONE: len(self._names)}.get(loss, chance.randint(0, len(self._names)))
        for change in self._names[:kept]:
            change.keep()
        report.names_lost += len(self._names) - kept
        for file in dict.fromkeys(self._touched):
            self._lose_writes(file, chance, loss, report)

    # ---- names

    def _place(self, path: str) -> tuple[Directory, str]:
        *parents, name = [part for part in path.split("/") if part not in ("", ".")]
        directory = self._disk.top
        for each in parents:
            found = directory.now[each]
            assert isinstance(found, Directory), f"{path}: {each} is no directory"
            directory = found
        return directory, name

    def _add(self, call: Call, node: Node) -> None:
        self._inodes[call.inode] = node
        directory, name = self._place(call.names[0])
        self._change((directory, name, node))

    def _rename(self, old: str, new: str) -> None:
        source, name = self._place(old)
        target, new_name = self._place(new)
        self._change((source, name, None), (target, new_name, source.now[name]))

    def _change(self, *assignments: Assignment) -> None:
        for directory, name, node in assignments:
            if node is None:
                directory.now.pop(name, None)
            else:
                directory.now[name] = node
        self._names.append(NameChange(assignments))

    def _names_of(self, directory: Directory) -> list[NameChange]:
        return [each for each in self._names if each.concerns(directory)]

    # ---- content

    def _write(self, call: Call) -> None:
        file = self._inodes[call.inode]
        assert isinstance(file, File)
        self._touched.append(file)
        file.pending.append(call)
        if call.durable:  # pages are written as a whole: with it goes what else is in them
            self._sync(file, [each for each in file.pending if _overlap(each, call)])

    def _sync(self, node: Node, covered: Iterable[Call] | Iterable[NameChange]) -> None:
        if isinstance(node, File):
            calls = {id(each): each for each in covered}
            for each in node.pending:
                if id(each) in calls:
                    _apply(node.durable, each)
            node.pending = [each for each in node.pending if id(each) not in calls]
            return
        changes = set(map(id, covered))
        for change in self._names:
            if id(change) in changes:
                change.keep()
        self._names = [each for each in self._names if id(each) not in changes]

    def _lose_writes(self, file: File, chance: random.Random, loss: Loss, report: CutReport) -> None:
        torn = chance.randrange(len(file.pending)) if loss is Loss.TORN and file.pending else -1
        for index, call in enumerate(file.pending):
            if index == torn and call.operation is Operation.WRITE:
                report.writes_torn += 1
                _tear(file.durable, call, chance)
            elif loss is Loss.NONE or (loss is not Loss.ALL and chance.random() < 0.5):
                _apply(file.durable, call)
            else:
                report.writes_lost += 1
        file.pending = []


def _overlap(one: Call, other: Call) -> bool:
    """Whether they share a page of 4 KiB; a change of size belongs to every write."""
    if one.operation is Operation.TRUNCATE:
        return True
    return one.a // 4096 <= (other.a + other.b - 1) // 4096 and other.a // 4096 <= (one.a + one.b - 1) // 4096


def _apply(path: Path, call: Call) -> None:
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        match call.operation:
            case Operation.TRUNCATE:
                file.truncate(call.a)
            case Operation.ZEROES if call.a >= size:
                file.truncate(call.a + call.b)
            case Operation.ZEROES:
                os.pwrite(file.fileno(), bytes(call.b), call.a)
            case _:
                os.pwrite(file.fileno(), call.data, call.a)


def _tear(path: Path, call: Call, chance: random.Random) -> None:
    """Some of its sectors."""
    with path.open("r+b") as file:
        at = call.a
        while at < call.a + call.b:
            end = min((at // SECTOR + 1) * SECTOR, call.a + call.b)
            if chance.random() < 0.5:
                os.pwrite(file.fileno(), call.data[at - call.a : end - call.a], at)
            at = end


def _copy_sparse(source: Path, target: Path) -> None:
    """With its holes."""
    size = source.stat().st_size
    with source.open("rb") as reader, target.open("xb") as writer:
        os.truncate(writer.fileno(), size)
        at = 0
        while at < size:
            try:
                start = os.lseek(reader.fileno(), at, os.SEEK_DATA)
            except OSError:
                return  # only a hole is left
            at = os.lseek(reader.fileno(), start, os.SEEK_HOLE)
            os.lseek(writer.fileno(), start, os.SEEK_SET)
            os.lseek(reader.fileno(), start, os.SEEK_SET)
            while start < at:
                start += os.sendfile(writer.fileno(), reader.fileno(), start, at - start)
