"""`cairn demo`: the main job from end to end on this machine, each step as it happens.

Three nodes, a volume, real data through NBD, a node killed with SIGKILL while writing goes on, its
return, and every byte read back; then snapshots, and a second volume restored from one of them. The
cluster is left running, to try things with.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from blockstore.cli import documents
from blockstore.cli.attaching import attach_and_wait, until_state
from blockstore.cli.client import ControlClient, run_with_control
from blockstore.cli.daemons import CAIRN
from blockstore.cli.demo_load import Load
from blockstore.cli.demo_outage import IN_FLIGHT, VICTIM, kill_node, until_caught_up, until_started_again
from blockstore.cli.demo_snapshot import Restored, snapshot_and_restore
from blockstore.cli.demo_tls import DemoTls
from blockstore.cli.options import Output, OutputOption, S3EndpointOption, StoreOption, size_bytes
from blockstore.cli.screen import Steps, program, say
from blockstore.cli.settings import STATE_VARIABLE
from blockstore.cli.snapshot_documents import snapshot
from blockstore.cli.state_directory import StateDirectory
from blockstore.cli.store_client import find_store
from blockstore.errors import CairnError, Corrupt, InvalidRequest
from blockstore.rpc import control_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB, format_size
from nbd_server import uri as nbd_uri

VOLUME_NAME: Final = "demo"
WAIT_S: Final = 60.0
_MIN_SIZE: Final = MIB
"""A smaller volume is written before a node can be killed."""


def demo(
    *,
    state: Annotated[
        Path | None, typer.Option("--state", help="Directory for the cluster.", show_default="a new one in /tmp")
    ] = None,
    size: Annotated[
        int, typer.Option("--size", parser=size_bytes, metavar="SIZE", help="Of the volume; all of it is written.")
    ] = "128M",  # type: ignore[assignment]  # typer parses it
    stop: Annotated[bool, typer.Option("--stop", help="Stop the cluster at the end, and remove a new directory.")] = (
        False
    ),
    tls: Annotated[bool, typer.Option("--tls", help="Let NBD clients in by TLS and certificates alone.")] = False,
    store: StoreOption = None,
    s3_endpoint: S3EndpointOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show the main job on this machine: three nodes, a volume, a node killed and caught up, a snapshot, a restore.

    Everything is compared with what was written. It takes less than a minute.
    """
    if size < _MIN_SIZE or size % BLOCK_SIZE:
        raise InvalidRequest(f"--size {size}: the demo takes {format_size(_MIN_SIZE)} or more, a multiple of 4 KiB")
    steps = Steps(sys.stderr if output is Output.JSON else None)
    directory = StateDirectory(state or Path(tempfile.mkdtemp(prefix="cairn-demo-")))
    where = [*(("--store", store) if store else ()), *(("--s3-endpoint", s3_endpoint) if s3_endpoint else ())]
    secured = DemoTls.make(directory.path / "pki") if tls else DemoTls()
    cluster = _start(directory, [*where, *secured.settings()], steps, output)
    try:
        done = run_with_control(cluster["control"], lambda client: _main_job(client, directory, size, secured, steps))
    except BaseException:
        _stop(directory, output)
        say(f"the logs are in {directory.path / 'log'}")
        raise
    if stop:
        _stop(directory, output)
        steps("cairn", "stopped")
        _check_nodes(directory, cluster, steps, output)
        if state is None:
            shutil.rmtree(directory.path)
    _conclude(directory, done, secured, steps, stopped=stop, output=output)


@dataclass(frozen=True, slots=True)
class _Done:
    """The volume, what was written to it, and what its snapshots became."""

    volume: pb.Volume
    load: Load
    restored: Restored


def _start(directory: StateDirectory, where: list[str], steps: Steps, output: Output) -> dict[str, Any]:
    """Run `cairn up --detach`; what it says of the cluster. Raises CairnError where it did not start."""
    steps("cairn", f"starting a cluster in {directory.path}")
    done = _cairn("up", "--detach", "--output", "json", "--state", str(directory.path), *where, output=output)
    if done.returncode:
        raise CairnError(
            f"the cluster did not start (exit code {done.returncode}): see above, and {directory.path}/log"
        )
    cluster: dict[str, Any] = json.loads(done.stdout)
    return cluster


def _stop(directory: StateDirectory, output: Output) -> None:
    _cairn("down", "--state", str(directory.path), output=output)


def _check_nodes(directory: StateDirectory, cluster: dict[str, Any], steps: Steps, output: Output) -> None:
    """Verify what the stopped nodes store, and that it is the same. Raises Corrupt."""
    digests: dict[str, set[str]] = defaultdict(set)
    for node in cluster["nodes"]:
        done = _cairn("node", "check", str(directory.data(node["name"])), "--output", "json", output=output)
        if done.returncode:
            raise Corrupt(f"the check of {node['name']} ended with exit code {done.returncode}: {done.stdout}")
        replicas = sorted(json.loads(done.stdout)["replicas"], key=itemgetter("volume"))
        for replica in replicas:
            digests[replica["volume"]].add(replica["digest"])
        found = ", ".join(replica["digest"] for replica in replicas)
        steps(node["name"], f"checked while stopped: all is sound; digests of its replicas: {found}")
    if any(len(each) > 1 for each in digests.values()):
        raise Corrupt(f"the replicas in {directory.path} differ: please report it")


def _cairn(*arguments: str, output: Output) -> "subprocess.CompletedProcess[str]":
    """Run another command of this very installation; the steps that it tells on stderr go where ours go."""
    stderr = None if output is Output.JSON else sys.stdout
    argv = [*CAIRN, *arguments]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)


async def _main_job(
    client: ControlClient, directory: StateDirectory, size: int, secured: DemoTls, steps: Steps
) -> _Done:
    """All from the empty cluster to two verified volumes. Raises QuorumUnavailable where there is no object store."""
    await find_store(client)
    volume = await _create(client, size, steps)
    load = Load(nbd_uri.parse_uri(volume.attachment.uris[0]), volume.size_bytes, secured.connect())
    steps(
        "demo",
        f"writing {format_size(volume.size_bytes)} of random bytes through NBD; a write is durable when answered",
    )
    load.start()
    try:
        await _outage(client, directory, volume.id, load, steps)
    finally:
        await load.stop()
    steps(
        "demo", f"{format_size(load.written_bytes)} written, no write failed, the slowest took {load.slowest_s:.2f} s"
    )
    await until_caught_up(client, volume.id, WAIT_S, lambda text: steps("status", text))
    steps("status", "all three replicas have everything")
    await _verify(volume, load, secured, steps)
    restored = await snapshot_and_restore(client, volume, load, steps)
    return _Done(await client.volume(volume.id), load, restored)


async def _create(client: ControlClient, size: int, steps: Steps) -> pb.Volume:
    request = pb.CreateVolumeRequest(size_bytes=size, name=VOLUME_NAME, client_token=VOLUME_NAME)
    volume = await client.call(client.stub.CreateVolume, request)
    volume = await until_state(client, volume, pb.VOLUME_STATE_AVAILABLE, WAIT_S)
    zones = ", ".join(sorted(each.zone for each in volume.segments[0].configuration.members))
    steps("volume", f"created {volume.id}, {format_size(volume.size_bytes)}, one replica in each of {zones}")
    request_attach = pb.AttachVolumeRequest(volume=volume.id)
    volume = await attach_and_wait(client, request_attach, WAIT_S, lambda _: None)
    steps("volume", f"attached, epoch {volume.epoch}: {volume.attachment.uris[0]}")
    return volume


async def _outage(client: ControlClient, directory: StateDirectory, volume_id: str, load: Load, steps: Steps) -> None:
    """Kill a node while writing goes on, and see it come back."""
    await load.reached(load.size_bytes // 4, WAIT_S)
    old = kill_node(directory)
    before = load.written_bytes
    steps(VICTIM, f"killed with SIGKILL (pid {old}); writing goes on")
    pid = await until_started_again(directory, old, WAIT_S)
    meanwhile = load.written_bytes - before
    steps(VICTIM, f"started again by the supervisor (pid {pid}); {format_size(meanwhile)} were written without it")
    await until_caught_up(client, volume_id, WAIT_S, lambda text: steps("status", text), in_flight=IN_FLIGHT)
    steps(VICTIM, "has caught up while writing went on")


async def _verify(volume: pb.Volume, load: Load, secured: DemoTls, steps: Steps) -> None:
    """Read all back, by this program and by one that others wrote. Raises Corrupt where a byte is not as written."""
    uri = volume.attachment.uris[0]
    _refuse(uri, await load.wrong_offsets())
    steps("demo", f"read {format_size(load.size_bytes)} back: every byte as written")
    if nbdcopy := shutil.which("nbdcopy"):
        _refuse(uri, await load.wrong_offsets_of_copy(nbdcopy, secured.uri(uri)))
        steps("nbdcopy", "reads the same")


def _refuse(uri: str, wrong: list[int]) -> None:
    if wrong:
        raise Corrupt(f"{uri} is not as written in {len(wrong)} places, the first at byte {wrong[0]}: please report it")


def _conclude(
    directory: StateDirectory, done: _Done, secured: DemoTls, steps: Steps, *, stopped: bool, output: Output
) -> None:
    commands = secured.commands(list(done.volume.attachment.uris))
    if output is Output.JSON:
        document = {
            "state": str(directory.path),
            "volume": documents.volume(done.volume),
            "written_bytes": done.load.written_bytes,
            "slowest_write_s": round(done.load.slowest_s, 3),
            "snapshots": [snapshot(done.restored.first), snapshot(done.restored.second)],
            "restored": documents.volume(done.restored.volume),
            "verified": True,
            "running": not stopped,
            "commands": commands,
        }
        print(documents.text_of(document), flush=True)
        return
    if stopped:
        return
    cairn, first, second = program(), done.restored.first.id, done.restored.second.id
    steps.line("\nThe cluster goes on running. Try:")
    for line in (
        f"export {STATE_VARIABLE}={directory.path}",
        f"{cairn} status",
        *commands,
        f"{cairn} snapshot create {VOLUME_NAME} --wait",
        f"{cairn} snapshot tree",
        f"{cairn} snapshot diff {first} {second}",
        f"{cairn} volume create --snapshot {second} --name another",
        f"{cairn} snapshot export {second} disk.img",
        f"{cairn} down",
        *secured.up_again(cairn),
    ):
        steps.line(f"  {line}")
