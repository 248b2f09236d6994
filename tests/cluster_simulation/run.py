"""One simulation: a cluster under load and faults; then it heals, and everything is looked at."""

import asyncio
import gc
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final, TypeVar

import structlog

from tests.cluster_simulation.checks import (
    check_healed,
    check_nothing_left,
    check_replicas,
    check_snapshots,
    scrub_all,
)
from tests.cluster_simulation.cluster import SimulatedCluster, simulated_cluster
from tests.cluster_simulation.faults import KINDS, Faults
from tests.cluster_simulation.guests import Guests
from tests.cluster_simulation.in_turn import InTurn
from tests.cluster_simulation.loop import SimulationLoop
from tests.cluster_simulation.machine import simulated_machine
from tests.cluster_simulation.users import Users, create

_VOLUMES: Final = 2

Ending = TypeVar("Ending")


@dataclass(slots=True)
class Report:
    """What happened in one simulation."""

    seed: int
    virtual_s: float = 0.0
    operations: int = 0
    snapshots: int = 0
    longest_s: float = 0.0
    lost_writes: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)


def log_of(seed: int) -> Path:
    """Where the log of a simulation that failed is."""
    return Path(tempfile.gettempdir(), f"simulation-{seed}.log")


def simulate(
    seed: int,
    lasts_s: float = 40.0,
    kinds: Mapping[str, int] = KINDS,
    controls: int | None = None,
    *,
    with_users: bool = True,
) -> Report:
    """kinds: of faults. controls: how many; else one with the embedded metastore, or three on etcd, by the seed.

    with_users: else nothing but reads and writes goes on beside the faults.

    Raises AssertionError, or what a daemon raised, where something is not as it must be.
    """
    return in_simulation(seed, lambda cluster: _scenario(cluster, seed, lasts_s, kinds, with_users), controls)


def in_simulation(
    seed: int, scenario: Callable[[SimulatedCluster], Awaitable[Ending]], controls: int | None = None
) -> Ending:
    """What the scenario returns; it has a cluster that is up. Raises what it raises, with the log in log_of(seed)."""
    loop = SimulationLoop(Random(seed))
    parent = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    directory = Path(tempfile.mkdtemp(prefix="simulation-", dir=parent))
    log: list[str] = []

    def note(logger: object, method: str, event: structlog.typing.EventDict) -> str:
        log.append(f"{loop.time():9.3f} {method:8} {event}")
        raise structlog.DropEvent

    gc.collect()
    gc.disable()  # whom it finds, and when, is no matter of the seed
    structlog.configure(processors=[note], cache_logger_on_first_use=False)
    try:
        with simulated_machine(loop, seed) as machines, asyncio.Runner(loop_factory=lambda: loop) as runner:

            def told(_: object, context: dict[str, object]) -> None:
                log.append(f"{loop.time():9.3f} asyncio  {context}")

            loop.set_exception_handler(told)

            async def run() -> Ending:
                number = controls or (3 if seed % 2 else 1)
                async with simulated_cluster(directory, loop, machines, controls=number) as cluster:
                    return await scenario(cluster)

            return runner.run(run())
    except BaseException:
        log_of(seed).write_text("\n".join(log))
        raise
    finally:
        structlog.reset_defaults()
        gc.enable()
        gc.collect()
        shutil.rmtree(directory, ignore_errors=True)


async def _scenario(
    cluster: SimulatedCluster, seed: int, lasts_s: float, kinds: Mapping[str, int], with_users: bool
) -> Report:
    guests, random = Guests(cluster), Random(cluster.loop.random.getrandbits(64))
    for _ in range(_VOLUMES):
        await create(cluster, guests, random)
    faults, users = Faults(cluster, guests, kinds), Users(cluster, guests)
    works = [faults.run(), InTurn(cluster, guests).run(), *([users.run()] if with_users else [])]
    await _for_a_while(lasts_s, guests, works)
    faults.heal()
    await users.end()
    await guests.rest(guests.guests)
    await check_healed(cluster)
    for guest in guests.guests:
        await guests.check(guest)
    await check_snapshots(guests)
    for guest in guests.guests:
        guest.model.check()
    if faults.count["rot"]:
        await scrub_all(cluster)
    await check_replicas(cluster, faults.rotten_journals)
    await check_nothing_left(cluster)
    return Report(
        seed,
        cluster.loop.time(),
        guests.operations,
        guests.restored,
        guests.longest_s,
        faults.lost_writes,
        dict(faults.count),
        dict(users.count),
    )


async def _for_a_while(lasts_s: float, guests: Guests, works: list[Coroutine[Any, Any, None]]) -> None:
    """Raises what one of these works, or a client, found."""
    at_work = [asyncio.create_task(work) for work in works]
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + lasts_s
    while loop.time() < ends_at and not any(task.done() for task in at_work):
        await asyncio.wait([*at_work, *guests.running], timeout=1.0, return_when=asyncio.FIRST_EXCEPTION)
        for task in guests.running:
            if task.done():
                task.result()
    for task in at_work:
        task.cancel()
    ended = await asyncio.gather(*at_work, return_exceptions=True)
    for each in ended:
        if isinstance(each, Exception):
            raise each
