"""Small breakages of the code that ships: each removes one rule at run time, and the simulation must find it.

    python -m tests.cluster_simulation --mutations            # all of them
    python -m tests.cluster_simulation --mutations NAME ...

Each says which faults bring it out, so that few seeds are enough; found is whatever ends a simulation: most end with a
block or a snapshot that holds what it cannot, some with a cluster that does not heal.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final
from unittest import mock

import tests.cluster_simulation.cluster
from blockstore.domain import Configuration, ReplicaId
from blockstore.node.journal_writer import Durable
from blockstore.record import Operation, OperationKind
from blockstore.replication import recovery
from blockstore.replication.attaching import Attaching
from blockstore.replication.follower import Follower
from blockstore.replication.leader import Leader
from blockstore.replication.messages import Append, LeaderEffect, Persist, SealEpoch
from blockstore.replication.quorum import Quorum, V
from blockstore.replication.reads import Reads
from blockstore.storage import reads as storage_reads
from blockstore.storage.journal import JournalEntry
from blockstore.storage.meta import Meta
from nbd_server import transmission
from tests.cluster_simulation.disk import SimulatedDisk
from tests.cluster_simulation.journal import SimulatedJournalWriter
from tests.cluster_simulation.run import simulate

#: A class or a module, what of it, and what stands in its place.
Patch = tuple[Any, str, Any]


@dataclass(frozen=True, slots=True)
class Mutation:
    """kinds: of faults that bring it out; with_users: beside what people do. found_by: a seed, run for lasts_s."""

    patches: tuple[Patch, ...]
    kinds: Mapping[str, int]
    with_users: bool = False
    lasts_s: float = 15.0
    found_by: int = 0


class _AcksBeforeTheDisk(SimulatedJournalWriter):
    def submit(self, entries: list[JournalEntry], durable: Durable) -> None:
        super().submit(entries, _nothing)
        durable(0)

    def _takes_s(self) -> tuple[float, float]:
        return 0.1, 0.5


def _nothing(number: int) -> None:
    """It was told before."""


def _any(quorum: Quorum, replicas: Collection[ReplicaId]) -> bool:
    return bool(replicas)


def _all_of_the_old(quorum: Quorum, replicas: Collection[ReplicaId]) -> bool:
    return all(replica in replicas for replica in quorum._sets[-1])


def _highest(quorum: Quorum, values: Mapping[ReplicaId, V]) -> V:
    return max(values.values())


_INIT: Final = Quorum.__init__
_ENTER: Final = Follower._enter
_SUBMIT: Final = Leader.submit
_ARRIVED: Final = Reads.arrived


def _new_members_only(quorum: Quorum, configuration: Configuration) -> None:
    _INIT(quorum, Configuration(configuration.number, configuration.members))


def _enter_with_what_is_committed(follower: Follower, message: SealEpoch | Append) -> Persist:
    """As if the tail that a replica has not heard to be committed were nobody's."""
    if message.epoch == follower.epoch or follower.filling is not None:
        return _ENTER(follower, message)
    follower._run.truncate(follower.commit.sequence)
    follower._durable = min(follower._durable, int(follower.commit.sequence))
    return _ENTER(follower, message)


def _fill_like_the_guest(leader: Leader, ticket: Hashable, operation: Operation, now: float) -> list[LeaderEffect]:
    if operation.kind is OperationKind.FILL:
        operation = replace(operation, kind=OperationKind.WRITE)
    return _SUBMIT(leader, ticket, operation, now)


class _Anything:
    """Equal to whatever it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


_POWER: Final = {"power_cut": 1, "kill_several": 1}

MUTATIONS: Final[dict[str, Mutation]] = {
    "acks_before_the_disk": Mutation(
        ((tests.cluster_simulation.cluster, "SimulatedJournalWriter", _AcksBeforeTheDisk),), _POWER
    ),
    "a_journal_that_is_not_synced": Mutation(((SimulatedDisk, "sync", lambda disk, fd: None),), {"power_cut": 1}),
    "any_one_is_a_quorum": Mutation(
        ((Quorum, "reached", _any), (Quorum, "reached_before", _all_of_the_old), (Quorum, "level", _highest)),
        {"taken_over": 1},
    ),
    "answers_while_it_holds": Mutation(((transmission, "changes", lambda request: False),), {"sealed_late": 1}),
    "reads_without_a_lease": Mutation(
        ((Reads, "arrived", lambda reads, attempt, leased: _ARRIVED(reads, attempt, True)),), {"taken_over": 1}
    ),
    "serves_before_the_old_lease_is_over": Mutation(
        ((Attaching, "older_leases_are_over", lambda attaching, now: True),), {"taken_over": 1}
    ),
    "believes_an_old_copy": Mutation(
        (
            (Follower, "know_acked", lambda follower, position: []),
            (Attaching, "_learn", lambda attaching, member, answer: []),
        ),
        {"old_copy": 1},
        lasts_s=60.0,
    ),
    "counts_the_new_members_only": Mutation(((Quorum, "__init__", _new_members_only),), {"cut_off_changing": 1}),
    "commits_what_one_member_has": Mutation(((Quorum, "level", _highest),), {"taken_over": 1}),
    "cuts_what_a_replica_knows_no_commit_of": Mutation(
        ((Follower, "_enter", _enter_with_what_is_committed),),
        {"taken_over": 1, "kill_several": 2},
        lasts_s=30.0,
        found_by=1,
    ),
    "fills_cover_the_guest": Mutation(
        ((Leader, "submit", _fill_like_the_guest),), {"used_while_it_hydrates": 1}, found_by=2
    ),
    "merges_what_is_pinned": Mutation(((Meta, "pinned", lambda meta: set()),), {"sealed_late": 1}),
    "believes_what_fails_its_checksum": Mutation(
        (
            (storage_reads, "block_checksum", lambda *_: _Anything()),
            (storage_reads, "block_checksums", lambda *_: _Anything()),
            (storage_reads, "run_checksums", lambda *_: _Anything()),
        ),
        {"rot": 1},
        lasts_s=60.0,
        found_by=2,
    ),
    "forgets_floors": Mutation(
        ((recovery, "_may_be_above", lambda answer, end: answer is None),), {"old_copy": 1}, lasts_s=60.0
    ),
}


def find(mutation: Mutation, seeds: Iterable[int]) -> tuple[int, Exception] | None:
    """The first seed that finds it, and how; None where none does. Raises what is no finding: a mistake in here."""
    with ExitStack() as stack:
        for owner, name, value in mutation.patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        for seed in seeds:
            try:
                simulate(seed, mutation.lasts_s, mutation.kinds, with_users=mutation.with_users)
            except Exception as error:
                found = _innermost(error)
                if not isinstance(found, AssertionError):
                    raise
                return seed, found
    return None


def _innermost(error: Exception) -> Exception:
    """Of several tasks the first one's."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
