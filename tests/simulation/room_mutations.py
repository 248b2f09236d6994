"""Ways of breaking what a leader does with full members on purpose."""

from typing import Any, Final

from blockstore.replication.requests import Requests
from blockstore.replication.room import QuorumRoom, Room
from blockstore.replication.write_queue import NEEDS_ROOM, WriteQueue
from tests.simulation.table_mutations import Patch

_JUDGE: Final = QuorumRoom._judge
_LOOK: Final = Requests.look_for_room


def _refuse_at_once(room: QuorumRoom, now: float) -> Room:
    """Also while somebody who is away for a moment would do."""
    judged = _JUDGE(room, now)
    return Room.NONE if judged is Room.AWAITED else judged


def _never_let_go(requests: Requests, now: float) -> list[Any]:
    """What is held ends at the retry limit, whoever has room again."""
    return [] if requests._room.look(now) and requests._room.room is Room.ENOUGH else _LOOK(requests, now)


ROOM_MUTATIONS: Final[dict[str, tuple[Patch, ...]]] = {
    "refuse_writes_while_one_member_is_away": ((QuorumRoom, "_judge", _refuse_at_once),),
    "write_where_too_few_have_room": ((QuorumRoom, "_judge", lambda *_: Room.ENOUGH),),
    "hold_what_there_is_room_for": ((Requests, "look_for_room", _never_let_go),),
    "let_a_trim_pass_the_write_below_it": (
        (WriteQueue, "_has_to_wait", lambda _, operation: operation.kind in NEEDS_ROOM),
    ),
}
