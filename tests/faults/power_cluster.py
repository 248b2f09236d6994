"""A cluster whose machines all lose their power at once, again and again, whatever is under way.

That is: guests write to a volume of two segments and to a restored one, nodes checkpoint and merge all the time,
snapshots are sealed and shipped, and replicas move because one node after the other is drained. What was acknowledged
before a cut is checked after it: the blocks of the volumes, the snapshots in the catalog and their contents in the
object store, with the model of tests/crash/snapshots.py as judge.
"""

import dataclasses
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from blockstore.config import ControlSettings
from blockstore.rpc import control_pb2
from blockstore.units import MIB
from tests.cluster import NODE, Cluster
from tests.crash.snapshots import BLOCKS, CONTENTS, Begun, Play, Volume, Wrong
from tests.daemons import Daemon, wait_for
from tests.faults.power import CutReport, Loss, PowerDisk
from tests.faults.shim import Conditions, Steering

#: So short that a cut often falls between a write and the end of its sync.
_SYNCS: Final = Conditions(sync_least_us=0, sync_most_us=4_000, real_syncs=0)
#: The least that holds a group of the journal.
_JOURNAL_FILE_BYTES: Final = 8 * MIB
_LOSSES: Final = (Loss.ALL, Loss.SOME, Loss.TORN, Loss.TORN, Loss.NONE)
#: Checkpoints, merges and compaction go on all the time.
_NODE: Final = dataclasses.replace(NODE, checkpoint_s=0.1, upkeep_s=0.5, slack=0.05)
#: In one round; a guest's request is one block.
_WRITES: Final = range(20, 400)
_KEPT_SNAPSHOTS: Final = 3
#: A snapshot is sealed every second round: before the writes, so that the cut finds it being shipped, or beside them.
_SEALED_BEFORE, _SEALED_BESIDE, _SNAPSHOT_TURNS = 0, 2, 4
_RESTORE_EVERY: Final = 16
_DRAIN_EVERY: Final = 5
#: The last two share a zone: while one is drained, the other has the replicas of both.
_ZONES: Final = ("a", "b", "c", "c")
_DRAINED: Final = (2, 3)
#: From the request for a snapshot until the cut, at most: sealing takes some milliseconds, or some syncs.
_WITHIN_S: Final = 0.1


class Machines:
    """All daemons of a cluster in one process of tests.faults.launch: one kill takes the power of all."""

    def __init__(self, directory: Path, environment: dict[str, str], options: list[str]) -> None:
        self._order = directory / "daemons.pickle"
        self.log = directory / "daemons.log"
        command = [sys.executable, "-m", "tests.faults.launch", f"--log={self.log}", *options]
        environment = os.environ | environment | {"CAIRN_PARENT": str(os.getpid())}
        self._launcher = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._pid = 0

    @property
    def running(self) -> bool:
        return self._pid != 0

    def start(self, daemons: list[tuple[str, Any]]) -> None:
        """Start them at once; their address files tell when they listen."""
        assert not self.running
        assert self._launcher.stdin is not None
        self._order.write_bytes(pickle.dumps(daemons))
        self._launcher.stdin.write(f"{self._order}\n")
        self._launcher.stdin.flush()
        self._pid = int(self._answer())

    def kill(self) -> None:
        """kill -9. Raises AssertionError where the process had ended by itself."""
        if self.running:
            os.kill(self._pid, signal.SIGKILL)  # the launcher reaps it, and nobody else
            self._pid = 0
            ended = self._answer()
            assert ended == "SIGKILL", f"the daemons had ended by themselves ({ended}):\n{self.log.read_text()[-3000:]}"

    def close(self) -> None:
        """End the launcher, and with it what runs."""
        self._launcher.kill()
        self._launcher.communicate()

    def _answer(self) -> str:
        assert self._launcher.stdout is not None
        return self._launcher.stdout.readline().strip()


class Machine(Daemon):
    """One daemon's part of Machines: where it writes its address."""

    def __init__(self, name: str, directory: Path, machines: Machines) -> None:
        super().__init__(name, [], directory, machines.log)
        self._machines = machines

    @property
    def running(self) -> bool:
        return self._machines.running

    def kill(self) -> None:
        """With all others."""
        self._machines.kill()


class PowerCluster(Cluster):
    """All its data lie on a PowerDisk. unsynced_journal: with that defect."""

    def __init__(self, directory: Path, *, snapshotds: int = 0, unsynced_journal: bool = False) -> None:
        self.disk = PowerDisk(directory / "disk", directory / "power")
        environment = Steering(directory / "steering", _SYNCS).environment | self.disk.environment
        options = [f"--journal-file-bytes={_JOURNAL_FILE_BYTES}", *(["--unsynced-journal"] * unsynced_journal)]
        self._machines = Machines(directory, environment, options)
        self._settings: dict[Path, tuple[str, Any]] = {}
        super().__init__(self.disk.root, zones=_ZONES, snapshotds=snapshotds, node_settings=_NODE)

    def cut(self, chance: random.Random, loss: Loss) -> CutReport:
        """Take the power of all, if it still runs, and lay out what the disks kept; `restart` comes after it."""
        self.kill_all()
        return self.disk.cut(chance, loss)

    def kill_all(self) -> None:
        self._machines.kill()

    def restart(self) -> None:
        if self._channel is not None:
            self._channel.close()  # of the control before: its end may not have been noticed here yet
            self._channel = None
        self.start(*self.daemons)

    def start(self, *daemons: Daemon) -> None:
        """Start these and control, together, after a kill of what runs."""
        if not daemons:
            return
        self._machines.kill()
        some = list(dict.fromkeys((self.control, *daemons)))
        for file in (file for each in some for file in each.directory.glob("*address")):
            file.unlink()
        self._machines.start([self._settings[each.directory] for each in some])
        for daemon in some:
            daemon.read_address()

    def _command(self, noun: str, settings: Any) -> list[str | Path]:  # type: ignore[override]
        if isinstance(settings, ControlSettings):
            self._settings[settings.state] = (noun, settings)
        return super()._command(noun, settings)

    def _daemon(self, noun: str, settings: Any, directory: Path, name: str = "") -> Daemon:
        self._settings[directory] = (noun, settings)
        return Machine(name or noun, directory, self._machines)

    def _end(self) -> None:
        super()._end()
        self._machines.close()


class PowerPlay:
    """Rounds of writes, a cut in the midst of them, and a check of all that was acknowledged."""

    def __init__(self, cluster: PowerCluster, seed: int, losses: tuple[Loss, ...] = _LOSSES) -> None:
        self._cluster = cluster
        self._chance = random.Random(seed)
        self._losses = losses
        self._play = Play(cluster)
        self.rounds = 0
        self.lost = Counter[str]()

    def round(self) -> None:
        """One cut. Raises Wrong where something acknowledged is gone."""
        self.rounds += 1
        if self.rounds % _DRAIN_EVERY == 0:
            self._drain(self.rounds // _DRAIN_EVERY % len(_DRAINED))
        begun = self._snapshots() if self._cluster.snapshotds else None
        self._write_until_cut(begun)
        loss = self._chance.choice(self._losses)
        report = self._cluster.cut(self._chance, loss)
        self.lost.update({f"cuts that lost {loss.value}": 1, "writes lost": report.writes_lost})
        self.lost.update({"writes torn": report.writes_torn, "names lost": report.names_lost})
        self._cluster.restart()
        self.lost["cuts while replicas moved"] += self._moving()
        for volume in self._play.volumes:
            self._check(volume)
        if begun:
            self.lost[f"snapshots {'sealed' if self._play.finish(begun) else 'given up'} across a cut"] += 1

    def _write_until_cut(self, begun: Begun | None) -> None:
        """begun: a snapshot to be asked for when the writes begin; the cut is then soon after that."""
        play, chance = self._play, self._chance
        blocks = chance.sample(range(BLOCKS), chance.choice(_WRITES))
        changes = {block: chance.randrange(CONTENTS) for block in blocks}
        volume, at, after_s = chance.choice(play.volumes), chance.randrange(1, len(blocks) // 2), chance.random()
        if begun is None:
            play.write(volume, changes, self._cluster.kill_all, at)
            return

        def cut() -> None:
            time.sleep(after_s * _WITHIN_S)  # the instant of a cut is anybody's guess
            self._cluster.kill_all()

        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(play.ask, begun)
            play.write(volume, changes, cut)
            asked.result()

    def end(self) -> None:
        """Every snapshot is whole and as it was; with all deleted, nothing is left in the object store."""
        if self._cluster.snapshotds:
            segments = self._cluster.volume(self._play.volumes[0].id).segments
            self.lost["changes of members"] = sum(each.configuration.number // 2 for each in segments)
            self._play.check_all()
            self._play.end()

    def _check(self, volume: Volume) -> None:
        def served_or_lost() -> control_pb2.VolumeHealth | None:
            health = self._cluster.health(volume.id)
            lost = health.volume.state == control_pb2.VOLUME_STATE_ERROR
            return health if lost or health.serving == "serving" else None

        health = wait_for(f"{volume.id} to be served", served_or_lost)
        if health.serving != "serving":
            raise Wrong(f"{volume.id} is in error: {health.volume.reason}")
        self._play.check(volume)

    def _snapshots(self) -> Begun | None:
        """Delete the oldest and take one more, in some rounds; the one that is to be asked for beside the writes."""
        turn, play = self.rounds % _SNAPSHOT_TURNS, self._play
        if turn not in (_SEALED_BEFORE, _SEALED_BESIDE):
            return None
        while len(play.snapshots) >= _KEPT_SNAPSHOTS:
            oldest = sorted(play.snapshots)[0]
            play.completed(oldest)
            play.delete(oldest)
        if turn == _SEALED_BESIDE:
            return play.begin(play.volumes[0])
        play.snapshot(play.volumes[0])
        if self.rounds % _RESTORE_EVERY == 0:
            play.restore(self._chance.choice(sorted(play.snapshots)))
        return None

    def _drain(self, turn: int) -> None:
        """Of the nodes that share a zone, one; the other one takes replicas again."""
        nodes = {each.address: each.id for each in self._cluster.status().nodes}
        for number, index in sorted(enumerate(_DRAINED), key=lambda each: each[0] == turn):  # there must be three left
            node = nodes[self._cluster.nodes[index].read_address()]
            self._cluster.call("DrainNode", control_pb2.DrainNodeRequest(node=node, undo=number != turn))

    def _moving(self) -> bool:
        """Whether a replica of the user's volume is being replaced, as its record says."""
        segments = self._cluster.volume(self._play.volumes[0].id).segments
        return any(each.configuration.old_members or each.configuration.HasField("replacement") for each in segments)


def cut_again_and_again(
    directory: Path, cuts: int, seed: int, *, said: Callable[[str], None] = print, said_every: int = 50
) -> Counter[str]:
    """What was lost without having been acknowledged, by kind. Raises Wrong where it was acknowledged."""
    with PowerCluster(directory, snapshotds=1) as cluster:
        play = PowerPlay(cluster, seed)
        for _ in range(cuts):
            try:
                play.round()
            except BaseException:
                said(f"cut {play.rounds} failed; again with: python -m tests.faults --power-cuts {cuts} --seed {seed}")
                raise
            if play.rounds % said_every == 0:
                said(f"{play.rounds} of {cuts} cuts: {dict(play.lost)}")
        play.end()
        return play.lost
