"""Ways of breaking a change of members on purpose (rule 7)."""

from typing import Any, Final

from blockstore.domain import Configuration
from blockstore.replication.leader import Leader
from blockstore.replication.quorum import Quorum
from tests.simulation.members import Members
from tests.simulation.table_mutations import Patch

_INIT: Final = Quorum.__init__


def _count_the_new_only(quorum: Quorum, configuration: Configuration) -> None:
    _INIT(quorum, Configuration(configuration.number, configuration.members))


def _count_the_old_only(quorum: Quorum, configuration: Configuration) -> None:
    _INIT(quorum, Configuration(configuration.number, configuration.old_members or configuration.members))


def _count_the_newcomer(quorum: Quorum, configuration: Configuration) -> None:
    """As a member that is whole, from the moment that it was created."""
    _INIT(quorum, Configuration(configuration.number, configuration.everyone))


def _readable_by_all(leader: Leader) -> tuple[Any, ...]:
    return tuple(leader._members.values())


def _no_record(leader: Leader) -> None:
    """Nothing is put behind what was in flight."""


MEMBER_MUTATIONS: Final[dict[str, tuple[Patch, ...]]] = {
    "count_a_quorum_of_the_new_members_only": ((Quorum, "__init__", _count_the_new_only),),
    "count_a_quorum_of_the_old_members_only": ((Quorum, "__init__", _count_the_old_only),),
    "count_the_newcomer_as_a_member": ((Quorum, "__init__", _count_the_newcomer),),
    "settle_without_a_record_on_both": ((Leader, "_append_configuration", _no_record),),
    "settle_when_control_feels_like_it": ((Members, "_may_settle", lambda _, record, __: bool(record.old_members)),),
    "read_from_who_is_leaving": ((Leader, "_readable", _readable_by_all),),
}
