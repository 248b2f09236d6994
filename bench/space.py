"""The disk space that a volume takes on the nodes, in its three parts."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_STAT_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes allocated on all nodes together, and what of a volume's bytes they hold.

    tables: the replicas' LMDB environments; grows with the data. journal, ballast: bounded by settings.
    """

    user_bytes: int
    replicas: int
    tables: int
    journal: int
    ballast: int

    @property
    def tables_per_user_byte(self) -> float:
        """For one replica."""
        return self.tables / (self.user_bytes * self.replicas)

    def document(self) -> dict[str, float]:
        return {
            "user_bytes": self.user_bytes,
            "replicas": self.replicas,
            "tables_bytes": self.tables,
            "journal_bytes": self.journal,
            "ballast_bytes": self.ballast,
            "tables_per_user_byte_and_replica": round(self.tables_per_user_byte, 3),
        }


def measure_nodes(nodes: Iterable[Path], user_bytes: int) -> Space:
    """nodes: data directories, one replica in each; user_bytes: of the volume that were written."""
    directories = list(nodes)
    tables, journal, ballast = (
        sum(_allocated(directory / part) for directory in directories) for part in ("replicas", "journal", "ballast")
    )
    return Space(user_bytes, len(directories), tables, journal, ballast)


def _allocated(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(_size(file) for file in files)


def _size(file: Path) -> int:
    try:
        found = file.stat()
    except FileNotFoundError:
        return 0  # a journal file may go while this looks
    return found.st_blocks * _STAT_BLOCK
