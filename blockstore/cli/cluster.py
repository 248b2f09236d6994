"""A whole cluster on one machine: control, nodes, a front-end and snapshotd, as supervised processes.

Started in the order in which they need each other, and each waited for until control says that it is
there; stopped the other way round, so that the front-end answers what it has in flight, and nodes
write their checkpoints while somebody still hears of it. Without the object store volumes do all but snapshots
and restores, so nothing waits for snapshotd.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from blockstore.cli.client import ControlClient, connected, wait_until
from blockstore.cli.daemons import CAIRN
from blockstore.cli.plan import free_address
from blockstore.cli.state_directory import Plan, PlannedNode, StateDirectory
from blockstore.cli.supervisor import Child, Supervisor, last_line
from blockstore.config import ControlSettings, FrontEndSettings, NodeSettings, SnapshotdSettings, arguments_of
from blockstore.daemon import ADDRESS_FILE
from blockstore.errors import CairnError, QuorumUnavailable
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import snapshot_pb2

START_TIMEOUT_S: Final = 60.0
"""For each process; replaying a full journal takes seconds."""
START_ATTEMPTS: Final = 3
"""Starts that fail in a row before a process counts as one that does not start."""
RESUME_TIMEOUT_S: Final = 30.0
"""For volumes that were attached to be served again; the cluster goes on in any case."""
SNAPSHOTD_TIMEOUT_S: Final = 20.0
"""Longer than it looks for its object store: nobody waits for the volumes because of that."""
_PROBE_S: Final = 0.5

Overrides = Mapping[str, Mapping[str, Any]]
"""For `control`, `node`, `nbd` and `snapshotd`: settings, by field, that differ from their defaults."""


class LocalCluster:
    """The processes of `plan`, with their data in `directory`. say(who, text) tells people of each step."""

    def __init__(
        self,
        directory: StateDirectory,
        plan: Plan,
        overrides: Overrides,
        say: Callable[[str, str], None],
        nbd_socket: Path | None = None,
    ) -> None:
        self.plan = plan
        self._directory = directory
        self._overrides = overrides
        self._say = say
        self._nbd_socket = nbd_socket
        self._supervisor = Supervisor(say, self._note_processes)
        self._control = self._child("control", self._control_arguments)
        self._nodes = {
            node.name: self._child(node.name, lambda name=node.name: self._node_arguments(name))  # type: ignore[misc]
            for node in plan.nodes
        }
        self._front_end = self._child("nbd", self._front_end_arguments)
        self._snapshotd = self._child("snapshotd", self._snapshotd_arguments)

    async def start(self) -> None:
        """Returns once control, the front-end and at least one node are up. Raises CairnError where that fails."""
        async with AsyncExitStack() as stack:
            client = await self._start_control(stack)
            for child in (*self._nodes.values(), self._snapshotd):
                self._supervisor.start(child)
            came_up = await asyncio.gather(*(self._node_is_up(client, name) for name in self._nodes))
            if not any(came_up):
                raise CairnError(f"no node started: see the logs in {self._directory.log('node-1').parent}")
            snapshotd_is_up = asyncio.create_task(self._snapshotd_is_up(client))
            try:
                await self._start_front_end(client)
                await self._resume(client)
                await snapshotd_is_up
            finally:
                snapshotd_is_up.cancel()

    async def stop(self) -> None:
        """Stop the front-end, then snapshotd, the nodes, and control."""
        for who, children in (
            ("nbd", [self._front_end]), ("snapshotd", [self._snapshotd]),
            ("nodes", list(self._nodes.values())), ("control", [self._control]),
        ):  # fmt: skip
            if any(child.pid for child in children):
                self._say(who, "stopping")
            await self._supervisor.stop(children)

    def kill(self) -> None:
        """End all processes at once; what was acknowledged is safe."""
        self._supervisor.kill()

    async def _start_control(self, stack: AsyncExitStack) -> ControlClient:
        # Somebody else may listen there, as another cluster's control: ours says in this file that it is the one.
        address = self._directory.data("control") / ADDRESS_FILE
        with suppress(FileNotFoundError, NotADirectoryError):  # control says itself if it has no directory
            address.unlink()
        self._supervisor.start(self._control)

        async def reached() -> ControlClient | None:
            self._check(self._control)
            if not address.exists():
                return None
            try:
                return await stack.enter_async_context(connected(self.plan.control, _PROBE_S))
            except QuorumUnavailable:
                return None

        client = await wait_until(reached, START_TIMEOUT_S, lambda: self._too_slow(self._control))
        self._say("control", f"listens at {self.plan.control} (pid {self._control.pid})")
        return client

    async def _node_is_up(self, client: ControlClient, name: str) -> bool:
        """Wait for a node. One that does not start leaves the others to go on without it."""
        child = self._nodes[name]

        async def registered() -> pb.Node | None:
            self._check(child)
            address = self._planned(name).listen
            nodes = (await client.whole(client.stub.ListNodes, pb.ListNodesRequest())).nodes
            return next(
                (each for each in nodes if each.address == address and each.up and each.last_heartbeat_ms), None
            )

        try:
            node = await wait_until(registered, START_TIMEOUT_S, lambda: self._too_slow(child))
        except CairnError as error:
            self._say("cairn", f"{error}; going on without it")
            return False
        self._say(name, f"is up as {node.id} in {node.zone}, at {node.address} (pid {child.pid})")
        return True

    async def _snapshotd_is_up(self, client: ControlClient) -> None:
        """Wait for snapshotd. Where the object store cannot be reached, the volumes go on without it."""
        child = self._snapshotd

        async def registered() -> snapshot_pb2.StoreDaemon | None:
            self._check(child)
            daemons = (await client.whole(client.snapshots.GetStore, snapshot_pb2.GetStoreRequest())).daemons
            return next((each for each in daemons if each.address == self.plan.snapshotd and each.up), None)

        try:
            found = await wait_until(registered, SNAPSHOTD_TIMEOUT_S, lambda: self._does_not_start(child))
        except CairnError as error:
            self._say("cairn", f"{error}; going on without snapshots, it is tried again")
            return
        self._say("snapshotd", f"is up as {found.id}, snapshots go to {found.store} (pid {child.pid})")

    async def _start_front_end(self, client: ControlClient) -> None:
        self._supervisor.start(self._front_end)

        async def registered() -> pb.FrontEndInfo | None:
            self._check(self._front_end)
            front_ends = (await client.status()).front_ends
            mine = (each for each in front_ends if each.address == self.plan.front_end)
            return next((each for each in mine if each.up and each.last_heartbeat_ms), None)

        info = await wait_until(registered, START_TIMEOUT_S, lambda: self._too_slow(self._front_end))
        self._say("nbd", f"is up as {info.id}, NBD at {', '.join(info.uris)} (pid {self._front_end.pid})")

    async def _resume(self, client: ControlClient) -> None:
        """Wait for volumes that were attached before; say which are served, and which are not yet, and why."""
        told: set[str] = set()

        async def all_served() -> bool | None:
            attached = [each for each in (await client.status()).volumes if each.volume.HasField("attachment")]
            for each in attached:
                if each.serving == "serving" and each.volume.id not in told:
                    told.add(each.volume.id)
                    self._say("nbd", f"serves {each.volume.id} {each.volume.name} again".replace("  ", " "))
            return len(told) == len(attached) or None

        try:
            await wait_until(all_served, RESUME_TIMEOUT_S, lambda: QuorumUnavailable("not all volumes are served yet"))
        except QuorumUnavailable as error:
            self._say("nbd", f"{error}; it keeps trying: see `cairn status`")

    def _child(self, name: str, arguments: Callable[[], list[str]]) -> Child:
        return Child(name, self._directory.log(name), lambda: [*CAIRN, *arguments()])

    def _control_arguments(self) -> list[str]:
        settings = ControlSettings(
            **{
                "state": self._directory.data("control"), "listen": self.plan.control,
                "metrics": self._metrics_address("control"), **self._overrides["control"],
            }
        )  # fmt: skip
        return ["control", "run", *arguments_of(settings)]

    def _node_arguments(self, name: str) -> list[str]:
        """Where its port was taken while it was down it gets another, and control hears of it."""
        node = self._planned(name)
        listen = free_address(node.listen)
        if listen != node.listen:
            nodes = tuple(replace(each, listen=listen) if each is node else each for each in self.plan.nodes)
            self.plan = replace(self.plan, nodes=nodes)
            self._directory.write_plan(self.plan)
        settings = NodeSettings(
            **{
                "data": self._directory.data(name), "zone": node.zone, "listen": listen,
                "control": self.plan.control, "metrics": self._metrics_address(name), **self._overrides["node"],
            }
        )  # fmt: skip
        return ["node", "run", *arguments_of(settings)]

    def _front_end_arguments(self) -> list[str]:
        settings = FrontEndSettings(
            **{
                "state": self._directory.data("nbd"), "nbd_listen": self.plan.nbd, "nbd_socket": self._nbd_socket,
                "listen": self.plan.front_end, "control": self.plan.control,
                "metrics": self._metrics_address("nbd"), **self._overrides["nbd"],
            }
        )  # fmt: skip
        return ["nbd", "run", *arguments_of(settings)]

    def _snapshotd_arguments(self) -> list[str]:
        self.plan = replace(self.plan, snapshotd=free_address(self.plan.snapshotd))
        settings = SnapshotdSettings(
            **{
                "state": self._directory.data("snapshotd"), "listen": self.plan.snapshotd,
                "control": self.plan.control, "store": self.plan.store or str(self._directory.data("store")),
                "s3_endpoint": self.plan.s3_endpoint, "metrics": self._metrics_address("snapshotd"),
                **self._overrides["snapshotd"],
            }
        )  # fmt: skip
        return ["snapshotd", "run", *arguments_of(settings)]

    def _metrics_address(self, name: str) -> str:
        """Another one where its port was taken while it was down; Prometheus finds it in the file of targets."""
        address = free_address(self.plan.metrics[name])
        if address != self.plan.metrics[name]:
            self.plan = replace(self.plan, metrics={**self.plan.metrics, name: address})
            self._directory.write_plan(self.plan)
        return address

    def _planned(self, name: str) -> PlannedNode:
        return next(node for node in self.plan.nodes if node.name == name)

    def _check(self, child: Child) -> None:
        """Raises CairnError where it does not start."""
        if child.given_up or child.failures >= START_ATTEMPTS:
            raise self._does_not_start(child)

    def _does_not_start(self, child: Child) -> CairnError:
        return CairnError(f"{child.name} does not start: {last_line(child.log)} (all of it: {child.log})")

    def _too_slow(self, child: Child) -> CairnError:
        return CairnError(f"{child.name} is not up after {START_TIMEOUT_S:.0f} s: see {child.log}")

    def _note_processes(self) -> None:
        try:
            self._directory.write_processes(self._supervisor.pids)
        except OSError as error:
            # A full disk, for example: the processes go on all the same.
            self._say("cairn", f"cannot note which processes run: {error}")
