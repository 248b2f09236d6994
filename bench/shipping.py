"""python -m bench.shipping: what a full backup takes beside restic's, and what a guest feels of it, by turns.

Each round has a cluster and a repository of its own, with nothing else in them, so that nothing is deduplicated and no
round finds what the one before left: restic backs the image up, then Cairn; then a guest writes at random, alone and
while another volume of random bytes is shipped. One round says little on a machine that others share: the
medians of several do, as ratios.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.markdown import table
from bench.snapshots import PEERS, Peer, make_image, running_cairn
from blockstore.units import GIB, format_size, parse_size


@dataclass(frozen=True, slots=True)
class Round:
    """Times of a full backup in seconds; a guest's latency at p99 in ms."""

    restic_s: float
    cairn_s: float
    alone_ms: float
    shipping_ms: float

    @property
    def backup_ratio(self) -> float:
        """Cairn's time over restic's."""
        return self.cairn_s / self.restic_s

    @property
    def guest_ratio(self) -> float:
        """The guest's latency while shipping over that alone."""
        return self.shipping_ms / self.alone_ms


def measure_round(directory: Path, image: Path, size: int) -> Round:
    """In a directory of its own, which goes with what is in it."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        scratch = Path(name)
        restic_s, _ = Peer(scratch / "restic", *PEERS["restic"]).backup(image, "full")
        with running_cairn(scratch, size) as cairn:
            cairn_s = cairn.back_up(image).seconds
            alone, shipping = cairn.beside_shipping(cairn.attach_guest())
    assert cairn_s is not None
    return Round(restic_s, cairn_s, alone.p99_us / 1000, shipping.p99_us / 1000)


def rows_of(rounds: list[Round]) -> list[list[str]]:
    """A row for each, then the medians; ratios are medians of each round's own."""
    rows = [_row(str(number), each) for number, each in enumerate(rounds, 1)]
    backup, guest = median(each.backup_ratio for each in rounds), median(each.guest_ratio for each in rounds)
    rows.append(["median of ratios", "", f"{backup:.2f}", "", f"{guest:.2f}"])
    return rows


def _row(name: str, each: Round) -> list[str]:
    return [
        name,
        f"{each.restic_s:.2f} s",
        f"{each.cairn_s:.2f} s, {each.backup_ratio:.2f}",
        f"{each.alone_ms:.1f} ms",
        f"{each.shipping_ms:.1f} ms, {each.guest_ratio:.2f}",
    ]


def main(arguments: list[str]) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m bench.shipping", description=__doc__)
    parser.add_argument("--size", type=parse_size, default=GIB, help="of the image, and of what is shipped (1G)")
    parser.add_argument("--rounds", type=int, default=5, help="of about two minutes each (5)")
    parser.add_argument("--directory", type=Path, help="for the data (default: the system's for temporary files)")
    options = parser.parse_args(arguments)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        image = Path(name) / "image"
        make_image(image, options.size)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            rounds.append(measure_round(Path(name), image, options.size))
    head = [f"image of {format_size(options.size)}", "restic", "cairn", "guest's p99 alone", "while shipping"]
    print("\n".join(table(head, rows_of(rounds))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
