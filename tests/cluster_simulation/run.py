"""One simulation: a cluster under load and faults; then it heals, and everything is looked at."""

import asyncio
import gc
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

import structlog

from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import snapshot_pb2
from blockstore.units import BLOCK_SIZE
from tests.cluster_simulation.client import Client, VolumeModel
from tests.cluster_simulation.cluster import SimulatedCluster, simulated_cluster
from tests.cluster_simulation.faults import KINDS, Faults
from tests.cluster_simulation.loop import SimulationLoop
from tests.cluster_simulation.machine import simulated_machine

_BLOCKS: Final = 512
_CLIENTS: Final = 3
_VOLUMES: Final = 2
#: Within which a cluster without faults is healthy again.
_HEALED_S: Final = 180.0
_SHIPPED_S: Final = 300.0


@dataclass(slots=True)
class Report:
    """What happened in one simulation."""

    seed: int
    virtual_s: float = 0.0
    operations: int = 0
    snapshots: int = 0
    longest_s: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Part:
    """One volume's snapshot: its writes that were acknowledged before, and begun before it was sealed."""

    id: str
    volume: str
    low: list[int]
    high: list[int]


def log_of(seed: int) -> Path:
    """Where the log of a simulation that failed is."""
    return Path(tempfile.gettempdir(), f"simulation-{seed}.log")


def simulate(seed: int, lasts_s: float = 40.0, kinds: Mapping[str, int] = KINDS) -> Report:
    """kinds: of faults. Raises AssertionError, or what a daemon raised, where something is not as it must be."""
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
        with simulated_machine(loop, seed) as clocks, asyncio.Runner(loop_factory=lambda: loop) as runner:

            def told(_: object, context: dict[str, object]) -> None:
                log.append(f"{loop.time():9.3f} asyncio  {context}")

            loop.set_exception_handler(told)

            async def run() -> Report:
                async with simulated_cluster(directory, loop, clocks) as cluster:
                    return await _scenario(cluster, seed, lasts_s, kinds)

            return runner.run(run())
    except BaseException:
        log_of(seed).write_text("\n".join(log))
        raise
    finally:
        structlog.reset_defaults()
        gc.enable()
        gc.collect()
        shutil.rmtree(directory, ignore_errors=True)


async def _scenario(cluster: SimulatedCluster, seed: int, lasts_s: float, kinds: Mapping[str, int]) -> Report:
    volumes = {await cluster.create(_BLOCKS * BLOCK_SIZE): VolumeModel(_BLOCKS) for _ in range(_VOLUMES)}
    share = _BLOCKS // _CLIENTS
    clients = [
        Client(cluster, volume, model, index * share, (index + 1) * share)
        for volume, model in volumes.items()
        for index in range(_CLIENTS)
    ]
    faults, taken = Faults(cluster, kinds), list[list[_Part]]()
    running = [asyncio.create_task(client.run()) for client in clients]
    breaking = asyncio.create_task(faults.run())
    snapping = asyncio.create_task(_take_snapshots(cluster, volumes, taken))
    await asyncio.wait([*running, breaking, snapping], timeout=lasts_s, return_when=asyncio.FIRST_COMPLETED)
    for task in (breaking, snapping):
        task.cancel()
    ended = await asyncio.gather(breaking, snapping, return_exceptions=True)
    _heal(cluster)
    for client in clients:
        client.stopping = True
    await asyncio.gather(*running)
    for each in ended:
        if isinstance(each, Exception):
            raise each
    await _check_healed(cluster)
    await _check_volumes(cluster, volumes)
    restored = [await _check_snapshots(cluster, parts, volumes) for parts in taken]
    return Report(
        seed,
        cluster.loop.time(),
        sum(model.operations for model in volumes.values()),
        sum(restored),
        max(client.longest_s for client in clients),
        dict(faults.count),
    )


def _heal(cluster: SimulatedCluster) -> None:
    cluster.network.mend()
    cluster.network.latency_s = 0.0002, 0.002
    for name in cluster.names:
        if not cluster.is_up(name):
            cluster.start(name)


async def _take_snapshots(cluster: SimulatedCluster, volumes: dict[str, VolumeModel], taken: list[list[_Part]]) -> None:
    """Of one volume or of both at one instant."""
    random = Random(cluster.loop.random.getrandbits(64))
    while True:
        await asyncio.sleep(random.uniform(1.0, 8.0))
        chosen = list(volumes) if random.random() < 0.5 else [random.choice(list(volumes))]
        lows = [volumes[volume].mark() for volume in chosen]
        token = f"snapshot-{random.getrandbits(64):x}"
        request = snapshot_pb2.CreateSnapshotRequest(volumes=chosen, client_token=token)
        made = (await cluster.call("CreateSnapshot", request)).snapshots
        parts = [_Part(each.id, volume, low, []) for each, volume, low in zip(made, chosen, lows, strict=True)]
        taken.append(parts)
        # It returns while they are pending: their content is fixed a little later.
        for part in parts:
            await _wait_sealed(cluster, part)
            part.high = volumes[part.volume].begun()


async def _wait_sealed(cluster: SimulatedCluster, part: _Part) -> None:
    async def sealed() -> bool:
        found = await cluster.call("GetSnapshot", snapshot_pb2.GetSnapshotRequest(snapshot=part.id))
        return bool(found.sealed_at_ms) or found.state != snapshot_pb2.SNAPSHOT_STATE_PENDING

    await cluster.until(f"{part.id} is sealed, or failed", sealed)


async def _check_healed(cluster: SimulatedCluster) -> None:
    async def healthy() -> bool:
        status = await cluster.status()
        return bool(status.healthy) and await cluster.all_up()

    try:
        await cluster.until("the cluster is healthy again", healthy, _HEALED_S)
    except AssertionError as error:
        raise AssertionError(f"{error}: {(await cluster.status()).problems}, ended: {cluster.ended}") from error


async def _check_volumes(cluster: SimulatedCluster, volumes: dict[str, VolumeModel]) -> None:
    for volume, model in volumes.items():
        reader = Client(cluster, volume, model, 0, _BLOCKS)
        for number, value in enumerate(await reader.read_all()):
            model.blocks[number].saw(value, f"block {number} of {volume} at the end")
        await reader.close()


async def _check_snapshots(cluster: SimulatedCluster, parts: list[_Part], volumes: dict[str, VolumeModel]) -> int:
    """How many were completed. What these hold is looked at in volumes made from them; it is of one moment."""
    moments = []
    for part in parts:
        if await _completed(cluster, part):
            model, content = volumes[part.volume], await _restored(cluster, part)
            high = part.high or model.begun()
            moments.append(model.moment(content, part.low, high, f"{part.id} of {part.volume}"))
    not_before = max((moment[0] for moment in moments), default=0.0)
    not_after = min((moment[1] for moment in moments), default=0.0)
    assert not_before <= not_after, f"{parts[0].id} and {parts[-1].id} are of two moments: {moments}"
    return len(moments)


async def _completed(cluster: SimulatedCluster, part: _Part) -> bool:
    """Whether it is whole in the object store, once that is decided; it fails only where it was not sealed."""
    final = {snapshot_pb2.SNAPSHOT_STATE_COMPLETED, snapshot_pb2.SNAPSHOT_STATE_ERROR}
    request = snapshot_pb2.GetSnapshotRequest(snapshot=part.id)

    async def decided() -> bool:
        return (await cluster.call("GetSnapshot", request)).state in final

    await cluster.until(f"{part.id} is shipped", decided, _SHIPPED_S)
    found = await cluster.call("GetSnapshot", request)
    failed = found.state == snapshot_pb2.SNAPSHOT_STATE_ERROR
    assert not (failed and found.sealed_at_ms), f"{part.id} was sealed, and failed: {found.reason}"
    return not failed


async def _restored(cluster: SimulatedCluster, part: _Part) -> list[int]:
    """The value of each block of a volume that is made from it, while that hydrates."""
    volume = await cluster.create(snapshot=part.id)
    reader = Client(cluster, volume, VolumeModel(_BLOCKS), 0, _BLOCKS)
    content = await reader.read_all()
    await reader.close()
    await cluster.call("DetachVolume", pb.DetachVolumeRequest(volume=volume, force=True))
    await cluster.call("DeleteVolume", pb.DeleteVolumeRequest(volume=volume))
    return content
