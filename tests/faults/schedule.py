"""A schedule of faults under load: each kind in turn, in an order and at places that a seed gives.

The cluster has more nodes than copies, a volume of several segments, and several controls on an etcd of three members.
Three witnesses write to the volume, each to its own part: fio, which verifies each block; the clients of
tests/crash/workload.py, with requests of all sizes, trims and zeroes, and a model of what was acknowledged; and the
clients of registers.py, whose history is checked for linearizability. After each fault the cluster must be healthy
again, as `cairn status` says, within a limit.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from blockstore.units import BLOCK_SIZE, MIB
from tests.crash.fio import FioLoop
from tests.crash.model import SECTOR_SIZE
from tests.crash.offline import assert_replicas_agree
from tests.crash.workload import NO_SPACE, Workload
from tests.daemons import wait_for
from tests.faults.fault_cluster import FaultCluster
from tests.faults.kinds import KINDS, OF_ETCD
from tests.faults.registers import History, RegisterLoad
from tests.faults.report import Measured, Report

VOLUME_BYTES: Final = 64 * MIB
#: Four of them, each on three of the four nodes; every witness works across a boundary.
SEGMENT_BYTES: Final = 16 * MIB
_SPARE_BYTES: Final = 4 * MIB
_NODES: Final = 4
_CONTROLS: Final = 2
_REGISTERS: Final = 32
_FIRST_REGISTER: Final = 2 * SEGMENT_BYTES // BLOCK_SIZE - _REGISTERS // 2
_MODEL_SECTORS: Final = range(8 * MIB // SECTOR_SIZE, 24 * MIB // SECTOR_SIZE)
_FIO_MIDDLE: Final = 3 * SEGMENT_BYTES
_FIO_BYTES: Final = 4 * MIB
#: Of clients that think: a quarter of the requests on a quarter of the blocks, so that as many rounds are whole.
_FIO_SHARE: Final = 1 / 4
#: How long a fault lasts, unless it says by itself when it is over.
LASTING_S: Final = (1.0, 4.0)
#: Answered requests before the next fault.
_PROGRESS: Final = 100
#: From the end of a fault until all is well: a delta, a lease, a reconnection that backed off.
_HEALTHY_LIMIT_S: Final = 120.0
#: A front-end that was fenced, or could not wait any longer for a quorum, says so.
_TOLERATED: Final = NO_SPACE | {5, 108}


def run_schedule(
    directory: Path,
    seed: int,
    duration_s: float,
    said: Callable[[str], None],
    kinds: list[str] | None = None,
    *,
    rounds: int = 1,
    lasting_s: tuple[float, float] = LASTING_S,
    embedded: bool = False,
    think_s: float = 0.0,
) -> Report:
    """Faults until the time is over, and each kind at least `rounds` times.

    think_s: between two requests of a client, on average; fio's are as many as two or three such clients'.
    embedded: one control with the embedded metastore, instead of several on etcd; kinds that need these are left out.
    Raises what a witness found, TimeoutError, and ValueError where no kind is left.
    """
    chance = random.Random(seed)
    report = Report()
    end = time.monotonic() + duration_s
    chosen = [each for each in kinds or KINDS if not (embedded and KINDS[each] in OF_ETCD)]
    if not chosen:
        raise ValueError(f"none of {', '.join(kinds or ())} happens to one control with the embedded metastore")
    with FaultCluster(directory, nodes=_NODES, controls=1 if embedded else _CONTROLS) as cluster:
        schedule = Schedule(cluster, chance, report, said, lasting_s, think_s=think_s)
        with schedule:
            for number, kind in enumerate(_in_turn(chosen, chance)):
                if time.monotonic() > end and number >= rounds * len(chosen):
                    break
                schedule.run(kind)
        schedule.end()
    return report


def _in_turn(kinds: list[str], chance: random.Random) -> Iterator[str]:
    while True:
        yield from chance.sample(kinds, len(kinds))


class Schedule:
    """One cluster with one volume, and its witnesses, who work while the `with` block lasts."""

    def __init__(
        self,
        cluster: FaultCluster,
        chance: random.Random,
        report: Report,
        said: Callable[[str], None],
        lasting_s: tuple[float, float],
        *,
        think_s: float,
    ) -> None:
        self._cluster = cluster
        self._chance = chance
        self._report = report
        self._said = said
        self._lasting_s = lasting_s
        self._think_s = think_s
        cluster.spare = cluster.create(_SPARE_BYTES, segment_size_bytes=_SPARE_BYTES // 2)
        cluster.witnessed = cluster.create(VOLUME_BYTES, segment_size_bytes=SEGMENT_BYTES)
        cluster.attach(cluster.witnessed)
        self._history = History(_FIRST_REGISTER, _REGISTERS)
        self._model = Workload(
            self._uri_now,
            _MODEL_SECTORS,
            clients=2,
            seed=chance.getrandbits(32),
            tolerated=_TOLERATED,
            think_s=think_s,
        )
        fio_bytes = int(_FIO_BYTES * _FIO_SHARE) if think_s else _FIO_BYTES
        self._fio = FioLoop(
            self._uri_now,
            cluster.directory,
            offset=_FIO_MIDDLE - fio_bytes // 2,
            size=fio_bytes,
            interruptible=True,
            most_iops=max(1, round(10 * _FIO_SHARE / think_s)) if think_s else 0,
        )
        self._witnesses = ExitStack()

    def __enter__(self) -> Self:
        self._witnesses.enter_context(self._model)
        self._witnesses.enter_context(self._fio)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._witnesses.__exit__(kind, error, trace)

    def run(self, kind: str) -> None:
        """One fault, from one healthy state to the next, and a judgement of what was seen meanwhile."""
        seed = self._chance.getrandbits(32)
        duration_s = self._chance.uniform(*self._lasting_s)
        measured = self._report.kinds.setdefault(kind, Measured())
        with RegisterLoad(self._history, self._uri_now, seed=seed, think_s=self._think_s) as load:
            load.wait_progress(_PROGRESS)
            service = load.watch()
            with KINDS[kind](self._cluster, random.Random(seed)) as who:
                self._said(f"{kind}: {who}, for {duration_s:.1f} s")
                time.sleep(duration_s)  # the fault lasts so long
            healed = time.monotonic()
            self._wait_healthy(f"{kind} of {who}")
            measured.healthy_after_s.append(time.monotonic() - healed)
            load.wait_progress(_PROGRESS)
        measured.gaps_s.append(service.longest_gap_s)
        measured.slowest_s.append(service.slowest_s)
        self._report.errors.update(load.errors)
        self._history.check(self._cluster.uri(self._cluster.witnessed))
        self._report.registers_checked = self._history.checked
        self._report.unknown = self._history.unknown

    def end(self) -> None:
        """The last judgement, once the witnesses have ended, and a comparison of what the nodes hold."""
        self._model.verify(self._cluster.uri(self._cluster.witnessed))
        self._report.requests = self._model.acknowledged
        self._report.fio_rounds, self._report.fio_interrupted = self._fio.rounds, self._fio.interrupted
        assert_replicas_agree(self._cluster, self._cluster.witnessed)

    def _uri_now(self) -> str:
        return self._cluster.uri_now(self._cluster.witnessed, self._cluster.serving)

    def _wait_healthy(self, after: str) -> None:
        """Also of what heartbeats tell only after a while."""
        try:
            self._cluster.wait_whole(self._cluster.witnessed, _HEALTHY_LIMIT_S)
            wait_for(f"all to be well after {after}", self._is_well, _HEALTHY_LIMIT_S)
        except TimeoutError as error:
            problems = "; ".join(f"{each.subject}: {each.message}" for each in self._cluster.status().problems)
            raise TimeoutError(f"{error}: {problems}") from error

    def _is_well(self) -> bool:
        """A replica of the spare volume whose node was away meanwhile lacks records until that is attached."""
        if self._cluster.status().healthy:
            return True
        spare = self._cluster.spare
        if any(each.lag_records for each in self._cluster.health(spare).replicas):
            self._cluster.attach(spare, 1)
            self._cluster.wait_whole(spare)
            self._cluster.detach(spare)
        return False
