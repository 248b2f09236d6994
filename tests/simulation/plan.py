"""What a seed decides before anything happens: the volume, its guests, the faults, and how often each strikes."""

from dataclasses import dataclass
from random import Random
from typing import Final

from blockstore.replication.leader import LeaderSettings
from blockstore.units import BLOCK_SIZE
from tests.simulation.network import NetworkFaults
from tests.simulation.node import DiskSpeed


@dataclass(frozen=True, slots=True)
class Plan:
    """What a seed decides before anything happens. Rates are events per virtual second.

    mapped: of a restored volume, the blocks that its source maps; none for any other. changes: of its members.
    """

    members: int
    created_filling: bool
    blocks: int
    requests: int
    depth: int
    think_s: float
    hot: float
    kinds: tuple[str, ...]
    weights: tuple[float, ...]
    checkpoint_s: float
    checkpoint_records: int
    history_records: int
    clock_drift: float
    chaos_s: float
    faults: tuple[tuple[str, float], ...]
    network: NetworkFaults
    disk: DiskSpeed
    settings: LeaderSettings
    final_power_cut: bool
    loses_a_quorum: bool
    goes_back: bool
    mapped: tuple[int, ...]
    fill_pause_s: float
    changes: int


#: Each kind of fault, and how often it happens in a seed that has it.
FAULTS: Final = {
    "crash_node": 0.6,
    "crash_all_nodes": 0.25,
    "crash_front_end": 0.5,
    "attach_beside": 0.4,
    "attach_briefly": 0.3,
    "split": 0.4,
    "pause_front_end": 0.4,
    "pause_node": 0.4,
    "isolate_node": 0.5,
    "isolate_front_end": 0.4,
    "cut_one_way": 0.5,
    "slow_way": 0.5,
    "break_stream": 2.0,
    "full_node": 0.4,
    "bad_blocks": 1.0,
    "lost_entries": 0.5,
    "damage_node": 0.4,
    "old_copy": 0.8,
    "forgotten_copy": 0.3,
    "checkpoint": 2.0,
    "no_room": 2.0,
    "merge": 5.0,
}

#: Half of the seeds look for trouble of one kind: faults that belong together, each as often as said here.
_SPLITS: Final = {"split": 0.8, "pause_front_end": 0.5, "checkpoint": 1.0}
_FILLINGS: Final = {
    "crash_node": 0.8, "damage_node": 0.8, "crash_front_end": 0.4, "checkpoint": 3.0, "no_room": 3.0, "merge": 4.0,
}  # fmt: skip
_ATTACHMENTS: Final = {"attach_briefly": 4.0, "crash_node": 0.5, "break_stream": 2.0}
_OLD_COPIES: Final = {"forgotten_copy": 6.0, "checkpoint": 10.0, "isolate_node": 0.5, "crash_front_end": 0.5}
#: Between two steps some members know of a record, and others are asked by who comes next.
_CHANGES: Final = {"isolate_node": 2.0, "slow_way": 3.0, "crash_front_end": 1.5, "attach_briefly": 1.0}
#: Who has no room, and who is away: which of both is why a write has to wait.
_FULL_DISKS: Final = {"full_disks": 3.0, "isolate_node": 1.0, "crash_node": 1.0, "no_room": 1.0}
#: All at once, beside changes of members: what is known of who acked what, and who counts, comes from everywhere.
_TOGETHER: Final = {
    "full_disks": 0.7, "forgotten_copy": 4.0, "old_copy": 1.0, "checkpoint": 6.0, "isolate_node": 1.0,
    "crash_front_end": 0.5, "damage_node": 0.4,
}  # fmt: skip
_TROUBLES: Final = (_SPLITS, _FILLINGS, _ATTACHMENTS, _OLD_COPIES)


def draw_plan(random: Random, *, changes: bool = False, full_disks: bool = False) -> Plan:
    """Each seed has a few kinds of faults and of requests, some of them often: so rare meetings happen.

    changes: members come and go. full_disks: several disks are full at once.
    """

    def some(probability: float, value: float) -> float:
        return value * random.random() if random.random() < probability else 0.0

    trouble = random.choice(_TROUBLES) if random.random() < 0.5 else None
    if changes and random.random() < 0.7:
        trouble = _CHANGES
    if full_disks:
        trouble = _TOGETHER if changes else _FULL_DISKS
    share = 0.1 if trouble else 0.35
    faults = {kind: rate * (0.5 + random.random()) for kind, rate in FAULTS.items() if random.random() < share}
    fills = trouble is _FILLINGS or random.random() < 0.2
    weights = {
        "write": 6.0, "read": 4.0, "trim": 4.0 if fills else some(0.6, 4), "zero": some(0.4, 2),
        "seal": some(0.5, 3 if fills else 2), "pin": some(0.2, 0.5), "unpin": some(0.8 if fills else 0.5, 3),
        "discard": some(0.4, 2),
    }  # fmt: skip
    slow_disk = DiskSpeed(0.003, 0.3, 0.3)
    retained = random.choice((2, 4) if fills else (2, 4, 8, 40))
    blocks = 8 if fills else random.choice((8, 12, 16, 24))
    restored = random.random() < 0.35
    return Plan(
        members=5 if random.random() < 0.08 else 3,
        created_filling=random.random() < 0.12,
        blocks=blocks,
        requests=random.choice((60, 100, 150)),
        depth=random.choice((1, 2, 4, 8)),
        think_s=random.choice((0.02, 0.05) if fills or trouble else (0.002, 0.02, 0.1, 0.3)),
        hot=random.choice((0.0, 0.3, 0.8)),
        kinds=tuple(weights),
        weights=tuple(weights.values()),
        checkpoint_s=random.choice((0.1, 0.5, 2.0)),
        checkpoint_records=random.choice((1, 4) if fills else (1, 4, 16, 100)),
        history_records=0 if fills else random.choice((0, 0, 4, 100)),
        clock_drift=random.choice((0.0, 0.1)),
        chaos_s=4.0 if trouble is _SPLITS else 1.0 + random.random() * 4,
        faults=tuple({**faults, **(trouble or {})}.items()),
        network=NetworkFaults(
            latency_s=random.choice((0.0003, 0.002, 0.01)), late=some(0.5, 0.2), late_s=random.choice((0.05, 0.5, 2.0)),
            lost=some(0.3, 0.1), repeated=some(0.4, 0.3),
        ),
        disk=slow_disk if fills else DiskSpeed(random.choice((0.0005, 0.003)), some(0.5, 0.2), 0.3),
        settings=LeaderSettings(
            heartbeat_s=0.3, retry_limit_s=random.choice((1.0, 3.0)), max_records_in_flight=random.choice((1, 2, 4)),
            max_record_bytes=random.choice((4, 8)) * BLOCK_SIZE, retained_bytes=retained * BLOCK_SIZE,
            queue_bytes=random.choice((8, 64)) * BLOCK_SIZE, batch_bytes=random.choice((0, 0, 4)) * BLOCK_SIZE,
        ),
        final_power_cut=random.random() < 0.2,
        loses_a_quorum=random.random() < 0.04 and not changes,
        goes_back=random.random() < 0.04,
        mapped=tuple(block for block in range(blocks) if restored and random.random() < 0.6),
        fill_pause_s=random.choice((0.01, 0.05, 0.2)),
        changes=random.choice((1, 3, 6)) if changes else 0,
    )  # fmt: skip
