"""The daemons of a simulated cluster, how they live and die, and what a test may ask of control."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final
from unittest.mock import patch

import grpc

import blockstore.control.daemon
import blockstore.node.daemon
import blockstore.node.node
import nbd_server.daemon
import nbd_server.front_end
import snapshotd.daemon
from blockstore.config import ControlSettings, FrontEndSettings, NodeSettings, ShortCircuitMode, SnapshotdSettings
from blockstore.grpc_endpoint import control_target
from blockstore.grpc_parts import whole
from blockstore.replication.settings import LeaderSettings
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import control_pb2_grpc, snapshot_pb2, snapshot_pb2_grpc
from blockstore.units import MIB
from tests.cluster_simulation import etcd
from tests.cluster_simulation.disk import SimulatedJournal, lose_power
from tests.cluster_simulation.journal import SimulatedJournalWriter
from tests.cluster_simulation.loop import SimulationLoop
from tests.cluster_simulation.machine import Machines
from tests.cluster_simulation.network import Network, name_of
from tests.cluster_simulation.processes import Process
from tests.cluster_simulation.rpc import channel_to
from tests.cluster_simulation.server import Server

_CALL_S: Final = 10.0
_POLL_S: Final = 0.2
_LONGEST_POLL_S: Final = 3.0
#: How long guests wait for an attachment before they ask for another one.
_PATIENCE_S: Final = 3.0, 8.0
#: Within which the tasks of a process that was killed end.
_ENDS_S: Final = 60.0
_ETCD_MEMBERS: Final = 3
_AWAY: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

Work = Callable[[], Coroutine[Any, Any, Any]]


class SimulatedCluster:
    """nodes, controls: how many; one control has the embedded metastore. directory: for all their files."""

    def __init__(
        self,
        directory: Path,
        loop: SimulationLoop,
        network: Network,
        machines: Machines,
        *,
        nodes: int,
        controls: int,
    ) -> None:
        self.network, self.machines, self.loop = network, machines, loop
        self.processes: dict[str, Process] = {}
        self.ended: list[str] = []
        """Daemons that ended by themselves, and how."""
        self.busy = asyncio.Event()
        """Guests ask for something only while it is set."""
        self.busy.set()
        self.store_directory = directory / "store"
        self.records = etcd.EtcdStore(loop.time) if controls > 1 else None
        self._directory = directory
        self._controls = [f"127.0.0.1:{7000 + index}" for index in range(controls)]
        self._work: dict[str, Callable[[Path], Work]] = {}
        if self.records:
            self._work |= {f"etcd-{index}": self._etcd(index) for index in range(_ETCD_MEMBERS)}
        self._work |= {f"control-{index}": self._control(address) for index, address in enumerate(self._controls)}
        self._work |= {f"node-{index}": self._node(f"zone-{index % 3}") for index in range(nodes)}
        self._work |= {f"front-end-{index}": self._front_end for index in range(2)}
        self._work["snapshotd-0"] = self._snapshotd
        self._lives = dict.fromkeys(self._work, 0)
        self._channels: dict[str, Any] = {}
        self._attached_at: dict[str, float] = {}
        self.control: Any = control_pb2_grpc.ControlStub(self._channel(self._control_addresses))
        self.snapshots: Any = snapshot_pb2_grpc.SnapshotsStub(self._channel(self._control_addresses))

    @property
    def names(self) -> list[str]:
        return list(self._work)

    def of_kind(self, kind: str) -> list[str]:
        """The names of the nodes, the front-ends, the controls..."""
        return [name for name in self._work if name.startswith(kind)]

    def name_at(self, address: str) -> str:
        """Who serves there; empty for nobody."""
        server = self.network.servers.get(address)
        return name_of(server.process) if server else ""

    def is_up(self, name: str) -> bool:
        return name in self.processes and self.processes[name].alive

    # ---- lives

    def start(self, name: str) -> None:
        """Start a daemon with the files of its last life."""
        directory = self.place(name)
        directory.mkdir(parents=True, exist_ok=True)
        process = self.processes[name] = Process(name, directory)
        process.on_death.append(lambda: self.network.died(process))
        process.start(self._work[name](directory))
        assert process.main is not None
        process.main.add_done_callback(lambda task: self._note_end(process, task))

    def start_all(self) -> None:
        for name in self.names:
            if not self.is_up(name):
                self.start(name)

    def kill(self, name: str) -> None:
        """As by kill -9; nothing happens where it is down."""
        self._end(name, None)

    def cut_power(self, name: str, random: Random) -> int:
        """What it had not synced is lost as well: how many writes."""
        return self._end(name, random)

    def _end(self, name: str, power: Random | None) -> int:
        if not self.is_up(name):
            return 0
        process = self.processes[name]
        self._lives[name] += 1
        process.kill(self.place(name), power=power is not None)
        lost = lose_power(process, self.place(name), power) if power else 0
        shutil.rmtree(process.directory, ignore_errors=True)
        return lost

    def place(self, name: str) -> Path:
        """Where its files are, in its present or next life."""
        return self._directory / f"{name}.{self._lives[name]}"

    def scratch(self, name: str) -> Path:
        """A place for a copy."""
        return self._directory / name

    async def stop_cleanly(self, names: list[str]) -> None:
        """As by SIGTERM. Raises AssertionError where one does not end well."""
        for name in names:
            result = await asyncio.wait_for(self.processes[name].stop(), _ENDS_S)
            assert result in (0, None), f"{name} ended with {result}"

    async def stop(self) -> None:
        """All of them at once; their files are not looked at any more."""
        left = set[asyncio.Task[Any]]()
        for process in self.processes.values():
            left |= set(process.tasks)
            if process.alive:
                process.end()
        for channel in self._channels.values():
            await channel.close()
        give_up = self.loop.time() + _ENDS_S
        while left and self.loop.time() < give_up:
            _, left = await asyncio.wait(left, timeout=1.0)
            for task in left:
                task.cancel()

    def _note_end(self, process: Process, task: "asyncio.Task[Any]") -> None:
        if process.alive:
            process.alive = False
            self.network.died(process)
            if not process.stopping:
                how = "cancelled" if task.cancelled() else repr(task.exception() or task.result())
                self.ended.append(f"{process.name} at {self.loop.time():.3f}: {how}")

    # ---- daemons

    @property
    def _control_addresses(self) -> str:
        return ",".join(self._controls)

    def _etcd(self, index: int) -> Callable[[Path], Work]:
        name, address = f"etcd-{index}", f"127.0.0.1:{2300 + index}"

        def work(directory: Path) -> Work:
            assert self.records is not None
            return partial(etcd.serve, self.records, address, lambda: self._has_quorum(name))

        return work

    def _has_quorum(self, name: str) -> bool:
        cut = self.network.is_cut
        others = [each for each in self.of_kind("etcd") if each != name and self.is_up(each)]
        heard = sum(not cut(name, each) and not cut(each, name) for each in others)
        return 2 * (heard + 1) > _ETCD_MEMBERS

    def _control(self, address: str) -> Callable[[Path], Work]:
        members = ",".join(f"127.0.0.1:{2300 + index}" for index in range(_ETCD_MEMBERS))

        def work(directory: Path) -> Work:
            settings = ControlSettings(
                state=directory, listen=address, map_size_bytes=64 * MIB, replace_after_s=8.0, leader_lease_s=3.0,
                metastore=f"etcd://{members}/simulated" if self.records else "",
            )  # fmt: skip
            return lambda: blockstore.control.daemon.run(settings)

        return work

    def _node(self, zone: str) -> Callable[[Path], Work]:
        def work(directory: Path) -> Work:
            settings = NodeSettings(
                data=directory, zone=zone, control=self._control_addresses, reserve_bytes=MIB, checkpoint_bytes=MIB,
                checkpoint_s=1.0, upkeep_s=5.0, scrub_every_s=120.0, streams_port=-1,
            )  # fmt: skip
            return lambda: blockstore.node.daemon.run(settings)

        return work

    def _front_end(self, directory: Path) -> Work:
        # Nodes of this process: LMDB opens an environment once in each.
        settings = FrontEndSettings(
            state=directory,
            nbd_listen="127.0.0.1:0",
            control=self._control_addresses,
            short_circuit=ShortCircuitMode.NEVER,
        )
        return lambda: nbd_server.daemon.run(settings)

    def _snapshotd(self, directory: Path) -> Work:
        # The keyring is no state of the daemon: whoever loses it loses the snapshots.
        settings = SnapshotdSettings(
            state=directory,
            control=self._control_addresses,
            store=f"file://{self.store_directory}",
            keyring_file=self._directory / "keyring.json",
        )
        return lambda: snapshotd.daemon.run(settings)

    # ---- what is asked

    def _channel(self, addresses: str) -> Any:
        if addresses not in self._channels:
            self._channels[addresses] = channel_to(self.network, control_target(addresses)[0])
        return self._channels[addresses]

    async def call(self, method: str, request: Any, limit_s: float = 120.0) -> Any:
        """What control answers, once it does; asked again while it is away. For what may be asked twice."""
        stub = self.control if hasattr(self.control, method) else self.snapshots
        return await self._asked(lambda: getattr(stub, method)(request, timeout=_CALL_S), limit_s)

    async def call_store(self, method: str, request: Any, limit_s: float = 120.0) -> Any:
        """The last answer of a snapshotd, or its first where that is all."""
        found = await self.call("GetStore", snapshot_pb2.GetStoreRequest(), limit_s)
        daemons = [each.address for each in found.daemons if each.up] or ["127.0.0.1:1"]
        stub: Any = snapshot_pb2_grpc.SnapshotStoreStub(self._channel(daemons[0]))
        answers = [each async for each in getattr(stub, method)(request, timeout=_CALL_S * 10)]
        return answers[-1]

    async def _asked(self, ask: Callable[[], Any], limit_s: float) -> Any:
        give_up = self.loop.time() + limit_s
        while True:
            try:
                answer = ask()
                return await (whole(answer) if hasattr(answer, "__aiter__") else answer)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _AWAY or self.loop.time() > give_up:
                    raise
            await asyncio.sleep(_POLL_S)

    async def until(
        self, what: str, condition: Callable[[], Coroutine[Any, Any, bool]], limit_s: float = 120.0
    ) -> None:
        """Raises AssertionError where it does not come true in time. Asked less and less often."""
        give_up, pause_s = self.loop.time() + limit_s, _POLL_S
        while not await condition():
            assert self.loop.time() < give_up, f"not within {limit_s} s: {what}; ended by themselves: {self.ended}"
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_POLL_S)

    async def status(self) -> pb.StatusResponse:
        found: pb.StatusResponse = await self.call("Status", pb.StatusRequest())
        return found

    async def all_up(self) -> bool:
        return self._all_up(await self.status())

    def _all_up(self, status: pb.StatusResponse) -> bool:
        nodes, front_ends = (sum(each.up for each in known) for known in (status.nodes, status.front_ends))
        return nodes == len(self.of_kind("node")) and front_ends == len(self.of_kind("front-end"))

    async def whole(self) -> bool:
        """Whether all are up, every member of every volume has all of it, and no volume is still being attached."""
        status = await self.status()
        attached = (each.volume.attachment.state for each in status.volumes if each.volume.HasField("attachment"))
        if any(state == pb.ATTACHMENT_STATE_ATTACHING for state in attached):
            return False
        replicas = (each for volume in status.volumes for each in volume.replicas if not each.replaces)
        return status.healthy and self._all_up(status) and all(each.state == "up" for each in replicas)

    async def create(self, size_bytes: int = 0, snapshot: str = "", segment_size_bytes: int = 0) -> str:
        """The id of a new volume, once it is available."""
        token = f"token-{self.loop.random.getrandbits(64):x}"
        request = pb.CreateVolumeRequest(
            size_bytes=size_bytes, snapshot=snapshot, client_token=token, segment_size_bytes=segment_size_bytes
        )
        volume = str((await self.call("CreateVolume", request)).id)

        async def available() -> bool:
            found = await self.call("GetVolume", pb.GetVolumeRequest(volume=volume))
            return bool(found.state == pb.VOLUME_STATE_AVAILABLE)

        await self.until(f"{volume} is available", available)
        return volume

    async def uri(self, volume: str) -> str:
        """Where it is served, empty where that is nowhere; then somebody attaches it to whoever is up, but seldom.

        Attaching takes its time: those who ask again at once would end each other's attempts for ever. Raises
        AssertionError where acknowledged writes are said to be lost: no fault here takes as much as that.
        """
        health = await self.call("GetVolumeHealth", pb.GetVolumeRequest(volume=volume))
        assert health.volume.state != pb.VOLUME_STATE_ERROR, f"{volume} is in error: {health.volume.reason}"
        if health.serving == "serving":
            return str(health.volume.attachment.uris[0]) if health.volume.attachment.uris else ""
        up = [each.id for each in (await self.status()).front_ends if each.up]
        now, patience_s = self.loop.time(), self.loop.random.uniform(*_PATIENCE_S)
        if up and now - self._attached_at.get(volume, -patience_s) >= patience_s:
            self._attached_at[volume] = now
            await self.attach(volume, self.loop.random.choice(up))
        return ""

    async def attach(self, volume: str, front_end: str) -> None:
        """Ask for it, once; whether it came to be is seen later."""
        with suppress(grpc.aio.AioRpcError):
            await self.call("AttachVolume", pb.AttachVolumeRequest(volume=volume, front_end=front_end, force=True), 0)


@asynccontextmanager
async def simulated_cluster(
    directory: Path, loop: SimulationLoop, machines: Machines, *, nodes: int = 5, controls: int = 1
) -> AsyncIterator[SimulatedCluster]:
    """One whose daemons are all up."""
    network = Network(loop)
    SimulatedJournalWriter.random = Random(loop.random.getrandbits(64))
    SimulatedJournalWriter.sync_s.clear()

    def server(**options: Any) -> Server:
        return Server(network, options.get("interceptors", ()))

    with (
        patch.object(grpc.aio, "server", server),
        patch.object(grpc.aio, "insecure_channel", partial(channel_to, network)),
        # Guests here think for longer than a record waits for their next write; tests/simulation has such waits.
        patch.object(nbd_server.front_end, "LeaderSettings", partial(LeaderSettings, gather_s=0.0)),
        patch.object(blockstore.node.node, "Journal", SimulatedJournal),
        patch.object(blockstore.node.node, "JournalWriter", SimulatedJournalWriter),
    ):
        cluster = SimulatedCluster(directory, loop, network, machines, nodes=nodes, controls=controls)
        try:
            cluster.start_all()
            await cluster.until("all daemons are up", cluster.all_up)
            yield cluster
        finally:
            await cluster.stop()
