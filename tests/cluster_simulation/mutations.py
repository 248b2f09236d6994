"""Small breakages of the code that ships: each removes one rule at run time, and the simulation must find it.

    python -m tests.cluster_simulation --mutations            # all of them
    python -m tests.cluster_simulation --mutations NAME ...

Each says which faults bring it out, so that few seeds are enough; found is whatever ends a simulation: most end with a
block or a snapshot that holds what it cannot, some with a cluster that does not heal.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

import tests.cluster_simulation.cluster
from blockstore.domain import ReplicaId
from blockstore.node.journal_writer import Durable
from blockstore.replication.attaching import Attaching
from blockstore.replication.follower import Follower
from blockstore.replication.quorum import Quorum, V
from blockstore.replication.reads import Reads
from blockstore.storage.journal import JournalEntry
from nbd_server.hold import Hold
from tests.cluster_simulation.disk import SimulatedDisk
from tests.cluster_simulation.journal import SimulatedJournalWriter
from tests.cluster_simulation.run import simulate

#: A class or a module, what of it, and what stands in its place.
Patch = tuple[Any, str, Any]


@dataclass(frozen=True, slots=True)
class Mutation:
    """kinds: of faults that bring it out. seeds: how many are tried, each for lasts_s."""

    patches: tuple[Patch, ...]
    kinds: Mapping[str, int]
    seeds: int = 6
    lasts_s: float = 15.0


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


_ARRIVED: Final = Reads.arrived
_POWER: Final = {"power_cut": 1, "kill_several": 1}

MUTATIONS: Final[dict[str, Mutation]] = {
    "acks_before_the_disk": Mutation(
        ((tests.cluster_simulation.cluster, "SimulatedJournalWriter", _AcksBeforeTheDisk),), _POWER
    ),
    "a_journal_that_is_not_synced": Mutation(((SimulatedDisk, "sync", lambda disk, fd: None),), _POWER),
    "any_one_is_a_quorum": Mutation(
        ((Quorum, "reached", _any), (Quorum, "reached_before", _all_of_the_old), (Quorum, "level", _highest)),
        {"partition": 1},
    ),
    "answers_while_it_holds": Mutation(
        ((Hold, "keep", lambda hold, answer: answer()),), {"slow_front_end": 1}, lasts_s=25.0
    ),
    "reads_without_a_lease": Mutation(
        ((Reads, "arrived", lambda reads, attempt, leased: _ARRIVED(reads, attempt, True)),), {"partition": 1}
    ),
    "serves_before_the_old_lease_is_over": Mutation(
        ((Attaching, "older_leases_are_over", lambda attaching, now: True),), {"partition": 1}
    ),
    "believes_an_old_copy": Mutation(
        ((Follower, "know_acked", lambda follower, position: []),), {"old_copy": 1}, seeds=3, lasts_s=60.0
    ),
}
#: Those that a few seconds find, in the order of what they cost.
CHEAP: Final = ("a_journal_that_is_not_synced",)


def find(mutation: Mutation) -> tuple[int, Exception] | None:
    """The first seed that finds it, and how; None where none does."""
    with ExitStack() as stack:
        for owner, name, value in mutation.patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        for seed in range(mutation.seeds):
            try:
                simulate(seed, mutation.lasts_s, mutation.kinds)
            except Exception as error:
                return seed, error
    return None
