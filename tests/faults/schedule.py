"""A schedule of faults under load: each kind in turn, in an order and at places that a seed gives.

Three witnesses write to one volume, each to its own part: fio, which verifies each block; the clients of
tests/crash/workload.py, with requests of all sizes, trims and zeroes, and a model of what was acknowledged; and the
clients of registers.py, whose history is checked for linearizability. After each fault the cluster must be healthy
again, as `cairn status` says, within a limit.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from blockstore.units import MIB
from tests.crash.fio import FioLoop
from tests.crash.model import SECTOR_SIZE
from tests.crash.offline import assert_replicas_agree
from tests.crash.workload import NO_SPACE, Workload
from tests.daemons import wait_for
from tests.faults.fault_cluster import FaultCluster
from tests.faults.kinds import KINDS
from tests.faults.registers import History, RegisterLoad

VOLUME_BYTES: Final = 64 * MIB
_REGISTERS: Final = 32
_MODEL_SECTORS: Final = range(8 * MIB // SECTOR_SIZE, 24 * MIB // SECTOR_SIZE)
_FIO_OFFSET: Final = 32 * MIB
_FIO_BYTES: Final = 4 * MIB
#: How long a fault lasts.
_LEAST_S, _MOST_S = 1.0, 4.0
#: Answered requests before the next fault.
_PROGRESS: Final = 100
#: From the end of a fault until all is well: a delta, a lease, a reconnection that backed off.
_HEALTHY_LIMIT_S: Final = 60.0
#: A front-end that was fenced, or could not wait any longer for a quorum, says so.
_TOLERATED: Final = NO_SPACE | {5, 108}


@dataclass
class Measured:
    """Of one kind of fault. Times in seconds, the worst of all."""

    count: int = 0
    longest_gap_s: float = 0.0
    slowest_s: float = 0.0
    healthy_after_s: float = 0.0


@dataclass
class Report:
    """What a schedule did and saw."""

    kinds: dict[str, Measured] = field(default_factory=dict)
    registers_checked: int = 0
    unknown: int = 0
    requests: int = 0
    fio_rounds: int = 0
    fio_interrupted: int = 0
    errors: Counter[int] = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        yield f"{'fault':<28}{'times':>6}{'no answer, s':>14}{'slowest, s':>12}{'healthy after, s':>18}"
        for kind, each in self.kinds.items():
            yield (
                f"{kind:<28}{each.count:>6}{each.longest_gap_s:>14.2f}{each.slowest_s:>12.2f}"
                f"{each.healthy_after_s:>18.1f}"
            )
        yield (
            f"{self.registers_checked} requests linearizable ({self.unknown} writes of unknown outcome), "
            f"{self.requests} judged by the model, {self.fio_rounds} rounds of fio "
            f"({self.fio_interrupted} cut short); errors {dict(self.errors)}"
        )


def run_schedule(
    directory: Path, seed: int, duration_s: float, said: Callable[[str], None], kinds: list[str] | None = None
) -> Report:
    """Faults until the time is over, and each kind at least once. Raises what a witness found, and TimeoutError."""
    chance = random.Random(seed)
    report = Report()
    end = time.monotonic() + duration_s
    with FaultCluster(directory) as cluster:
        schedule = Schedule(cluster, chance, report, said)
        with schedule:
            for kind in _in_turn(kinds or list(KINDS), chance):
                if time.monotonic() > end and len(report.kinds) == len(kinds or KINDS):
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
        self, cluster: FaultCluster, chance: random.Random, report: Report, said: Callable[[str], None]
    ) -> None:
        self._cluster = cluster
        self._chance = chance
        self._report = report
        self._said = said
        self.volume = cluster.create(VOLUME_BYTES)
        cluster.attach(self.volume)
        self._history = History(0, _REGISTERS)
        self._model = Workload(
            self._uri_now, _MODEL_SECTORS, clients=2, seed=chance.getrandbits(32), tolerated=_TOLERATED
        )
        self._fio = FioLoop(self._uri_now, cluster.directory, offset=_FIO_OFFSET, size=_FIO_BYTES, interruptible=True)
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
        duration_s = self._chance.uniform(_LEAST_S, _MOST_S)
        measured = self._report.kinds.setdefault(kind, Measured())
        with RegisterLoad(self._history, self._uri_now, seed=seed) as load:
            load.wait_progress(_PROGRESS)
            service = load.watch()
            with KINDS[kind](self._cluster, random.Random(seed)) as who:
                self._said(f"{kind}: {who}, for {duration_s:.1f} s")
                time.sleep(duration_s)  # the fault lasts so long
            healed = time.monotonic()
            self._wait_healthy(f"{kind} of {who}")
            measured.healthy_after_s = max(measured.healthy_after_s, time.monotonic() - healed)
            load.wait_progress(_PROGRESS)
        measured.count += 1
        measured.longest_gap_s = max(measured.longest_gap_s, service.longest_gap_s)
        measured.slowest_s = max(measured.slowest_s, service.slowest_s)
        self._report.errors.update(load.errors)
        self._history.check(self._cluster.uri(self.volume))
        self._report.registers_checked = self._history.checked
        self._report.unknown = self._history.unknown

    def end(self) -> None:
        """The last judgement, once the witnesses have ended, and a comparison of what the nodes hold."""
        self._model.verify(self._cluster.uri(self.volume))
        self._report.requests = self._model.acknowledged
        self._report.fio_rounds, self._report.fio_interrupted = self._fio.rounds, self._fio.interrupted
        assert_replicas_agree(self._cluster, self.volume)

    def _uri_now(self) -> str:
        return self._cluster.uri_now(self.volume, self._cluster.serving)

    def _wait_healthy(self, after: str) -> None:
        """Also of what heartbeats tell only after a while."""
        try:
            self._cluster.wait_whole(self.volume, _HEALTHY_LIMIT_S)
            wait_for(f"all to be well after {after}", lambda: self._cluster.status().healthy, _HEALTHY_LIMIT_S)
        except TimeoutError as error:
            problems = "; ".join(f"{each.subject}: {each.message}" for each in self._cluster.status().problems)
            raise TimeoutError(f"{error}: {problems}") from error
