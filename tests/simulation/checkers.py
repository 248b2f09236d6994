"""What must hold, whatever happens: watched at every step, by a model that shares nothing with the core.

The committed log is rebuilt from what replicas and leaders say is committed. It is the order against
which everything else is judged:

- a position names one record, and a sequence, once committed, one position, on every replica;
- nothing is committed that a quorum of whole members does not hold on disk;
- requests of one attachment that change one block are in it in the order in which they were made;
- an acknowledged write is in it, behind all that was acknowledged before the write began;
- a read shows a state no older than what any completed request had shown when it began;
- a replica never says that it holds what its disk does not, and what its disk answers for never falls;
- at the end every replica shows what the log says, now and in each sealed generation.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from blockstore.domain import ORIGIN, Configuration, Position, ReplicaId
from blockstore.errors import CairnError
from blockstore.log import UNKNOWN_FLOOR, LogEntry, RecordEntry
from blockstore.record import Operation, OperationKind, Record
from blockstore.replication.messages import AppendAnswer, FencedBy, SealAnswer
from blockstore.units import FIRST_GENERATION, Epoch, Generation
from tests.simulation.disk import DiskState, read_disk
from tests.simulation.model_tables import Pin, ticket_in, values_of
from tests.simulation.room_checker import RoomChecker
from tests.simulation.violation import Violation, expect
from tests.simulation.workload import Ticket

if TYPE_CHECKING:
    from tests.simulation.front_end import FrontEnd
    from tests.simulation.node import Node
    from tests.simulation.requests import Described


class Checker:
    """shown: the highest sequence whose effect a completed request has shown to a guest.

    loss_accepted: what was acknowledged may be gone, as somebody said with --accept-loss; all else holds.
    source: of a restored volume, what its blocks show until they are written; a fill changes nothing.
    """

    def __init__(self, blocks: int, source: Mapping[int, int]) -> None:
        self._records: dict[Position, Record] = {}
        self._record_of: dict[int, Record] = {}
        self._tickets: dict[int, Ticket] = {}
        self._held: dict[Position, set[ReplicaId]] = defaultdict(set)
        self._disks: dict[ReplicaId, DiskState] = {}
        self._answered_epoch: dict[ReplicaId, Epoch] = {}
        self._served: set[Epoch] = set()
        self._committed_epochs: set[Epoch] = set()
        self._generation = int(FIRST_GENERATION)
        self._leader_commit: dict[Epoch, Position] = {}
        self.log: list[Record] = []
        self._source = source
        self.versions: list[list[tuple[int, int]]] = [[(0, source.get(block, 0))] for block in range(blocks)]
        self.sealed_at: dict[int, int] = {}
        #: By block: the epoch and the number of the request that changed it last.
        self._changed_by: list[tuple[Epoch, int]] = [(Epoch(0), 0)] * blocks
        self._room = RoomChecker()
        self.shown = 0
        self.loss_accepted = False
        self.completed_requests = 0
        self.failed_requests = 0

    # ---- replicas

    def submitted(self, node: "Node", entries: Iterable[LogEntry]) -> None:
        """A replica is about to write these."""
        for entry in entries:
            if isinstance(entry, RecordEntry):
                self._place(node, entry.record)

    def disk_changed(self, node: "Node", *, put_back: bool = False) -> None:
        """A group or a transaction is durable, or (put_back) the disk is another one."""
        before = self._disks.get(node.replica)
        disk = node.disk
        now = read_disk(disk.tables.image, disk.entries())
        self._disks[node.replica] = now
        if before is not None and not put_back:
            self._check_progress(node, before, now)
            for sequence, position in before.log.items():
                if now.log.get(sequence, position) != position:
                    self._held[position].discard(node.replica)
        if now.whole and disk.damage is None:
            for position in now.log.values():
                self._held[position].add(node.replica)

    def is_whole(self, node: "Node") -> bool:
        """Whether its disk holds all that it ever acked."""
        state = self._disks.get(node.replica)
        known = node.world.ever_acked(node.replica)
        sound = node.disk.damage is None and not node.disk.tables.lost
        return state is not None and state.whole and sound and state.end >= known

    def acked_since(self, node: "Node", position: Position) -> list[Position]:
        """Where its disk is whole: positions above that one that it may have acked."""
        state = self._disks.get(node.replica)
        return sorted(at for at in state.log.values() if at > position) if state is not None and state.whole else []

    def _check_progress(self, node: "Node", before: DiskState, now: DiskState) -> None:
        known = now.highest >= before.highest or before.floor == UNKNOWN_FLOOR
        expect(known, f"{node.name}: its disk answered for {before.highest}, now for {now.highest}")
        expect(now.epoch >= before.epoch, f"{node.name}: its disk had sealed {before.epoch}, now {now.epoch}")
        expect(now.applied >= before.applied, f"{node.name}: applied fell from {before.applied} to {now.applied}")
        if now.whole and before.whole and not self.loss_accepted:
            for sequence, position in before.log.items():
                if sequence and self._is_committed(position):
                    kept = sequence <= now.applied.sequence or now.log.get(sequence) == position
                    expect(kept, f"{node.name}: cut {position}, which is committed")

    def restored(self, node: "Node") -> None:
        """A node has started from its disk."""
        state = read_disk(node.disk.tables.image, node.disk.entries())
        follower, damage = node.follower, node.disk.damage
        self._answered_epoch.pop(node.replica, None)
        self._disks.setdefault(node.replica, state)
        expect(follower.epoch >= state.epoch, f"{node.name}: forgot that it sealed {state.epoch}")
        if damage is None and state.whole:
            expect(
                follower.whole and follower.end == state.end,
                f"{node.name}: its disk is whole up to {state.end}, it starts at {follower.end}",
            )
        else:
            floor = max(state.highest, damage or ORIGIN)
            filling = follower.filling
            expect(filling is not None, f"{node.name}: starts as whole, its disk has the floor {floor}")
            assert filling is not None
            expect(filling.floor >= floor, f"{node.name}: floor {floor} on disk, starts with {filling.floor}")

    def answers(self, node: "Node", message: SealAnswer | AppendAnswer | FencedBy) -> None:
        """What a replica says must be on its disk."""
        if isinstance(message, FencedBy):
            return
        state = self._disks[node.replica]
        sealed = self._answered_epoch.get(node.replica, Epoch(0))
        if isinstance(message, SealAnswer):
            self._answered_epoch[node.replica] = max(sealed, message.epoch)
            expect(state.epoch >= message.epoch, f"{node.name}: answered seal {message.epoch}, not on disk")
            claimed = message.end
        else:
            expect(message.epoch >= sealed, f"{node.name}: acked in epoch {message.epoch} after seal {sealed}")
            claimed = message.matched
        if message.whole:
            expect(state.whole, f"{node.name}: says that it is whole, its disk says filling")
            durable = claimed <= state.applied or state.log.get(claimed.sequence) == claimed
            expect(durable, f"{node.name}: claims {claimed}, its disk ends at {state.end}")

    def committed(self, node: "Node", records: tuple[Record, ...]) -> None:
        """A replica takes these as committed."""
        for record in records:
            self._note_committed(record.position, node.name, node.world.configuration)

    # ---- leaders

    def leader_stepped(self, front_end: "FrontEnd") -> None:
        self._room.leader_stepped(front_end)
        commit = front_end.leader.commit
        before = self._leader_commit.get(front_end.epoch, ORIGIN)
        if commit != before:
            expect(commit > before, f"{front_end.name}: commit fell from {before} to {commit}")
            self._leader_commit[front_end.epoch] = commit
            self._note_committed(commit, front_end.name, front_end.leader.configuration)

    def serving(self, front_end: "FrontEnd") -> None:
        epoch = front_end.epoch
        expect(epoch not in self._served, f"two leaders serve in epoch {epoch}")
        self._served.add(epoch)
        expect(epoch in self._committed_epochs, f"{front_end.name} serves, and no record of epoch {epoch} is committed")

    def over(self, front_end: "FrontEnd") -> None:
        expect(front_end.guest.idle, f"{front_end.name} ended and left requests open")

    # ---- guests

    def submitted_request(self, front_end: "FrontEnd", ticket: Ticket) -> None:
        if ticket.operation is not None:
            self._tickets[id(ticket.operation)] = ticket

    def completed(self, front_end: "FrontEnd", ticket: Ticket) -> None:
        record = self._record_of.get(ticket.number)
        expect(record is not None, f"request {ticket.number} completed, and no replica ever had its record")
        assert record is not None
        self._note_committed(record.position, front_end.name, front_end.leader.configuration)
        expect(
            record.sequence > ticket.began,
            f"request {ticket.number} became {record.position}, and {ticket.began} was shown before it began",
        )
        self.shown = max(self.shown, int(record.sequence))
        self.completed_requests += 1

    def sealed(self, front_end: "FrontEnd", ticket: Ticket, generation: Generation) -> None:
        self.completed(front_end, ticket)
        expected = self._record_of[ticket.number].generation
        expect(generation == expected, f"seal {ticket.number} sealed {expected}, its guest was told {generation}")

    def failed(self, front_end: "FrontEnd", ticket: Ticket, error: CairnError) -> None:
        self.failed_requests += 1
        self._room.failed(front_end, error)

    def read(self, front_end: "FrontEnd", ticket: Ticket, values: list[int]) -> None:
        expect(len(values) == ticket.count, f"read {ticket.number}: {len(values)} blocks for {ticket.count}")
        shown = 0
        for block, value in enumerate(values, ticket.start):
            at = self._shows(block, value, ticket.began)
            if at is None:
                raise Violation(
                    f"{front_end.name}: read {ticket.number} of block {block} shows {value} (written by "
                    f"{self._where(value)}), after {ticket.began} had been shown; the log has "
                    f"{self.versions[block][-4:]}"
                )
            shown = max(shown, at)
        self.shown = max(self.shown, shown)
        self.completed_requests += 1

    # ---- the end

    def content(self, generation: int | None) -> list[int]:
        """What the log says, now or as of a sealed generation."""
        limit = len(self.log) if generation is None else self.sealed_at[generation]
        return [[value for at, value in versions if at <= limit][-1] for versions in self.versions]

    def compare(self, node: "Node") -> None:
        """Everything is committed and applied: the replica shows what the log says."""
        tables = node.store.tables
        self._compare_content(node, None)
        pins = self._pins()
        expect(set(tables.pins) == pins, f"{node.name} has pins {tables.pins}, the log {pins}")
        for generation in {generation for generation, _ in pins}:
            sealed = tables.sealed.get(generation), self.sealed_at[generation]
            expect(sealed[0] == sealed[1], f"{node.name}: generation {generation} was sealed at {sealed}")
            self._compare_content(node, generation)
        ended = not self._source or self.hydrated
        expect(tables.source != ended, f"{node.name}: has a source is {tables.source}, the log says {not ended}")

    def _compare_content(self, node: "Node", generation: int | None) -> None:
        tables, expected = node.store.tables, self.content(generation)
        absent = self._source if tables.source else {}
        shown = [tables.show(block, generation) for block in range(len(self.versions))]
        found = [absent.get(block, 0) if value is None else value for block, value in enumerate(shown)]
        expect(found == expected, f"{node.name} shows {found} in generation {generation}, the log says {expected}")

    def described(self, front_end: "FrontEnd", found: "Described") -> None:
        """A replica says whether there is a source, and what is pinned, as of a position."""
        at = found.applied.sequence
        expect(self._is_committed(found.applied), f"{front_end.name} was told of {found.applied}")
        ended = not self._source or any(_ends_source(record) for record in self.log[:at])
        expect(found.meta.source != ended, f"{front_end.name}: told of a source {found.meta.source} at {at}")
        expect(set(found.meta.pins) == self._pins(at), f"{front_end.name}: told of pins {found.meta.pins} at {at}")

    @property
    def hydrated(self) -> bool:
        """Whether the log has ended the source."""
        return any(map(_ends_source, self.log))

    def _pins(self, up_to: int | None = None) -> set[Pin]:
        """What the log pins, up to a sequence."""
        pins: set[Pin] = set()
        for record in self.log[:up_to]:
            for operation in record.operations:
                pin = int(operation.start), operation.argument
                if operation.kind is OperationKind.SEAL:
                    pins.add((int(record.generation), operation.argument))
                elif operation.kind is OperationKind.PIN:
                    pins.add(pin)
                elif operation.kind is OperationKind.UNPIN:
                    pins.discard(pin)
        return pins

    # ---- the log

    def _place(self, node: "Node", record: Record) -> None:
        """A position names one record."""
        known = self._records.get(record.position)
        if known is not None:
            same = known is record or known.encoded == record.encoded
            expect(same, f"{node.name}: two records at {record.position}")
            return
        self._records[record.position] = record
        for operation in record.operations:
            number = self._ticket_of(operation)
            if number is not None:
                twice = number in self._record_of
                expect(not twice, f"request {number} is in two records, one of them {record.position}")
                self._record_of[number] = record

    def _ticket_of(self, operation: Operation) -> int | None:
        match operation.kind:
            case OperationKind.WRITE:
                return int.from_bytes(operation.data[:8], "little")
            case OperationKind.FILL:
                return ticket_in(operation.data)
            case OperationKind.EPOCH_START | OperationKind.CONFIGURATION:
                return None
            case _:
                return self._tickets[id(operation)].number

    def _note_committed(self, position: Position, who: str, configuration: Configuration) -> None:
        """`position` and all before it are committed, says `who`, under that configuration."""
        if self._is_committed(position):
            return
        if position.sequence <= len(self.log) and not self.loss_accepted:
            known = self.log[position.sequence - 1].position if position.sequence else ORIGIN
            raise Violation(f"{who}: {position} is committed, and {known} was before")
        holders = self._held[position]
        for members in filter(None, (configuration.members, configuration.old_members)):
            count = sum(member.replica in holders for member in members)
            expect(
                2 * count > len(members),
                f"{who}: {position} is committed, and {count} whole replicas of {len(members)} hold it",
            )
        chain: list[Record] = []
        at = position
        while at.sequence > len(self.log) or (self.loss_accepted and not self._is_committed(at)):
            chain.append(self._records[at])
            at = chain[-1].previous
        if self.loss_accepted:
            self._forget_above(int(at.sequence))
        joint = self.log[-1].position if self.log else ORIGIN
        expect(at == joint, f"{who}: {position} is committed on top of {at}, and {joint} was before")
        for record in reversed(chain):
            self._append(record)

    def _is_committed(self, position: Position) -> bool:
        sequence = position.sequence
        if sequence == 0:
            return position == ORIGIN
        return sequence <= len(self.log) and self.log[sequence - 1].position == position

    def _forget_above(self, sequence: int) -> None:
        """What was committed above that is lost, and somebody said that it may be."""
        del self.log[sequence:]
        self.versions = [[version for version in versions if version[0] <= sequence] for versions in self.versions]
        self.sealed_at = {generation: at for generation, at in self.sealed_at.items() if at <= sequence}
        self._generation = int(FIRST_GENERATION) + len(self.sealed_at)
        self.shown = min(self.shown, sequence)

    def _append(self, record: Record) -> None:
        self.log.append(record)
        self._committed_epochs.add(record.position.epoch)
        expected = self._generation
        expect(record.generation == expected, f"{record.position} is of {record.generation}, not {expected}")
        touched: set[int] = set()
        for operation in record.operations:
            if operation.kind is OperationKind.SEAL:
                self.sealed_at[self._generation] = int(record.sequence)
                self._generation += 1
            elif operation.kind is OperationKind.HYDRATED:
                self._check_hydrated(record)
            elif operation.on_blocks:
                for block, value in zip(range(operation.start, operation.end), values_of(operation), strict=True):
                    expect(block not in touched, f"operations of {record.position} overlap at {block}")
                    touched.add(block)
                    self._append_change(record, operation, block, value)

    def _append_change(self, record: Record, operation: Operation, block: int, value: int) -> None:
        kind, number = operation.kind, self._ticket_of(operation)
        assert number is not None
        if kind is OperationKind.FILL:
            expect(self._source.get(block) == value, f"{record.position} fills block {block} with {value}")
            expect(not any(map(_ends_source, self.log[:-1])), f"{record.position} fills, yet is hydrated")
            return
        if kind is OperationKind.DISCARD:
            expect(block not in self._source, f"{record.position} discards block {block}, which the source maps")
        before, by = self._changed_by[block], (record.position.epoch, number)
        in_order = before[0] != by[0] or before[1] < by[1]
        expect(in_order, f"{record.position} changes block {block} for request {number}, after {before[1]} did")
        self._changed_by[block] = by
        self.versions[block].append((int(record.sequence), value))

    def _check_hydrated(self, record: Record) -> None:
        """Whoever ends the source has seen to every block that it maps."""
        seen = {
            block
            for before in self.log
            for operation in before.operations
            if operation.on_blocks
            for block in range(operation.start, operation.end)
        }
        expect(
            seen >= self._source.keys(),
            f"{record.position} ends the source: {self._source.keys() - seen} is not filled",
        )

    def _shows(self, block: int, value: int, began: int) -> int | None:
        """The sequence of a version with that value that was not overwritten by `began`; None: there is none."""
        versions = self.versions[block]
        following = float("inf")
        for at, held in reversed(versions):
            if following <= began:
                return None
            if held == value:
                return at
            following = at
        return None

    def _where(self, value: int) -> str:
        record = self._record_of.get(value)
        return "nobody" if record is None else str(tuple(record.position))


def _ends_source(record: Record) -> bool:
    return any(operation.kind is OperationKind.HYDRATED for operation in record.operations)
