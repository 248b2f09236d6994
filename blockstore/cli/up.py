"""`cairn up` and `cairn down`: a whole cluster on one machine, in one directory."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from blockstore.cli import documents
from blockstore.cli.background import go_to_background
from blockstore.cli.client import wait_until
from blockstore.cli.cluster import LocalCluster, Overrides
from blockstore.cli.options import (
    Output,
    OutputOption,
    S3EndpointOption,
    StateOption,
    StoreOption,
    default_state_directory,
)
from blockstore.cli.plan import Wishes, make_plan
from blockstore.cli.screen import Steps, program, show
from blockstore.cli.settings import DAEMON_SETTINGS, STATE_VARIABLE, setting_from_text
from blockstore.cli.state_directory import Plan, StateDirectory
from blockstore.errors import Conflict, InvalidRequest

#: Of `cairn down`: longer than the supervisor gives its processes, one after the other.
STOP_TIMEOUT_S: Final = 90.0

#: Settings that differ from process to process.
_GIVEN: Final = frozenset(
    ("state", "data", "zone", "control", "listen", "advertise", "metrics", "nbd_listen", "nbd_socket", "store")
)


def up(
    *,
    state: StateOption,
    nodes: Annotated[
        int | None, typer.Option("--nodes", help="How many nodes.", show_default="3, or those that have data here")
    ] = None,
    zones: Annotated[
        str, typer.Option("--zones", help="Their zones: A,B,C.", show_default="each a zone of its own")
    ] = "",
    host: Annotated[str, typer.Option("--host", help="Address of this machine at which all processes listen.")] = (
        "127.0.0.1"
    ),
    control_port: Annotated[
        int | None, typer.Option("--control-port", help="For commands; 0: a free one.", show_default="7300 if free")
    ] = None,
    nbd_port: Annotated[
        int | None, typer.Option("--nbd-port", help="For NBD clients; 0: a free one.", show_default="10809 if free")
    ] = None,
    nbd_socket: Annotated[
        Path | None, typer.Option("--nbd-socket", help="Unix socket for NBD clients as well.")
    ] = None,
    store: StoreOption = None,
    s3_endpoint: S3EndpointOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="DAEMON.SETTING=VALUE", help="Such as node.reserve=0; see `cairn node run -h`."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when it is ready; stop it by `down`.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Run a cluster on this machine: control, nodes, an NBD front-end, and snapshotd.

    Ctrl-C stops it cleanly, a second one at once; the next `up` goes on with the data, at the same
    ports where these are free. A process that ends is started again.
    """
    directory = StateDirectory(state)
    wishes = Wishes(nodes, _split(zones), host, control_port, nbd_port, store, s3_endpoint)
    overrides = parse_overrides(settings or [])
    ready = go_to_background(directory.log("up"), directory.make) if detach else lambda: None
    directory.make()
    with directory.locked():
        plan = make_plan(directory.read_plan(), wishes)
        directory.write_plan(plan)
        # JSON has stdout for itself.
        steps = Steps(sys.stderr if output is Output.JSON else None)
        cluster = LocalCluster(directory, plan, overrides, steps, nbd_socket)

        def announce() -> None:
            _announce(directory, cluster.plan, steps, output, detach)
            ready()

        asyncio.run(_run(cluster, announce, steps))


def down(state: StateOption, output: OutputOption = Output.TABLE) -> None:
    """Stop the cluster that `cairn up` runs in a directory; its data stays."""
    directory = StateDirectory(state)
    pid = directory.supervisor()
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        asyncio.run(_until_stopped(directory, pid))
    text = f"the cluster in {directory.path} is stopped" if pid else f"no cluster runs in {directory.path}"
    show(output, {"state": str(directory.path), "stopped": pid is not None}, lambda: text)


def parse_overrides(texts: list[str]) -> Overrides:
    """DAEMON.SETTING=VALUE texts as settings of each daemon. Raises InvalidRequest."""
    overrides: dict[str, dict[str, Any]] = {name: {} for name in DAEMON_SETTINGS}
    for text in texts:
        target, equals, value = text.partition("=")
        daemon, dot, name = target.partition(".")
        if daemon not in DAEMON_SETTINGS or not dot or not equals:
            raise InvalidRequest(f"--set {text!r}: write it as DAEMON.SETTING=VALUE, with {', '.join(DAEMON_SETTINGS)}")
        field, parsed = setting_from_text(DAEMON_SETTINGS[daemon], name, value)
        if field in _GIVEN:
            raise InvalidRequest(f"--set {text!r}: `cairn up` has options of its own for where things are and listen")
        overrides[daemon][field] = parsed
    for daemon, kind in DAEMON_SETTINGS.items():
        kind(**overrides[daemon])  # checks the bounds
    return overrides


def _split(zones: str) -> tuple[str, ...]:
    return tuple(zone.strip() for zone in zones.split(",") if zone.strip())


async def _run(cluster: LocalCluster, announce: Callable[[], None], steps: Steps) -> None:
    """Start, say so, and go on until a signal; stop in any case. Raises what kept it from starting."""
    stop = asyncio.Event()

    def signalled() -> None:
        if stop.is_set():
            steps("cairn", "stopping at once")
            cluster.kill()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, signalled)
    stopped = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(cluster.start())
    try:
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            announce()
            await stopped
        else:
            starting.cancel()
            await asyncio.wait({starting})
    finally:
        await cluster.stop()
    steps("cairn", "stopped; the data stays, and `cairn up` goes on with it")


async def _until_stopped(directory: StateDirectory, pid: int) -> None:
    async def gone() -> bool | None:
        return directory.supervisor() != pid or None

    await wait_until(
        gone,
        STOP_TIMEOUT_S,
        lambda: Conflict(
            f"the cluster (pid {pid}) has not stopped after {STOP_TIMEOUT_S:.0f} s: kill -9 {pid} ends it"
        ),
    )


def _announce(directory: StateDirectory, plan: Plan, steps: Steps, output: Output, detached: bool) -> None:
    """Say that it is ready, where, and what to do next."""
    steps("cairn", f"ready: {len(plan.nodes)} nodes, control at {plan.control}, NBD at {plan.nbd}")
    if output is Output.JSON:
        print(documents.text_of(_document(directory, plan)), flush=True)
        return
    cairn = program()
    lines = [f"{cairn} volume create --name db --size 10G", f"{cairn} volume attach db"]
    lines += [f"{cairn} snapshot create db --wait", f"{cairn} status"]
    if directory.path != default_state_directory().absolute():
        lines.insert(0, f"export {STATE_VARIABLE}={directory.path}")
    steps.line()
    steps.line("Try:" if detached else "Try, in another terminal:")
    for line in lines:
        steps.line(f"  {line}")
    steps.line(f"Metrics: {len(plan.metrics)} addresses for Prometheus (file_sd_configs) in {directory.targets}")
    stop = f"`{cairn} down`" if detached else "Ctrl-C"
    steps.line(f"{stop} stops the cluster; `{cairn} up` goes on with its data. Logs: {directory.path / 'log'}")


def _document(directory: StateDirectory, plan: Plan) -> documents.Document:
    return {
        "state": str(directory.path),
        "control": plan.control,
        "nbd": plan.nbd,
        "front_end": plan.front_end,
        "snapshotd": plan.snapshotd,
        "store": plan.store or str(directory.data("store")),
        "metrics": dict(plan.metrics),
        "nodes": [{"name": each.name, "zone": each.zone, "address": each.listen} for each in plan.nodes],
        "supervisor": os.getpid(),
    }
