"""`cairn node check`: a stopped node's data, walked offline against every invariant.

First the bytes of each table file, by py-lmdb's verifier, which never hands them to LMDB: a file that
fails there is not opened. Then what the tables say of each other: every index entry is good and has
its data, every block passes its checksum, `present` has exactly the blocks with entries, the rows of
`extents` cover every entry and name no later sequence, the tail is a chain behind the applied position,
generations and pins make sense. At last the journal. Nothing is changed.
"""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blockstore.domain import Position, ReplicaAddress
from blockstore.errors import CairnError, NotFound
from blockstore.log import LogImage
from blockstore.record import block_checksum
from blockstore.storage.delta import all_generations, read_entries, read_rows, visible_generations
from blockstore.storage.digest import digest_of
from blockstore.storage.extent_check import lost_entries, uncovered_entries
from blockstore.storage.file_check import file_problems
from blockstore.storage.journal_verify import verify_journal
from blockstore.storage.keys import (
    EXTENT_KEY,
    HEAD_SIZE,
    ExtentRow,
    Key,
    Version,
    decode_bits,
    parse_index_value,
    parse_version_key,
    version_key,
)
from blockstore.storage.meta import Meta, Pin, SealedGeneration
from blockstore.storage.node_store import lock_data, replicas_in
from blockstore.storage.tables import FILE_NAME, Reading, Tables
from blockstore.units import EXTENT_BLOCKS, MAX_BLOCKS, Epoch, Generation

_REPAIR: Final = "start the node, which repairs it from its peers; keep this directory until the volume is healthy"
_REFILL: Final = (
    "if other replicas of the volume are whole, move this file away and start the node, which fills it anew"
)
#: Of one kind and file; the rest is counted.
MAX_PROBLEMS: Final = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """where: the file. what: what is wrong, with the values. what_to_do: in one sentence."""

    where: Path
    what: str
    what_to_do: str


@dataclass(frozen=True, slots=True)
class ReplicaSummary:
    """A replica as its tables show it. blocks: versions with data. digest: of the current generation.

    digests: of each pinned generation.
    """

    address: ReplicaAddress
    applied: Position
    epoch: Epoch
    whole: bool
    blocks: int
    generations: tuple[Generation, ...]
    file_bytes: int
    digest: str
    digests: dict[Generation, str]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check_node` found; sound where there are no problems."""

    problems: list[Problem]
    replicas: list[ReplicaSummary]


def check_node(data: Path) -> CheckReport:
    """Check all that is in a node's data directory. Raises Conflict while the node runs, NotFound."""
    if not (data / "replicas").is_dir():  # and nothing is written into what is somebody else's
        raise NotFound(f"{data} is no node's data: name the directory of `cairn node run --data`, such as STATE/node-1")
    lock = lock_data(data)
    try:
        report = CheckReport([], [])
        for replica in replicas_in(data):
            found = check_replica(data / "replicas" / replica / FILE_NAME)
            report.problems.extend(found.problems)
            report.replicas.extend(found.replicas)
        for problem in verify_journal(data / "journal"):
            report.problems.append(Problem(problem.where, problem.what, "start the node: it knows who must fill"))
        return report
    finally:
        os.close(lock)


def check_replica(path: Path) -> CheckReport:
    """Check the tables in one file, which no process has open."""
    if not path.exists():
        return CheckReport(
            [Problem(path, "the tables are missing", "start the node, which fills the replica anew")], []
        )
    problems = [Problem(path, what, _REFILL) for what in file_problems(path)[:MAX_PROBLEMS]]
    if problems:
        return CheckReport(problems, [])
    try:
        with closing(Tables(path, create=False)) as tables:
            return _check_tables(tables)
    except CairnError as error:
        return CheckReport([Problem(path, str(error), _REFILL)], [])


def _check_tables(tables: Tables) -> CheckReport:
    with tables.reading() as transaction:
        meta = Meta(tables, transaction)
        _read_as_a_start_does(meta)
        problems = _collect(_Checker(tables, transaction).run())
        if problems:
            return CheckReport([Problem(tables.path, what, _REPAIR) for what in problems], [])
        image, address, pinned = meta.image(), meta.address(), sorted(meta.pinned())
        blocks = transaction.stat(tables.data)["entries"]
        readable = [s.generation for s in meta.sealed() if not s.merging]
    return CheckReport(
        [],
        [
            ReplicaSummary(
                address, image.applied, image.epoch, image.filling is None, blocks, tuple(readable),
                tables.file_bytes, digest_of(tables, None),
                {generation: digest_of(tables, generation) for generation in pinned if generation in readable},
            )
        ],
    )  # fmt: skip


def _read_as_a_start_does(meta: Meta) -> None:
    """A node does not start where that is damaged, so it cannot repair it. Raises Corrupt."""
    meta.check_format()
    meta.address()
    meta.image()
    meta.mark()
    _ = meta.origin, meta.source


def _collect(found: Iterator[str]) -> list[str]:
    """The first problems, and how many more there are; a walk that cannot go on ends with why."""
    problems: list[str] = []
    more = 0
    try:
        for problem in found:
            more += len(problems) == MAX_PROBLEMS
            problems += [problem] if len(problems) < MAX_PROBLEMS else []
    except CairnError as error:
        problems.append(str(error))
    return problems + ([f"and {more} more"] if more else [])


class _Checker:
    """One walk over the tables; problems come as text, in the order of the tables."""

    def __init__(self, tables: Tables, transaction: Reading) -> None:
        self._tables = tables
        self._transaction = transaction
        self._meta = Meta(tables, transaction)

    def run(self) -> Iterator[str]:
        self._image = self._meta.image()
        self._generations = all_generations(self._meta)
        self._pinned = self._meta.pinned()
        self._whole = self._image.filling is None
        #: No entry is later; while the replica fills, what was copied in an attempt that is void may be.
        self._highest = self._image.applied.sequence if self._whole else (1 << 64) - 1
        #: The extents with entries, and how many of those have data: what the other tables are held against.
        self._extents: set[int] = set()
        self._with_data = 0
        yield from self._check_meta()
        yield from self._check_tail()
        yield from self._check_index()
        yield from self._check_data()
        yield from self._check_present()
        yield from self._check_extents()

    def _check_meta(self) -> Iterator[str]:
        image, sealed, pins = self._image, self._meta.sealed(), self._meta.pins()
        if not self._whole:
            return  # what it knows of generations is partly from before, until it is whole
        yield from _check_generations(image, sealed, pins)
        if self._meta.tombstones() or any(not pin.held for pin in pins):
            yield "the replica is whole, yet keeps tombstones as if it filled"
        if image.copied.sequence > image.applied.sequence:
            yield f"the replica is whole, yet was copied at {tuple(image.copied)}, above {tuple(image.applied)}"

    def _check_tail(self) -> Iterator[str]:
        before = self._image.applied
        for record in self._image.records:
            if record.previous != before or record.sequence != before.sequence + 1:
                yield f"the tail's record {tuple(record.position)} does not follow {tuple(before)}"
            before = record.position

    def _check_index(self) -> Iterator[str]:
        for key, value in self._transaction.cursor(self._tables.index):
            number, generation = parse_version_key(key)
            self._extents.add(number // EXTENT_BLOCKS)
            version = parse_index_value(number, generation, value)
            name = f"block {number} of generation {generation}"
            if number >= MAX_BLOCKS:
                yield f"{name} is beyond the largest volume"
            elif version is None:
                yield f"the index entry of {name} is damaged"
            else:
                yield from self._check_version(name, number, generation, version)

    def _check_version(self, name: str, number: int, generation: Generation, version: Version) -> Iterator[str]:
        if version.sequence > self._highest:
            yield f"{name} has sequence {version.sequence}, above what is applied"
        head = self._transaction.get(version_key(number, generation), db=self._tables.data)
        if version.tail is None:
            if head is not None:
                yield f"{name} is a zero entry, yet has data"
            return
        self._with_data += 1
        if head is None:
            yield f"{name} has no data"
        elif len(head) != HEAD_SIZE or version.checksum != block_checksum(
            bytes(head) + version.tail, number, generation, version.sequence
        ):
            yield f"{name} fails its checksum"

    def _check_data(self) -> Iterator[str]:
        stored = self._transaction.stat(self._tables.data)["entries"]
        if stored != self._with_data:
            yield f"data has {stored} rows, index has {self._with_data} entries with data"
        for key, _ in self._transaction.cursor(self._tables.data) if stored != self._with_data else ():
            if self._transaction.get(key, db=self._tables.index) is None:
                yield "data has block {} of generation {}, which index has not".format(*parse_version_key(key))

    def _check_present(self) -> Iterator[str]:
        found = {int.from_bytes(k, "big"): decode_bits(k, v) for k, v in self._transaction.cursor(self._tables.present)}
        visible = visible_generations(self._meta) if self._whole else []
        for extent in sorted({*found, *self._extents}):
            entries = read_entries(self._tables, self._transaction, extent)
            rows = read_rows(self._tables, self._transaction, extent, visible)
            for _, what in lost_entries(extent, entries, found.get(extent, 0), rows, visible):
                yield what
            if self._whole:
                yield from self._check_covered(extent, entries)
            if extent in found and not found[extent]:
                yield f"present has an empty row for extent {extent}"

    def _check_covered(self, extent: int, entries: dict[Key, Version]) -> Iterator[str]:
        rows = read_rows(self._tables, self._transaction, extent, self._generations)
        sequences = {key: version.sequence for key, version in entries.items()}
        for _, what in uncovered_entries(extent, sequences, rows, self._generations, self._pinned):
            yield what

    def _check_extents(self) -> Iterator[str]:
        known = set(self._generations)
        for key, value in self._transaction.cursor(self._tables.extents):
            row = ExtentRow.decode(key, value)
            generation, extent = EXTENT_KEY.unpack(key)
            if (self._whole and generation not in known) or extent >= MAX_BLOCKS // EXTENT_BLOCKS or not row.bits:
                yield f"the row of extents ({generation}, {extent}) is empty, or of what does not exist"
            if row.sequence > self._highest:
                yield f"the row of extents ({generation}, {extent}) has sequence {row.sequence}, above what is applied"


def _check_generations(image: LogImage, sealed: list[SealedGeneration], pins: list[Pin]) -> Iterator[str]:
    by_number = {generation.generation: generation for generation in sealed}
    last = 0
    for generation in sealed:
        if generation.generation >= image.generation or (generation.sequence <= last and not generation.merging):
            yield f"generation {generation.generation} was sealed by record {generation.sequence}, out of order"
        last = generation.sequence if not generation.merging else last
    for pin in pins:
        found = by_number.get(pin.generation)
        if pin.held and (found is None or found.merging):
            yield f"generation {pin.generation} is pinned by {pin.holder!r}, yet merged away"
