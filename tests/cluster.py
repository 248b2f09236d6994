"""A real Cairn cluster of child processes, for tests: control, nodes in zones a, b, c, front-ends, and snapshotd.

    with Cluster(tmp_path) as cluster:
        volume = cluster.create(64 * MIB)
        uri = cluster.attach(volume)

Each process is started by its own command line, listens at a free port of the loopback and keeps its
data below the directory given. All of them end with the block, and where that fails their logs are
shown. Heartbeats and leases are shorter than by default, so that tests are; pass settings to differ.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc

from blockstore.config import ControlSettings, FrontEndSettings, NodeSettings, SnapshotdSettings, arguments_of
from blockstore.grpc_endpoint import control_target
from blockstore.rpc import control_pb2, control_pb2_grpc, snapshot_pb2, snapshot_pb2_grpc
from tests.daemons import START_LIMIT_S, Daemon, wait_for
from tests.loopback import free_address, own_host
from tests.nbd_client import Disconnected
from tests.proxy import Cable

CAIRN: Final = Path(sys.executable).parent / "cairn"
#: Of the first snapshotd, in its state directory.
KEYRING: Final = "keyring.json"
CALL_TIMEOUT_S: Final = 60.0
WHOLE_LIMIT_S: Final = 90.0
#: That are waited for beyond the last one of before.
_BEATS: Final = 2

CONTROL: Final = ControlSettings(lease_s=2.0, reconcile_s=0.2)
NODE: Final = NodeSettings(heartbeat_s=0.2, checkpoint_s=1.0, reserve_bytes=0)
FRONT_END: Final = FrontEndSettings(heartbeat_s=0.2)
#: How the names of those calls begin that may happen twice.
_REPEATABLE: Final = ("Get", "List", "Status", "Set")
SNAPSHOTD: Final = SnapshotdSettings(heartbeat_s=0.2)
#: How the names of those daemons begin that are started again at the address that they had.
_COME_BACK: Final = ("control", "node")


class Cluster:
    """The processes and a client of control.

    nodes, front_ends: daemons by their index. proxies: where `cut_off` was asked for, what stands
    between each node and all who call it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        zones: Sequence[str] = ("a", "b", "c"),
        front_ends: int = 1,
        proxied: bool = False,
        control_settings: ControlSettings = CONTROL,
        node_settings: NodeSettings = NODE,
        front_end_settings: FrontEndSettings = FRONT_END,
        node_directory: Path | None = None,
        snapshotds: int = 0,
        snapshotd_settings: SnapshotdSettings = SNAPSHOTD,
        controls: int = 1,
    ) -> None:
        """controls: how many, of one etcd that their settings name.

        node_directory: where the nodes' data lies, if not with the rest.

        snapshotds: how many; they share one object store, `store` in the directory unless the settings name another,
        and one keyring.
        """
        self.directory = directory
        self._control_settings = dataclasses.replace(
            control_settings, state=directory / "control", listen=self._listen("control")
        )
        self._front_end_settings = front_end_settings
        self._snapshotd_settings = snapshotd_settings
        self._snapshotd_count = snapshotds
        self.snapshotds: list[Daemon] = []
        self._node_settings = node_settings
        self.control = self._daemon("control", self._control_settings, self._control_settings.state)
        self.controls = [self.control, *(self._further_control(number) for number in range(2, controls + 1))]
        self.proxies = [Cable() for _ in zones] if proxied else []
        self.nodes: list[Daemon] = []
        self.front_ends: list[Daemon] = []
        self._zones = zones
        self._front_end_count = front_ends
        self._node_directory = node_directory or directory
        self._control_addresses: list[str] = []
        self._channel: grpc.Channel | None = None

    def __enter__(self) -> Self:
        try:
            self._start_all()
        except BaseException:
            self._show_logs()
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._show_logs()
        self._end()

    # ---- processes

    @property
    def daemons(self) -> list[Daemon]:
        return [*self.controls, *self.nodes, *self.snapshotds, *self.front_ends]

    @property
    def control_address(self) -> str:
        """Of all of them."""
        return ",".join(self._control_addresses)

    def data_of(self, index: int) -> Path:
        """The data directory of a node."""
        return self.nodes[index].directory

    def start(self, *daemons: Daemon) -> None:
        """Start them, and wait until they listen."""
        for daemon in daemons:
            daemon.start()
        for daemon in daemons:
            daemon.read_address()

    def stop(self) -> None:
        """SIGTERM to all, front-ends first, as an operator would. Raises AssertionError where one complains."""
        for daemon in reversed(self.daemons):
            if daemon.running:
                assert daemon.stop() == 0, f"{daemon.name} did not stop cleanly:\n{daemon.tail()}"

    # ---- control's API

    @property
    def api(self) -> control_pb2_grpc.ControlStub:
        """A client of control; `call` adds deadline and waiting."""
        if self._channel is None:
            target, options = control_target(self.control_address)
            self._channel = grpc.insecure_channel(target, options=[*options, ("grpc.max_reconnect_backoff_ms", 500)])
        return control_pb2_grpc.ControlStub(self._channel)

    def call(self, method: str, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call control; waits while it is not there. What it answers in parts is put together. Raises grpc.RpcError.

        Nobody can say of a call over a connection to a control that was killed since whether it was heard: what may
        happen twice is asked again, and what may not goes over a connection over which an answer has just come.
        """
        if not method.startswith(_REPEATABLE):
            self.call("GetRepair", control_pb2.GetRepairRequest(), timeout_s)
        stub: Any = self.api
        if not hasattr(stub, method):
            stub = snapshot_pb2_grpc.SnapshotsStub(self._channel)  # type: ignore[arg-type]  # `api` made it
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = getattr(stub, method)(request, timeout=deadline - time.monotonic(), wait_for_ready=True)
                return merge(answer) if isinstance(answer, Iterator) else answer
            except grpc.RpcError as error:
                again = method.startswith(_REPEATABLE) and error.code() is grpc.StatusCode.UNAVAILABLE
                if not again or time.monotonic() > deadline:
                    raise

    def snapshot(self, *volumes: str, wait: bool = True) -> list[str]:
        """The ids of snapshots of the volumes at one instant; wait: once they are completed."""
        request = snapshot_pb2.CreateSnapshotRequest(volumes=volumes)
        found = [each.id for each in self.call("CreateSnapshot", request).snapshots]
        for each in found if wait else ():
            self.wait_completed(each)
        return found

    def wait_completed(self, snapshot: str, limit_s: float = START_LIMIT_S) -> None:
        """Wait until it is whole in the object store."""
        wait_for(f"{snapshot} to be completed", lambda: self._is_completed(snapshot), limit_s)

    def restore(self, snapshot: str, rate_bytes: int = 0) -> str:
        """The id of a volume made from it, once it is available; rate_bytes: of its hydration, 0 for no limit."""
        request = control_pb2.CreateVolumeRequest(snapshot=snapshot, init_rate_bytes=rate_bytes)
        volume = self.call("CreateVolume", request).id
        wait_for(f"{volume} to be available", lambda: self.volume(volume).state == control_pb2.VOLUME_STATE_AVAILABLE)
        return str(volume)

    def _is_completed(self, snapshot: str) -> bool:
        found = self.call("GetSnapshot", snapshot_pb2.GetSnapshotRequest(snapshot=snapshot))
        assert found.state != snapshot_pb2.SNAPSHOT_STATE_ERROR, found.reason
        return bool(found.state == snapshot_pb2.SNAPSHOT_STATE_COMPLETED)

    def create(self, size_bytes: int, name: str = "", **fields: Any) -> str:
        """The id of a new volume, once it is available. fields: further ones of the request."""
        volume = self.call("CreateVolume", control_pb2.CreateVolumeRequest(size_bytes=size_bytes, name=name, **fields))

        def available() -> bool:
            return self.volume(volume.id).state == control_pb2.VOLUME_STATE_AVAILABLE

        wait_for(f"{volume.id} to be available", available)
        return str(volume.id)

    def attach(self, volume: str, front_end: int = 0, *, force: bool = False) -> str:
        """Attach it to a front-end, and wait until it is served; its NBD URI over TCP."""
        request = control_pb2.AttachVolumeRequest(volume=volume, front_end=self._front_end_id(front_end), force=force)
        self.call("AttachVolume", request)
        wait_for(f"{volume} to be served", lambda: self._serving(volume))
        return self.uri(volume, front_end)

    def uri(self, volume: str, front_end: int = 0) -> str:
        """Where a front-end that runs serves a volume."""
        return f"nbd://{self.front_ends[front_end].read_address('nbd_address')}/{volume}"

    def uri_now(self, volume: str, front_end: int = 0) -> str:
        """The same without waiting, perhaps of a process that is gone. Raises Disconnected where there is none."""
        path = self.front_ends[front_end].directory / "nbd_address"
        try:
            return f"nbd://{path.read_text().strip()}/{volume}"
        except FileNotFoundError:
            raise Disconnected(f"front-end {front_end} does not listen yet") from None

    def detach(self, volume: str, *, force: bool = False) -> None:
        """Detach it, and wait until it is available."""
        self.call("DetachVolume", control_pb2.DetachVolumeRequest(volume=volume, force=force))
        wait_for(
            f"{volume} to be available",
            lambda: self.volume(volume).state == control_pb2.VOLUME_STATE_AVAILABLE,
        )

    def volume(self, volume: str) -> control_pb2.Volume:
        """Its record."""
        found: control_pb2.Volume = self.call("GetVolume", control_pb2.GetVolumeRequest(volume=volume))
        return found

    def status(self) -> control_pb2.StatusResponse:
        """What `cairn status` shows."""
        found: control_pb2.StatusResponse = self.call("Status", control_pb2.StatusRequest())
        return found

    def health(self, volume: str) -> control_pb2.VolumeHealth:
        """The volume's part of the status."""
        found: control_pb2.VolumeHealth = self.call("GetVolumeHealth", control_pb2.GetVolumeRequest(volume=volume))
        return found

    def wait_snapshotd(self) -> None:
        """Wait until control knows where the only one is now: the lease of the one of before may hold still."""
        (daemon,) = self.snapshotds
        address = daemon.read_address()

        def is_registered() -> bool:
            found = self.call("GetStore", snapshot_pb2.GetStoreRequest()).daemons
            return [(each.address, each.up) for each in found] == [(address, True)]

        wait_for("snapshotd to be registered", is_registered)

    def wait_whole(self, volume: str, limit_s: float = WHOLE_LIMIT_S, *, idle: bool = False) -> None:
        """Wait until the volume is served and every replica of it is up; idle: and has all, to the last record.

        That is what heartbeats say, so it has to be said until each of those who say it has beaten twice: what the
        second beat tells was so after the first one had come.
        """
        heard: dict[str, set[int]] = {}

        def whole() -> bool:
            status, health = self.status(), self.health(volume)  # in this order: what is judged is the later one
            good = health.serving == "serving" and all(
                each.state == "up" and not (idle and each.lag_records) for each in health.replicas
            )
            if not good:
                heard.clear()
                return False
            beats = [(each.id, each.last_heartbeat_ms) for each in status.nodes]
            beats += [(each.id, each.last_heartbeat_ms) for each in status.front_ends]
            for teller, at_ms in beats:
                heard.setdefault(teller, set()).add(at_ms)
            tellers = {health.volume.attachment.front_end, *(each.node for each in health.replicas)}
            return all(len(heard.get(each, ())) > _BEATS for each in tellers)

        try:
            wait_for(f"{volume} to be whole", whole, limit_s)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self.health(volume)}") from error

    # ---- inside

    def _serving(self, volume: str) -> bool:
        return self.health(volume).serving == "serving"

    def _front_end_id(self, index: int) -> str:
        address = self.front_ends[index].read_address()

        def find() -> str:
            return next((each.id for each in self.status().front_ends if each.address == address and each.up), "")

        return wait_for(f"front-end {index} to register", find)

    def _start_all(self) -> None:
        self.start(*self.controls)
        # The others know control by its address, so that stays the same when it is started again.
        for each in self.controls:
            address = each.read_address()
            settings = dataclasses.replace(self._control_settings, state=each.directory, listen=address)
            each.command = self._command("control", settings)
            self._control_addresses.append(address)
        self.nodes += [self._node(index, zone) for index, zone in enumerate(self._zones)]
        self.front_ends += [self._front_end(index) for index in range(self._front_end_count)]
        self.snapshotds += [self._snapshotd(index) for index in range(self._snapshotd_count)]
        # They make repository and keyring one after the other.
        self.start(*self.nodes, *self.snapshotds[:1], *self.front_ends)
        self.start(*self.snapshotds[1:])
        wait_for("all to register", self._all_up)

    def _all_up(self) -> bool:
        status = self.status()
        nodes, front_ends = (sum(each.up for each in group) for group in (status.nodes, status.front_ends))
        if (nodes, front_ends) != (len(self.nodes), len(self.front_ends)):
            return False
        if not self.snapshotds:
            return True
        daemons = self.call("GetStore", snapshot_pb2.GetStoreRequest()).daemons
        return len([each for each in daemons if each.up]) == len(self.snapshotds)

    def _further_control(self, number: int) -> Daemon:
        name = f"control-{number}"
        settings = dataclasses.replace(self._control_settings, state=self.directory / name, listen=self._listen(name))
        return self._daemon("control", settings, settings.state, name=name)

    def _node(self, index: int, zone: str) -> Daemon:
        settings = dataclasses.replace(
            self._node_settings,
            data=self._node_directory / f"node-{index}",
            zone=zone,
            listen=self._listen(f"node-{index}"),
            control=self.control_address,
        )
        if self.proxies:
            cable = self.proxies[index]
            settings = dataclasses.replace(
                settings, listen=free_address(), advertise=cable.address, streams_port=cable.streams_port
            )
            cable.start(settings.listen)
        return self._daemon("node", settings, settings.data, name=f"node-{index}")

    def _front_end(self, index: int) -> Daemon:
        settings = dataclasses.replace(
            self._front_end_settings,
            state=self.directory / f"front-end-{index}",
            listen=self._listen(f"front-end-{index}"),
            nbd_listen=self._listen(f"front-end-{index}"),
            control=self.control_address,
        )
        return self._daemon("nbd", settings, settings.state, name=f"front-end-{index}")

    def _snapshotd(self, index: int) -> Daemon:
        given = self._snapshotd_settings
        settings = dataclasses.replace(
            given,
            state=self.directory / f"snapshotd-{index}",
            listen=self._listen(f"snapshotd-{index}"),
            control=self.control_address,
            store=str(self.directory / "store") if given.store == SNAPSHOTD.store else given.store,
            keyring_file=given.keyring_file or (None if index == 0 else self.directory / "snapshotd-0" / KEYRING),
        )
        return self._daemon("snapshotd", settings, settings.state, name=f"snapshotd-{index}")

    def _listen(self, name: str) -> str:
        """Where the daemon of that name listens: a free port of this address.

        Where it comes back to later, nobody else may have been given meanwhile.
        """
        return f"{own_host() if name.startswith(_COME_BACK) else '127.0.0.1'}:0"

    def _daemon(self, noun: str, settings: Any, directory: Path, name: str = "") -> Daemon:
        name = name or noun
        return Daemon(name, self._command(noun, settings), directory, self.directory / f"{name}.log")

    @staticmethod
    def _command(noun: str, settings: Any) -> list[str | Path]:
        return [CAIRN, noun, "run", *arguments_of(settings)]

    def _show_logs(self) -> None:
        for daemon in self.daemons:
            print(f"==== {daemon.name} ({'running' if daemon.running else 'ended'})\n{daemon.tail()}")

    def _end(self) -> None:
        for daemon in self.daemons:
            daemon.kill()
        for proxy in self.proxies:
            proxy.close()
        if self._channel is not None:
            self._channel.close()


def merge(parts: Iterator[Any]) -> Any:
    """The answer that these are the parts of."""
    answer = next(parts)
    for part in parts:
        answer.MergeFrom(part)
    return answer
