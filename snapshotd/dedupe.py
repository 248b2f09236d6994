"""Where in the object store a block's content is already: its keyed hash -> (pack, frame, slot).

Exact within the key domain, over all volumes and snapshots. It lies in an LMDB file that is a cache and
nothing more: what is missing is read again from the packs' trailers, a file of another repository, version
or key domain is made anew. It is never trusted as far as it could lose data: an entry carries a
checksum over its hash and what it points to, the pack's id included (LMDB does not check its pages), and one that
fails it is a miss.

Packs have numbers in here, given once. When frames of a pack went away, its number is dropped: all entries that
bear it are misses from then on, and what is left of the pack comes back under a new number. Blocks of packs
that are still on their way are in memory (`claim`), so that what two volumes have in common is stored once, also while
both are shipped; whoever refers to such a pack waits until it is stored (snapshotd.packer).

Memory: 64 Ki blocks that were not written to the file yet, those of packs on their way, and 100 bytes a pack.
All but `find` are called in the event loop's thread or one after the other; `find` from any thread.
"""

import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import lmdb
import structlog

from blockstore.errors import NoSpace
from snapshotd.crypto import SALT_SIZE
from snapshotd.index import MAX_FRAME_NUMBER
from snapshotd.manifest import BlockRef

_log = structlog.get_logger(__name__)

_VERSION: Final = b"2"
_LAST_NUMBER: Final = b"last-number"
_IDENTITY: Final = b"identity"
_NUMBER: Final = struct.Struct(">I")
_LARGEST_NUMBER: Final = (1 << 32) - 1
#: Pack number, frame, slot; then the CRC-32 of the hash, these, and the pack's id: no number that was given twice,
#: as a damaged file may have it, makes an entry point into another pack.
_ENTRY: Final = struct.Struct("<IHB")
_CHECK: Final = struct.Struct("<I")
#: Address space, not memory and not disk: 200 GiB of entries are about 16 TiB of different blocks.
_MAP_SIZE: Final = 200 << 30
#: Entries that are written in one transaction: sorted, they cost a fifth of what they cost one pack at a time.
_WRITE_AT: Final = 65_536

Hashes = Sequence[Sequence[bytes]]
"""Of each frame of a pack part, of each of its blocks by slot."""


class Dedupe:
    """path: of the file. identity: of repository and key domain; what the file holds belongs to no other."""

    def __init__(self, path: Path, identity: bytes) -> None:
        self._path = path
        self._env, self._entries, self._packs, rows = _open(path, identity)
        self._known: dict[bytes, tuple[int, int]] = {}
        """Of each pack: its number, and the frames that are known, as bits."""
        self._ids: dict[int, bytes] = {}
        self._recent: dict[bytes, BlockRef] = {}
        self._unwritten: list[tuple[bytes, Sequence[int], Hashes]] = []
        self._unwritten_count = 0
        self._damaged = False
        self._read_packs(rows)

    # ---- asking

    def find_recent(self, digest: bytes) -> BlockRef | None:
        """Where that block is, if it is on its way or was stored a short while ago; touches no file."""
        return self._recent.get(digest)

    def find(self, hashes: Sequence[bytes]) -> dict[bytes, BlockRef]:
        """Those of `hashes` whose content is stored, or on its way."""
        found: dict[bytes, BlockRef] = {}
        recent, missing = self._recent, []
        for digest in hashes:
            ref = recent.get(digest)
            if ref is None:
                missing.append(digest)
            else:
                found[digest] = ref
        if missing and self._ids:
            # Begun after the look at what is in memory: that is written before it is let go.
            try:
                found |= self._find_stored(missing)
            except lmdb.Error as error:
                self._damaged = True
                _log.warning("the cache of hashes cannot be read: what it holds is stored again", error=str(error))
        return found

    def _find_stored(self, hashes: Sequence[bytes]) -> dict[bytes, BlockRef]:
        with self._env.begin(db=self._entries) as txn, txn.cursor() as cursor:
            refs = [(digest, self._decode(digest, value)) for digest, value in cursor.getmulti(hashes)]
        return {digest: ref for digest, ref in refs if ref is not None}

    def frames_of(self, pack: bytes) -> int:
        """The frames of `pack` that are known here, as bits; 0 where it is unknown."""
        return self._known.get(pack, (0, 0))[1]

    @property
    def packs(self) -> Iterable[bytes]:
        """The ids of all packs that are known and stored."""
        return self._known.keys()

    # ---- telling

    def claim(self, digest: bytes, ref: BlockRef) -> None:
        """That block is on its way in a pack that is not stored yet."""
        self._recent[digest] = ref

    def disown(self, pack: bytes, hashes: Iterable[bytes]) -> None:
        """That pack will not be stored."""
        for digest in hashes:
            ref = self._recent.get(digest)
            if ref is not None and ref.pack == pack:
                del self._recent[digest]

    def add(self, pack: bytes, numbers: Sequence[int], hashes: Hashes) -> None:
        """Frames of a pack that others stored. numbers: of the frames; hashes: theirs, in the same order."""
        for frame, digests in zip(numbers, hashes, strict=True):
            self._recent.update((digest, BlockRef(pack, frame, slot)) for slot, digest in enumerate(digests))
        self.confirm(pack, numbers, hashes)

    def confirm(self, pack: bytes, numbers: Sequence[int], hashes: Hashes) -> None:
        """Of `add`, where each block was claimed: the pack is stored and indexed now."""
        self._unwritten_count += sum(map(len, hashes))
        self._unwritten.append((pack, numbers, hashes))

    @property
    def wants_writing(self) -> bool:
        """Enough has gathered for a transaction."""
        return self._unwritten_count >= _WRITE_AT

    def write(self) -> None:
        """Put all that was added into the file; on a thread, one at a time."""
        work, self._unwritten, self._unwritten_count = self._unwritten, [], 0
        if not work:
            return
        try:
            self._learn(self._put(work))
        except lmdb.Error as error:
            self._warn_not_written(error)
        # Also what is not in the file: nobody would take it out of memory when its pack goes.
        for pack, _, hashes in work:
            for digests in hashes:
                self.disown(pack, digests)

    def _put(self, work: Iterable[tuple[bytes, Sequence[int], Hashes]]) -> dict[bytes, tuple[int, int]]:
        """What is known of these packs then."""
        entries: list[tuple[bytes, bytes]] = []
        added: dict[bytes, tuple[int, int]] = {}
        with self._env.begin(write=True) as txn:
            # Above every number that any entry in the file may bear, also of packs that were forgotten.
            last = max(_last_number(txn), *self._ids, 0)
            for pack, numbers, hashes in work:
                number, frames = added.get(pack) or self._known.get(pack) or (last + 1, 0)
                last = max(last, number)
                added[pack] = number, frames | sum(1 << frame for frame in numbers)
                entries += _encode(number, pack, numbers, hashes)
            entries.sort()
            txn.cursor(self._entries).putmulti(entries)
            for pack, (number, frames) in added.items():
                txn.put(_NUMBER.pack(number), _encode_pack(number, pack, frames), db=self._packs)
            txn.put(_LAST_NUMBER, str(last).encode())
        return added

    def forget(self, packs: Iterable[bytes]) -> None:
        """Nothing refers to these any more: all their entries are misses from here on."""
        numbers = [self._known.pop(pack)[0] for pack in packs if pack in self._known]
        for number in numbers:
            del self._ids[number]
        try:
            with self._env.begin(write=True, db=self._packs) as txn:
                for number in numbers:
                    txn.delete(_NUMBER.pack(number))
        except lmdb.Error as error:
            self._warn_not_written(error)  # They come back with the next start, and its first look forgets them.

    def close(self) -> None:
        """Write what is left, and let go of the file; one that could not be read is made anew at the next start."""
        self.write()
        self._env.close()
        if self._damaged:
            self._path.unlink(missing_ok=True)

    def _read_packs(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        for key, value in rows:
            pack, frames = value[:SALT_SIZE], int.from_bytes(value[SALT_SIZE : -_CHECK.size], "little")
            number = int.from_bytes(key, "big")
            if key == _NUMBER.pack(number & _LARGEST_NUMBER) and _encode_pack(number, pack, frames) == value:
                self._learn({pack: (number, frames)})

    def _learn(self, packs: Mapping[bytes, tuple[int, int]]) -> None:
        for pack in packs.keys() & self._known.keys():
            self._ids.pop(self._known[pack][0], None)  # Of two numbers of one pack the older was to be deleted.
        self._known.update(packs)
        self._ids.update((number, pack) for pack, (number, _) in packs.items())

    def _warn_not_written(self, error: lmdb.Error) -> None:
        _log.warning(
            "the cache of hashes cannot be written; what it lacks is read again from the packs",
            file=str(self._path),
            error=str(error),
        )

    def _decode(self, digest: bytes, value: bytes) -> BlockRef | None:
        entry, check = value[: _ENTRY.size], value[_ENTRY.size :]
        if len(entry) == _ENTRY.size:
            number, frame, slot = _ENTRY.unpack(entry)
            pack = self._ids.get(number)
            if pack is None:
                return None
            if check == _check_of(digest, entry, pack):
                return BlockRef(pack, frame, slot)
        _log.warning("an entry of the cache of hashes is damaged; it is passed over", file=str(self._path))
        return None


def _last_number(txn: Any) -> int:
    """The last number that was given, 0 where the file does not say: then one is given twice, and finds less."""
    try:
        last = int(txn.get(_LAST_NUMBER) or 0)
    except ValueError:
        return 0
    return last if 0 <= last < _LARGEST_NUMBER // 2 else 0


def _encode(number: int, pack: bytes, frames: Sequence[int], hashes: Hashes) -> list[tuple[bytes, bytes]]:
    entries = []
    for frame, digests in zip(frames, hashes, strict=True):
        for slot, digest in enumerate(digests):
            entry = _ENTRY.pack(number, frame, slot)
            entries.append((digest, entry + _check_of(digest, entry, pack)))
    return entries


def _check_of(digest: bytes, entry: bytes, pack: bytes) -> bytes:
    return _CHECK.pack(zlib.crc32(digest + entry + pack))


def _encode_pack(number: int, pack: bytes, frames: int) -> bytes:
    value = pack + frames.to_bytes(MAX_FRAME_NUMBER // 8, "little").rstrip(b"\0")
    return value + _CHECK.pack(zlib.crc32(_NUMBER.pack(number) + value))


def _open(path: Path, identity: bytes, *, again: bool = False) -> tuple[Any, Any, Any, list[tuple[bytes, bytes]]]:
    """The environment at `path`, its databases of entries and of packs, and all that the latter holds.

    Empty ones where it holds something else, or nothing that can be read. Raises NoSpace where none can be made.
    """
    env = None
    try:
        env = lmdb.open(str(path), subdir=False, map_size=_MAP_SIZE, max_dbs=2)
        _extend(path, (env.info()["last_pgno"] + 1) * env.stat()["psize"])
        with env.begin() as txn:
            found = txn.get(_IDENTITY)
        if not found:
            with env.begin(write=True) as txn:
                txn.put(_IDENTITY, _VERSION + identity)
        if found in (None, _VERSION + identity):
            entries, packs = env.open_db(b"entries"), env.open_db(b"packs")
            with env.begin(db=packs) as txn:
                return env, entries, packs, [(bytes(key), bytes(value)) for key, value in txn.cursor()]
        _log.info("the cache of hashes is of another repository; it is made anew", file=str(path))
    except lmdb.Error as error:
        if again:
            raise NoSpace(f"cannot make the cache of hashes {path}: {error}; make room there") from error
        _log.warning("the cache of hashes cannot be read; it is made anew", file=str(path), error=str(error))
    if env is not None:
        env.close()
    path.unlink(missing_ok=True)
    return _open(path, identity, again=True)


def _extend(path: Path, size_bytes: int) -> None:
    """Pages that were cut off read as zeroes, which LMDB refuses: beyond the file's end they would end the process."""
    if size_bytes > _MAP_SIZE:
        raise lmdb.CorruptedError(f"{path} claims to have {size_bytes} bytes")
    if path.stat().st_size < size_bytes:
        os.truncate(path, size_bytes)
