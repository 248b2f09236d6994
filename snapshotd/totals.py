"""What a daemon of the object store did since it started: plain numbers, for whoever shows them."""

from dataclasses import dataclass


@dataclass(slots=True)
class ShipTotals:
    """read_bytes: of replicas, also for attempts that failed. The other bytes are of snapshots that were completed.

    changed_bytes: what they bring. deduplicated_bytes: what of that was in the store. stored_bytes: what was put
    there for the rest, compressed and encrypted. pauses: attempts that are made again.
    """

    read_bytes: int = 0
    changed_bytes: int = 0
    deduplicated_bytes: int = 0
    stored_bytes: int = 0
    completed: int = 0
    failed: int = 0
    pauses: int = 0


@dataclass(slots=True)
class ServedTotals:
    """Bytes of snapshots that front-ends fetched: for guests who waited, and in the background."""

    guest_bytes: int = 0
    background_bytes: int = 0


@dataclass(slots=True)
class PruneTotals:
    """begun: no dry runs. ended: those that went through. The rest is of those."""

    begun: int = 0
    ended: int = 0
    objects_deleted: int = 0
    packs_repacked: int = 0
    bytes_freed: int = 0
