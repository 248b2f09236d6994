"""python -m bench.snapshots: shipping and restoring snapshots, with restic and borg on the same image in one run.

The image is made of this machine's files under /usr, one behind the other, each from a new block on. All of
them store it in a directory on the same disk, compressed and encrypted: a full backup, then one of 1% of
the blocks rewritten at random, then the same files in another order, then a restore to a file. Cairn reads the image
from the replicas of a volume, and also restores it to a volume that is used meanwhile; the others read a file.
"""

import argparse
import asyncio
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from bench.default_cluster import default_cluster
from bench.fio import Disk, Measurement, run_timed
from bench.host_memory import touch_memory
from bench.markdown import backup_table, table
from bench.report import describe_machine
from bench.workloads import Workload
from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.units import BLOCK_SIZE, GIB, KIB, MIB, format_size, parse_size
from tests.cluster import CAIRN, Cluster
from tests.daemons import wait_for
from tests.nbd_client import NbdClient
from tests.programs import find_program

_CHANGED_SHARE: Final = 0.01
_PAUSES: Final = 100
#: What heartbeats take, of all processes.
_RESTING_CORES: Final = 0.25
#: Of the image's size: a figure is of three copies, in journals and in tables, and of what reads and sends them.
_TOUCHED: Final = 8
_GUEST: Final = Workload("randwrite", 4 * KIB, 4)
_GUEST_S: Final = 4.0
#: A test's password, for directories that are deleted at the end.
_SECRET: Final = {"RESTIC_PASSWORD": "bench", "BORG_PASSPHRASE": "bench"}


@dataclass(frozen=True, slots=True)
class Figure:
    """text: all of it, for people. seconds: where it is a time to compare."""

    text: str
    seconds: float | None = None


Figures = dict[str, Figure]


def make_image(path: Path, size: int, *, backwards: bool = False) -> None:
    """`size` bytes of the files under /usr, by name; backwards: in the other order."""
    with path.open("wb") as image:
        for file in sorted(_files(), reverse=backwards):
            content = file.read_bytes()
            image.write(content[: size - image.tell()])
            image.seek(-image.tell() % BLOCK_SIZE, os.SEEK_CUR)
            if image.tell() >= size:
                break
        image.truncate(size)


def _files() -> Iterator[Path]:
    for path in Path("/usr").rglob("*"):
        if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK) and path.stat().st_size < 64 * MIB:
            yield path


def change_image(path: Path, size: int) -> list[int]:
    """Write 1% of the blocks anew, at random; returns which."""
    chance = random.Random(1)
    numbers = sorted(chance.sample(range(size // BLOCK_SIZE), int(size // BLOCK_SIZE * _CHANGED_SHARE)))
    with path.open("r+b") as image:
        for number in numbers:
            image.seek(number * BLOCK_SIZE)
            image.write(chance.randbytes(BLOCK_SIZE))
    return numbers


class Peer:
    """A backup program. commands: its repository is made by the first; {image}, {out} and {name} are filled in."""

    def __init__(self, directory: Path, init: str, backup: str, restore: str) -> None:
        self._directory = directory
        self._backup, self._restore = backup, restore
        self._run(init)

    def backup(self, image: Path, name: str) -> tuple[float, int]:
        """Seconds, and bytes that its repository grew by."""
        before, began = size_of(self._directory), time.monotonic()
        self._run(self._backup, image=image, name=name)
        return time.monotonic() - began, size_of(self._directory) - before

    def restore(self, name: str, scratch: Path) -> float:
        scratch.mkdir()
        began = time.monotonic()
        self._run(self._restore, name=name, out=scratch)
        seconds = time.monotonic() - began
        shutil.rmtree(scratch)
        return seconds

    def _run(self, command: str, image: Path | None = None, name: str = "", out: Path | None = None) -> None:
        words = [word.format(repo=self._directory, image=image, name=name, out=out) for word in command.split()]
        words[0] = str(find_program(words[0]))
        cache = {"XDG_CACHE_HOME": str(self._directory.parent / "cache"), "HOME": str(self._directory.parent)}
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, env={**os.environ, **_SECRET, **cache},
            cwd=out or self._directory.parent,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


PEERS: Final = {
    "restic": (
        "restic -r {repo} init --repository-version 2",
        "restic -r {repo} backup --tag {name} --compression auto {image}",
        "restic -r {repo} restore latest --tag {name} --target {out}",
    ),
    "borg": (
        "borg init -e repokey {repo}",
        "borg create --compression zstd,3 {repo}::{name} {image}",
        "borg extract {repo}::{name}",
    ),
}


def size_of(directory: Path) -> int:
    """Bytes of the files in it."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) if directory.exists() else 0


def measure_peer(name: str, scratch: Path, images: dict[str, Path]) -> Figures:
    """Each image backed up in turn, and the second one restored."""
    peer = Peer(scratch / name, *PEERS[name])
    touch_memory(scratch, _TOUCHED * images["full"].stat().st_size)
    figures = {image: _shipped(*peer.backup(path, image)) for image, path in images.items()}
    restored_s = peer.restore("increment", scratch / "out")
    return figures | {"restore to a file": Figure(f"{restored_s:.2f} s", restored_s)}


def _shipped(seconds: float, stored: int) -> Figure:
    return Figure(f"{seconds:.2f} s, {format_size(stored)}", seconds)


class Cairn:
    """A cluster with its defaults, a volume that holds the first image, and another one for the third."""

    def __init__(self, cluster: Cluster, size: int, scratch: Path) -> None:
        self._cluster, self._size, self._scratch = cluster, size, scratch
        self._store = scratch / "cairn" / "store"
        self.volume = cluster.create(size)
        self._uri = cluster.attach(self.volume)

    def load(self, uri: str, image: Path) -> None:
        subprocess.run([str(find_program("nbdcopy")), str(image), uri], check=True)

    def measure(self, images: dict[str, Path], changed: list[int]) -> Figures:
        figures = {"full": self.back_up(images["full"])}
        self._change(images["increment"], changed)
        figures["increment"] = self._ship(self.volume)
        source = self._latest
        other = self._cluster.create(self._size)
        self.load(self._cluster.attach(other), images["reordered"])
        figures["reordered"] = self._ship(other)
        return figures | self._export(source) | self._restore(source) | self._guest(source) | self._pauses()

    def back_up(self, image: Path) -> Figure:
        """It is written to the volume, which is shipped then."""
        self.load(self._uri, image)
        return self._ship(self.volume)

    def _settle(self) -> None:
        """Until no process of the cluster does more than say that it is there, and the memory to come is there."""
        processes = [psutil.Process(daemon.pid) for daemon in self._cluster.daemons]

        def rests() -> bool:
            before = sum(sum(process.cpu_times()[:2]) for process in processes)
            time.sleep(1.0)
            return sum(sum(process.cpu_times()[:2]) for process in processes) - before < _RESTING_CORES

        wait_for("the cluster to rest", rests, 300)
        touch_memory(self._scratch, _TOUCHED * self._size)

    def _ship(self, volume: str) -> Figure:
        self._settle()
        before, began = size_of(self._store), time.monotonic()
        (self._latest,) = self._cluster.snapshot(volume)
        return _shipped(time.monotonic() - began, size_of(self._store) - before)

    def _change(self, image: Path, changed: list[int]) -> None:
        """Write these blocks as `image` has them."""

        async def write() -> None:
            client = await NbdClient.connect(self._uri)
            with image.open("rb") as file:
                for number in changed:
                    file.seek(number * BLOCK_SIZE)
                    await client.write(number * BLOCK_SIZE, file.read(BLOCK_SIZE))
            await client.close()

        asyncio.run(write())

    def _new_volume(self, snapshot: str) -> tuple[str, str]:
        """A volume made from it, and where it is attached."""
        request = control_pb2.CreateVolumeRequest(snapshot=snapshot)
        volume = str(self._cluster.call("CreateVolume", request).id)
        wait_for(volume, lambda: self._cluster.volume(volume).state == control_pb2.VOLUME_STATE_AVAILABLE)
        return volume, self._cluster.attach(volume)

    def _restore(self, snapshot: str) -> Figures:
        self._settle()
        began = time.monotonic()
        volume, uri = self._new_volume(snapshot)
        read = ["qemu-io", "-f", "raw", "-r", "-c", f"read {self._size // 2} {BLOCK_SIZE}", uri]
        subprocess.run([str(find_program(read[0])), *read[1:]], check=True, capture_output=True)
        first = time.monotonic() - began
        self._wait_hydrated(volume)
        whole = time.monotonic() - began
        return {
            "restore to a volume, first byte": Figure(
                f"{first:.2f} s (create, attach and qemu-io's start included)", first
            ),
            "restore to a volume, hydrated": Figure(f"{whole:.2f} s, {self._size / MIB / whole:.0f} MiB/s", whole),
        }

    def _export(self, snapshot: str) -> Figures:
        """To a file, by the command that a user types: its start is in the time, as that of the others is."""
        self._settle()
        image = self._scratch / "exported"
        command = [str(CAIRN), "snapshot", "export", snapshot, str(image), "--control", self._cluster.control_address]
        began = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.monotonic() - began
        image.unlink()
        return {"restore to a file": Figure(f"{seconds:.2f} s (on the disk when it ends)", seconds)}

    def _guest(self, snapshot: str) -> Figures:
        """What a guest's writes feel of shipping and of hydration beside them: p50 and p99."""
        uri = self.attach_guest()
        alone, shipping = self.beside_shipping(uri)
        self._settle()
        volume, _ = self._new_volume(snapshot)
        hydrating = self._write(uri)
        self._wait_hydrated(volume)
        return {
            "guest alone": _latency(alone),
            "guest while shipping": _latency(shipping),
            "guest while hydrating": _latency(hydrating),
        }

    def attach_guest(self) -> str:
        """The URI of a new volume."""
        return self._cluster.attach(self._cluster.create(self._size))

    def beside_shipping(self, uri: str) -> tuple[Measurement, Measurement]:
        """A guest's writes alone, and while another volume, of random bytes, is shipped."""
        fresh = self._fresh()
        self._settle()
        alone = self._write(uri)
        shipping = threading.Thread(target=self._cluster.snapshot, args=(fresh,))
        shipping.start()
        beside = self._write(uri)
        shipping.join()
        return alone, beside

    def _wait_hydrated(self, volume: str) -> None:
        wait_for(f"{volume} to be hydrated", lambda: not self._cluster.volume(volume).HasField("source"), 600)

    def _fresh(self) -> str:
        """A volume of content that the store does not have."""
        volume = self._cluster.create(self._size)
        path = self._scratch / "fresh"
        with path.open("wb") as file:
            for _ in range(self._size // MIB):
                file.write(os.urandom(MIB))
        self.load(self._cluster.attach(volume), path)
        path.unlink()
        return volume

    def _write(self, uri: str) -> Measurement:
        """As a guest does."""
        return run_timed(_GUEST, Disk.nbd(uri), self._size // 4, _GUEST_S, self._scratch)

    def _pauses(self) -> Figures:
        """How long the guest's writes stand still for a snapshot, under load; each once the one before is shipped."""
        self._settle()
        ended = threading.Event()

        def write() -> None:
            while not ended.is_set():
                self._write(self._uri)

        load = threading.Thread(target=write)
        load.start()
        try:
            paused = sorted(self._pause() for _ in range(_PAUSES))
        finally:
            ended.set()
            load.join()
        worst = paused[_PAUSES * 99 // 100 - 1]
        return {
            f"pause for a snapshot, of {_PAUSES}": Figure(
                f"p50 {statistics.median(paused):.1f} ms, p99 {worst:.1f}, at most {paused[-1]:.1f}"
            )
        }

    def _pause(self) -> float:
        """Of one snapshot, in ms."""
        (snapshot,) = self._cluster.snapshot(self.volume)
        found = self._cluster.call("GetSnapshot", snapshot_pb2.GetSnapshotRequest(snapshot=snapshot))
        return float(found.pause_us) / 1000


def _latency(figures: Measurement) -> Figure:
    return Figure(f"{figures.iops:,.0f} IOPS, {figures.p50_us / 1000:.1f} / {figures.p99_us / 1000:.1f} ms")


@contextmanager
def running_cairn(scratch: Path, size: int) -> Iterator[Cairn]:
    """On a cluster with the defaults of every process."""
    with default_cluster(scratch / "cairn", snapshotds=1) as cluster:
        yield Cairn(cluster, size, scratch)


def measure_backups(
    directory: Path, size: int, say: Callable[[str], None], peers: Iterable[str] | None = None
) -> dict[str, Figures]:
    """Of each program that is installed, or of those in `peers`, and of Cairn. size: of the image, in bytes."""
    chosen = [each for each in PEERS if find_program(each)] if peers is None else peers
    with tempfile.TemporaryDirectory(dir=directory) as name:
        scratch = Path(name)
        images = {each: scratch / each for each in ("full", "increment", "reordered")}
        make_image(images["full"], size)
        shutil.copyfile(images["full"], images["increment"])
        changed = change_image(images["increment"], size)
        make_image(images["reordered"], size, backwards=True)
        results = {}
        for peer in chosen:
            say(f"back up with {peer}")
            results[peer] = measure_peer(peer, scratch, images)
        say("back up with cairn")
        with running_cairn(scratch, size) as cairn:
            return {"cairn": cairn.measure(images, changed)} | results


def main(arguments: list[str]) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m bench.snapshots", description=__doc__)
    parser.add_argument("--size", type=parse_size, default=GIB, help="of the image (1G)")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="default: all that are installed")
    parser.add_argument("--directory", type=Path, help="for the data (default: the system's for temporary files)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        machine = describe_machine(Path(name))
        results = measure_backups(
            Path(name), options.size, lambda line: print(line, file=sys.stderr, flush=True), options.peers
        )
    print(_report(machine, results, options.size))
    return 0


def texts_of(results: dict[str, Figures]) -> dict[str, dict[str, str]]:
    """For a table: figures of each program, by name."""
    return {program: {name: each.text for name, each in figures.items()} for program, figures in results.items()}


def seconds_of(results: dict[str, Figures]) -> dict[str, dict[str, float]]:
    """Of each program the times that can be compared, by name."""
    return {
        program: {name: each.seconds for name, each in figures.items() if each.seconds is not None}
        for program, figures in results.items()
    }


def _report(machine: dict[str, Any], results: dict[str, Figures], size: int) -> str:
    head, rows = backup_table(texts_of(results))
    head[0] = f"image of {format_size(size)}; load {machine['load_average']}"
    return "\n".join(table(head, rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
