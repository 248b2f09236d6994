"""What is measured: the workloads, each a pattern, a block size and a depth."""

from dataclasses import dataclass
from typing import Final

from blockstore.units import KIB, MIB

#: Of the mixed workload.
READS_PERCENT: Final = 70


@dataclass(frozen=True, slots=True)
class Workload:
    """pattern: fio's word for it (randwrite, randread, randrw, write, read). depth: requests in flight."""

    pattern: str
    block_size: int
    depth: int

    @property
    def name(self) -> str:
        """Such as randwrite-4k-32."""
        size = f"{self.block_size // MIB}m" if self.block_size >= MIB else f"{self.block_size // KIB}k"
        return f"{self.pattern}-{size}-{self.depth}"

    @property
    def is_sequential(self) -> bool:
        return not self.pattern.startswith("rand")

    def options(self) -> list[str]:
        """As fio takes them."""
        options = [f"--rw={self.pattern}", f"--bs={self.block_size}", f"--iodepth={self.depth}"]
        return [*options, f"--rwmixread={READS_PERCENT}"] if self.pattern == "randrw" else options


FILL: Final = Workload("write", MIB, 8)
"""Writes a whole volume once, so that what is read was written."""
OVERWRITE: Final = Workload("randwrite", 4 * KIB, 128)
"""Writes every block of it once more, in random order."""
SUSTAINED: Final = Workload("write", MIB, 8)
"""Longer than the others: with all that writing leads to later, such as checkpoints."""

RANDOM: Final = tuple(
    Workload(pattern, 4 * KIB, depth) for pattern in ("randwrite", "randread") for depth in (1, 32, 128)
)
MIXED: Final = (Workload("randrw", 4 * KIB, 32),)
SEQUENTIAL: Final = (Workload("write", MIB, 8), Workload("read", MIB, 8))
ALL: Final = RANDOM + MIXED + SEQUENTIAL
QUICK: Final = tuple(each for each in ALL if each.depth < 128)
