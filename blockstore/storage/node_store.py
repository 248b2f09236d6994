"""A node's data directory: who it is, its replicas, its journal's place, its reserve.

    DATA/node                   the node's id
    DATA/cluster                the name of the cluster that it registered with last
    DATA/LOCK                   held while a process uses the directory
    DATA/ballast                room for checkpoints and deletions when the disk is full
    DATA/journal/               one for all replicas
    DATA/replicas/REPLICA/      tables.mdb, `address`, `source` where it was made with one, and `suspect` after
                                a failure that the process died of; `opening` while the tables are opened, `fence`
                                for who reads beside the node (blockstore/storage/fence.py), and
                                tables.mdb.damaged where they could not be; `damage` says what is wrong with
                                tables that have lost something, until they are filled anew
    DATA/replicas/REPLICA.broken/   of which nothing could be made; for people

A replica appears and vanishes by the rename of a whole directory: a crash leaves it there or not, and
what is left half made or half removed has a name of its own and goes at the next start. Tables that are
missing from a replica's directory were taken away by somebody: it is made anew, suspect, and so filled. So are tables
that do not open: they are set aside, and the node's other replicas are none the worse. Where nobody knows any more
whose they were, the whole directory is: the node has no such replica then, as if somebody had moved it away. It answers
for none, so it has no vote, and control puts another one, with an id of its own, in its place.
"""

import fcntl
import itertools
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

from blockstore.domain import NodeId, ReplicaAddress, ReplicaId, SegmentNumber, VolumeId, check_id, make_id
from blockstore.durable_files import make_directory, sync_path, write_durably
from blockstore.errors import AlreadyExists, Conflict, Corrupt, InvalidRequest, NotFound
from blockstore.log import LogImage
from blockstore.storage.fence import lower_fence
from blockstore.storage.file_check import check_file
from blockstore.storage.replica_store import ReplicaStore
from blockstore.storage.space import SpaceGuard
from blockstore.storage.tables import FILE_NAME, is_cut_short

_NEW: Final = ".new"
_CLUSTER: Final = "cluster"
_DELETED: Final = ".deleted"
_SUSPECT: Final = "suspect"
_ADDRESS: Final = "address"
_SOURCE: Final = "source"
_OPENING: Final = "opening"
_DAMAGE: Final = "damage"
_SET_ASIDE: Final = FILE_NAME + ".damaged"
_BROKEN: Final = ".broken"


class NodeStore:
    """Make it with `open`; one process at a time."""

    def __init__(self, data: Path, lock: int, node: NodeId, space: SpaceGuard) -> None:
        self.data = data
        self.node = node
        self.space = space
        self._lock = lock
        self._replicas = data / "replicas"
        self._broken: dict[Path, ReplicaId] = {}

    @classmethod
    def open(cls, data: Path, *, reserve_bytes: int = 0) -> "NodeStore":
        """The store in `data`, made where there is none. Raises Conflict (another process has it), InvalidRequest."""
        for directory in (data, data / "replicas", data / "journal"):
            make_directory(directory)
        lock = lock_data(data)
        try:
            store = cls(data, lock, _node_id(data), SpaceGuard(data, reserve_bytes))
            store._lower_fences()
            store._remove_leftovers()
            store._find_broken()
        except BaseException:
            os.close(lock)
            raise
        sync_path(data)
        return store

    @property
    def cluster(self) -> str:
        """Of which the replicas here are; empty where there are none, or it was never told."""
        return self._kept_cluster() if self.replicas() else ""

    def keep_cluster(self, name: str) -> None:
        """Replicas that come from now on are of this one. Durable on return. Raises OSError."""
        if name != self._kept_cluster():
            write_durably(self.data / _CLUSTER, name)

    def _kept_cluster(self) -> str:
        path = self.data / _CLUSTER
        return path.read_text().strip() if path.exists() else ""

    @property
    def journal_directory(self) -> Path:
        return self.data / "journal"

    def replicas(self) -> tuple[ReplicaId, ...]:
        """All that exist here, suspect ones included."""
        return replicas_in(self.data)

    def create_replica(
        self, address: ReplicaAddress, image: LogImage, *, mark: int = 0, source: bytes = b""
    ) -> ReplicaStore:
        """Make a replica that is durable on return. Raises AlreadyExists, NoSpace."""
        target = self._directory_of(address.replica)
        if target.exists():
            raise AlreadyExists(f"replica {address.replica} exists on this node")
        staged = target.with_name(target.name + _NEW)
        shutil.rmtree(staged, ignore_errors=True)
        ReplicaStore.create(staged, address, image, mark=mark, source=source, make_room=self.space.make_room).close()
        _write_address(staged, address, source)
        staged.rename(target)
        sync_path(self._replicas)
        return self.open_replica(address.replica)

    def open_replica(self, replica: ReplicaId) -> ReplicaStore:
        """Raises NotFound, Corrupt; Conflict where they are sound, and another replica's or another program's.

        Bad pages may end the process in the middle of that. A mark tells the next start of it, which then looks at
        the file first, without LMDB: else the node would never start again.
        """
        directory = self._existing(replica)
        mark, path = directory / _OPENING, directory / FILE_NAME
        if path.exists() and (mark.exists() or is_cut_short(path)):
            check_file(path)
        mark.touch()
        try:
            store = ReplicaStore.open(directory, make_room=self.space.make_room)
        finally:
            mark.unlink()
        if store.address.replica != replica:
            store.close()
            raise Conflict(
                f"{directory} holds the tables of {store.address.replica}: they were moved or copied; put them back"
            )
        return store

    def lacks_tables(self, replica: ReplicaId) -> bool:
        """Whether somebody took the replica's tables away. Raises NotFound."""
        return not (self._existing(replica) / FILE_NAME).exists()

    def set_aside(self, replica: ReplicaId) -> None:
        """Take away tables that cannot be opened. The first such file is kept until the replica is whole again.

        It may be the last copy of something. Only where `check_address` found whose replica it is.
        """
        directory = self._existing(replica)
        path, kept = directory / FILE_NAME, directory / _SET_ASIDE
        if kept.exists():
            path.unlink()  # what was being copied since, from replicas that have it
        else:
            path.rename(kept)
        for leftover in (path.with_name(path.name + "-lock"), directory / _OPENING):
            leftover.unlink(missing_ok=True)
        sync_path(directory)

    def forget_set_aside(self, replica: ReplicaId) -> bool:
        """The replica is whole again; whether there was such a file."""
        kept = self._existing(replica) / _SET_ASIDE
        if not kept.exists():
            return False
        kept.unlink()
        return True

    def make_anew(self, replica: ReplicaId, *, mark: int) -> ReplicaStore:
        """Empty tables for a replica that lacks its own; it is suspect from before they are there.

        They begin with the source that it was made with: where nothing is copied, the log from its beginning says
        whether that has ended, and where something is, the copy does.
        Raises Corrupt where nobody knows whose replica it is, NoSpace.
        """
        directory = self._existing(replica)
        address = _read_address(directory)
        staged = directory.with_name(directory.name + _NEW)
        shutil.rmtree(staged, ignore_errors=True)
        make_room = self.space.make_room
        ReplicaStore.create(
            staged, address, LogImage(), mark=mark, source=_read_source(directory), make_room=make_room
        ).close()
        self.mark_suspect(replica)
        self.forget_damage(replica)
        (staged / FILE_NAME).rename(directory / FILE_NAME)
        sync_path(directory)
        shutil.rmtree(staged)
        return self.open_replica(replica)

    def check_address(self, replica: ReplicaId) -> None:
        """Raises Corrupt where its directory does not say whose replica it is, or is none."""
        _read_address(self._directory_of(replica))

    def leave_out(self, replica: ReplicaId) -> Path:
        """Give what is left of a replica another name, under which it stays; durable on return. The new place.

        From here on this node has no such replica: it is lost, not empty, and nobody may make it anew under its id but
        as one that fills.
        """
        directory = self._directory_of(replica)
        names = (f"{replica}{_BROKEN}{f'-{number}' if number > 1 else ''}" for number in itertools.count(1))
        place = next(path for name in names if not (path := directory.with_name(name)).exists())
        directory.rename(place)
        sync_path(self._replicas)
        self._broken[place.absolute()] = replica
        return place

    def broken(self) -> dict[Path, ReplicaId]:
        """What `leave_out` made, now or in an earlier life, as long as nobody has removed it."""
        return {path: replica for path, replica in self._broken.items() if path.exists()}

    def delete_replica(self, replica: ReplicaId) -> None:
        """Remove a replica whose store is closed. A crash finishes it at the next start. Raises NotFound."""
        directory = self._existing(replica)
        doomed = directory.with_name(directory.name + _DELETED)
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        sync_path(self._replicas)
        shutil.rmtree(doomed)

    # ---- suspects

    def mark_suspect(self, replica: ReplicaId) -> None:
        """What the replica's files hold is not known any more: at the next start it is filling. Durable on return."""
        directory = self._existing(replica)
        path = directory / _SUSPECT
        path.touch()
        sync_path(path)
        sync_path(directory)

    def is_suspect(self, replica: ReplicaId) -> bool:
        return (self._existing(replica) / _SUSPECT).exists()

    def clear_suspect(self, replica: ReplicaId) -> None:
        """Only once it is durable elsewhere that the replica fills."""
        directory = self._existing(replica)
        (directory / _SUSPECT).unlink(missing_ok=True)
        sync_path(directory)

    # ---- damage

    def note_damage(self, replica: ReplicaId, what: str) -> None:
        """Its tables have lost something: also after a restart nobody may count on them. Durable on return."""
        directory = self._existing(replica)
        path = directory / _DAMAGE
        path.write_text(what)
        sync_path(path)
        sync_path(directory)

    def damage_of(self, replica: ReplicaId) -> str:
        """What was noted; empty where nothing was."""
        path = self._existing(replica) / _DAMAGE
        return (path.read_text(errors="replace") or "its tables are damaged") if path.exists() else ""

    def forget_damage(self, replica: ReplicaId) -> None:
        """Only once it is durable that the replica is filled anew."""
        path = self._existing(replica) / _DAMAGE
        if path.exists():
            path.unlink()
            sync_path(path.parent)

    def close(self) -> None:
        os.close(self._lock)

    def _directory_of(self, replica: ReplicaId) -> Path:
        return self._replicas / check_id("rep", replica)

    def _existing(self, replica: ReplicaId) -> Path:
        directory = self._directory_of(replica)
        if not directory.is_dir():
            raise NotFound(f"no replica {replica} on this node")
        return directory

    def _lower_fences(self) -> None:
        """Before any file changes; what has no address is left as it is, also in this."""
        for replica in self.replicas():
            with suppress(Corrupt):
                self.check_address(replica)
                lower_fence(self._directory_of(replica))

    def _remove_leftovers(self) -> None:
        for path in self._replicas.iterdir():
            if path.name.endswith((_NEW, _DELETED)):
                shutil.rmtree(path)

    def _find_broken(self) -> None:
        for path in sorted(self._replicas.glob(f"*{_BROKEN}*")):
            self._broken[path.absolute()] = ReplicaId(path.name.partition(_BROKEN)[0])


def lock_data(data: Path) -> int:
    """A descriptor that holds the directory until it is closed. Raises Conflict while another process has it."""
    descriptor = os.open(data / "LOCK", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise Conflict(f"another process uses {data}: stop that node first") from error
    return descriptor


def replicas_in(data: Path) -> tuple[ReplicaId, ...]:
    """The replicas in a data directory."""
    found = []
    for path in sorted((data / "replicas").iterdir()):
        try:
            found.append(ReplicaId(check_id("rep", path.name)))
        except InvalidRequest:
            continue  # half made or half removed, or not ours
    return tuple(found)


def _write_address(directory: Path, address: ReplicaAddress, source: bytes) -> None:
    """What the tables say as well, for when they are lost."""
    path = directory / _ADDRESS
    path.write_text(f"{address.volume} {address.segment} {address.replica}\n")
    sync_path(path)
    if source:
        path = directory / _SOURCE
        path.write_bytes(source)
        sync_path(path)
    sync_path(directory)


def _read_source(directory: Path) -> bytes:
    path = directory / _SOURCE
    return path.read_bytes() if path.exists() else b""


def _read_address(directory: Path) -> ReplicaAddress:
    try:
        volume, segment, replica = (directory / _ADDRESS).read_text().split()
        address = ReplicaAddress(
            VolumeId(check_id("vol", volume)), SegmentNumber(int(segment)), ReplicaId(check_id("rep", replica))
        )
    except (OSError, ValueError, InvalidRequest) as error:
        raise Corrupt(f"{directory} has no tables, and does not say whose they were: {error}") from error
    if address.replica != directory.name:
        raise Corrupt(f"{directory} belongs to {address.replica}: it was moved or copied")
    return address


def _node_id(data: Path) -> NodeId:
    path = data / "node"
    if not path.exists():
        if replicas_in(data):
            raise Corrupt(
                f"{path} is missing, and there are replicas here: write this node's id into it again "
                "(`cairn node list` knows those that are down)"
            )
        staged = data / ("node" + _NEW)
        staged.write_text(make_id("node", os.urandom(9)) + "\n")
        sync_path(staged)
        staged.rename(path)
    return NodeId(check_id("node", path.read_text().strip()))
