"""The daemons of a simulated cluster, and what a test may ask of control."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, Final
from unittest.mock import patch

import grpc

import blockstore.control.daemon
import blockstore.node.daemon
import blockstore.node.node
import nbd_server.daemon
import snapshotd.daemon
from blockstore.config import ControlSettings, FrontEndSettings, NodeSettings, SnapshotdSettings
from blockstore.grpc_parts import whole
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import control_pb2_grpc, snapshot_pb2_grpc
from blockstore.units import MIB
from tests.cluster_simulation.journal import SimulatedJournalWriter
from tests.cluster_simulation.loop import SimulationLoop
from tests.cluster_simulation.machine import Clocks
from tests.cluster_simulation.processes import Process
from tests.cluster_simulation.rpc import Network

_CONTROL: Final = "127.0.0.1:7000"
_CALL_S: Final = 10.0
_POLL_S: Final = 0.2

Work = Callable[[], Coroutine[Any, Any, Any]]


class SimulatedCluster:
    """nodes, front-ends: how many. directory: for all their files."""

    def __init__(self, directory: Path, loop: SimulationLoop, network: Network, clocks: Clocks, nodes: int) -> None:
        self.network, self.clocks, self.loop = network, clocks, loop
        self.processes: dict[str, Process] = {}
        self.ended: list[str] = []
        """Daemons that ended by themselves, and how."""
        self._directory = directory
        self._work: dict[str, Callable[[Path], Work]] = {"control": self._control}
        self._work |= {f"node-{index}": self._node(f"zone-{index % 3}") for index in range(nodes)}
        self._work |= {f"front-end-{index}": self._front_end for index in range(2)}
        self._work["snapshotd-0"] = self._snapshotd
        self._lives = dict.fromkeys(self._work, 0)
        channel: Any = network.channel(_CONTROL)
        self.control: Any = control_pb2_grpc.ControlStub(channel)
        self.snapshots: Any = snapshot_pb2_grpc.SnapshotsStub(channel)

    @property
    def names(self) -> list[str]:
        return list(self._work)

    def is_up(self, name: str) -> bool:
        return name in self.processes and self.processes[name].alive

    # ---- lives

    def start(self, name: str) -> None:
        """Start a daemon with the files of its last life."""
        directory = self._place(name)
        directory.mkdir(parents=True, exist_ok=True)
        process = self.processes[name] = Process(name, directory)
        process.on_death.append(lambda: self.network.died(process))
        process.start(self._work[name](directory))
        assert process.main is not None
        process.main.add_done_callback(lambda task: self._note_end(process, task))

    def kill(self, name: str) -> None:
        """As by kill -9."""
        process = self.processes[name]
        self._lives[name] += 1
        process.kill(self._place(name))
        shutil.rmtree(process.directory, ignore_errors=True)

    async def stop(self) -> None:
        """All of them at once; their files are not looked at any more."""
        for process in self.processes.values():
            if process.alive:
                process.alive = False
                for task in list(process.tasks):
                    task.cancel()
        await asyncio.sleep(1.0)

    def _place(self, name: str) -> Path:
        return self._directory / f"{name}.{self._lives[name]}"

    def _note_end(self, process: Process, task: "asyncio.Task[Any]") -> None:
        if process.alive:
            process.alive = False
            self.network.died(process)
            how = "cancelled" if task.cancelled() else repr(task.exception() or task.result())
            self.ended.append(f"{process.name}: {how}")

    # ---- daemons

    def _control(self, directory: Path) -> Work:
        settings = ControlSettings(state=directory, listen=_CONTROL, map_size_bytes=64 * MIB, replace_after_s=8.0)
        return lambda: blockstore.control.daemon.run(settings)

    def _node(self, zone: str) -> Callable[[Path], Work]:
        def work(directory: Path) -> Work:
            settings = NodeSettings(
                data=directory, zone=zone, control=_CONTROL, reserve_bytes=0, checkpoint_bytes=MIB, checkpoint_s=1.0,
                upkeep_s=5.0, scrub_every_s=120.0,
            )  # fmt: skip
            return lambda: blockstore.node.daemon.run(settings)

        return work

    def _front_end(self, directory: Path) -> Work:
        settings = FrontEndSettings(state=directory, nbd_listen="127.0.0.1:0", control=_CONTROL)
        return lambda: nbd_server.daemon.run(settings)

    def _snapshotd(self, directory: Path) -> Work:
        # The keyring is no state of the daemon: whoever loses it loses the snapshots.
        settings = SnapshotdSettings(
            state=directory,
            control=_CONTROL,
            store=f"file://{self._directory}/store",
            keyring_file=self._directory / "keyring.json",
        )
        return lambda: snapshotd.daemon.run(settings)

    # ---- control

    async def call(self, method: str, request: Any, limit_s: float = 120.0) -> Any:
        """What control answers, once it does; asked again while it is away. For what may be asked twice."""
        give_up = self.loop.time() + limit_s
        stub = self.control if hasattr(self.control, method) else self.snapshots
        while True:
            try:
                answer = getattr(stub, method)(request, timeout=_CALL_S)
                return await (whole(answer) if hasattr(answer, "__aiter__") else answer)
            except grpc.aio.AioRpcError as error:
                away = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
                if not away or self.loop.time() > give_up:
                    raise
            await asyncio.sleep(_POLL_S)

    async def until(
        self, what: str, condition: Callable[[], Coroutine[Any, Any, bool]], limit_s: float = 120.0
    ) -> None:
        """Raises AssertionError where it does not come true in time."""
        give_up = self.loop.time() + limit_s
        while not await condition():
            assert self.loop.time() < give_up, f"not within {limit_s} s: {what}; ended by themselves: {self.ended}"
            await asyncio.sleep(_POLL_S)

    async def status(self) -> pb.StatusResponse:
        found: pb.StatusResponse = await self.call("Status", pb.StatusRequest())
        return found

    async def all_up(self) -> bool:
        status = await self.status()
        nodes = sum(name.startswith("node") for name in self.names)
        return sum(each.up for each in status.nodes) == nodes and sum(each.up for each in status.front_ends) == 2

    async def create(self, size_bytes: int = 0, snapshot: str = "") -> str:
        """The id of a new volume, once it is available."""
        token = f"token-{self.loop.random.getrandbits(64):x}"
        request = pb.CreateVolumeRequest(size_bytes=size_bytes, snapshot=snapshot, client_token=token)
        volume = str((await self.call("CreateVolume", request)).id)

        async def available() -> bool:
            found = await self.call("GetVolume", pb.GetVolumeRequest(volume=volume))
            return bool(found.state == pb.VOLUME_STATE_AVAILABLE)

        await self.until(f"{volume} is available", available)
        return volume

    async def uri(self, volume: str) -> str:
        """Where it is served; it is attached where that is nowhere, or to a front-end that is down."""
        health = await self.call("GetVolumeHealth", pb.GetVolumeRequest(volume=volume))
        if health.serving != "serving":
            up = [each.id for each in (await self.status()).front_ends if each.up]
            if up:
                request = pb.AttachVolumeRequest(volume=volume, front_end=self.loop.random.choice(up), force=True)
                with suppress(grpc.aio.AioRpcError):
                    await self.call("AttachVolume", request, 0)
            return ""
        found = await self.call("GetVolume", pb.GetVolumeRequest(volume=volume))
        return str(found.attachment.uris[0]) if found.attachment.uris else ""


@asynccontextmanager
async def simulated_cluster(
    directory: Path, loop: SimulationLoop, clocks: Clocks, nodes: int = 4
) -> AsyncIterator[SimulatedCluster]:
    """One whose daemons are all up."""
    network = Network(loop)
    SimulatedJournalWriter.random = Random(loop.random.getrandbits(64))
    SimulatedJournalWriter.sync_s.clear()
    with (
        patch.object(grpc.aio, "server", network.server),
        patch.object(grpc.aio, "insecure_channel", network.channel),
        patch.object(blockstore.node.node, "JournalWriter", SimulatedJournalWriter),
    ):
        cluster = SimulatedCluster(directory, loop, network, clocks, nodes)
        try:
            for name in cluster.names:
                cluster.start(name)
            await cluster.until("all daemons are up", cluster.all_up)
            yield cluster
        finally:
            await cluster.stop()
