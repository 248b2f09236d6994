"""Rules of reads out of a member's tables (rule 4), broken on purpose."""

from typing import Any, Final

from blockstore.domain import Position
from blockstore.replication.leader import Leader
from blockstore.replication.reads import Reads
from blockstore.replication.recent_writes import RecentWrites
from blockstore.units import Epoch
from tests.simulation.front_end import FrontEnd
from tests.simulation.model_tables import Tables
from tests.simulation.table_mutations import Patch

_MUST_REFLECT: Final = Leader.must_reflect
_REFLECTED: Final = RecentWrites.reflected


def _whatever_the_epoch(leader: Leader, *arguments: Any) -> Position | None:
    needed = _MUST_REFLECT(leader, *arguments)
    return None if needed is None else Position(Epoch(0), needed.sequence)


def _forget_all_of_it(recent: RecentWrites, sequence: int) -> None:
    """Once the tables reflect something, as if that were everything."""
    _REFLECTED(recent, max(recent._young.last, recent._old.last))
    recent._floor = min(recent._floor, sequence)


def _while_it_fills(tables: Tables, needed: Position) -> bool:
    return not tables.source and tables.image.applied >= needed


def _beside_a_source(tables: Tables, needed: Position) -> bool:
    return tables.image.filling is None and tables.image.applied >= needed


SHORT_CIRCUIT_MUTATIONS: Final[dict[str, tuple[Patch, ...]]] = {
    "read_tables_that_lack_the_newest_writes": ((RecentWrites, "newest", lambda recent, start, count: 0),),
    "read_tables_of_an_older_epoch": ((Leader, "must_reflect", _whatever_the_epoch),),
    "forget_writes_that_no_checkpoint_has_applied": ((RecentWrites, "reflected", _forget_all_of_it),),
    "read_tables_while_they_are_filled": (
        (Reads, "may_use_tables_of", lambda reads, replica, now: True),
        (FrontEnd, "shows", staticmethod(_while_it_fills)),
    ),
    "read_tables_behind_a_seal": ((FrontEnd, "fenced", lambda front_end, node: False),),
    "read_tables_without_a_lease": ((Leader, "may_hand_on", lambda leader, now: True),),
    "read_tables_beside_a_source": ((FrontEnd, "shows", staticmethod(_beside_a_source)),),
}
