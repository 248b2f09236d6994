"""The control process itself: where it says that it listens, how it ends, and what survives kill -9."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockstore.daemon import ADDRESS_FILE
from blockstore.errors import CairnError
from blockstore.grpc_endpoint import open_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import control_pb2, control_pb2_grpc
from blockstore.units import GIB
from tests.control_beating import LIMIT_S, answer_of
from tests.control_cluster import Cluster, cluster_at, expected_replicas, until

_RUN = """
import asyncio, sys
from pathlib import Path
from blockstore.config import ControlSettings
from blockstore.control.daemon import run
asyncio.run(run(ControlSettings(state=Path(sys.argv[1]), listen="127.0.0.1:0", reconcile_s=0.1, lease_s=30.0)))
"""


def start(state: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", _RUN, str(state)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


async def address_of(state: Path, process: "subprocess.Popen[bytes]") -> str:
    async def written() -> str:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        file = state / ADDRESS_FILE
        return file.read_text().strip() if file.exists() else ""

    address: str = await until(written, "the address file")
    return address


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_and_ends_when_told(tmp_path: Path, number: signal.Signals) -> None:
    async def scenario(process: "subprocess.Popen[bytes]") -> None:
        async with open_channel(await address_of(tmp_path, process)) as channel:
            request = health_pb2.HealthCheckRequest(service="cairn.v1.Control")
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=LIMIT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    process = start(tmp_path)
    try:
        asyncio.run(scenario(process))
        process.send_signal(number)
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output
        assert not (tmp_path / ADDRESS_FILE).exists()
    finally:
        process.kill()
        process.wait()


def test_a_second_one_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    process = start(tmp_path)
    try:
        asyncio.run(address_of(tmp_path, process))
        second = start(tmp_path)
        output, _ = second.communicate(timeout=LIMIT_S)
        assert second.returncode != 0
        assert b"another control process is running" in output
        assert (tmp_path / ADDRESS_FILE).exists()
    finally:
        process.kill()
        process.communicate()


@asynccontextmanager
async def killed_at_the_end(cluster: Cluster, state: Path) -> AsyncIterator["control_pb2_grpc.ControlAsyncStub"]:
    (state / ADDRESS_FILE).unlink(missing_ok=True)
    process = start(state)
    try:
        address = await address_of(state, process)
        for each in (*cluster.nodes, *cluster.front_ends):
            each.control = address
        async with open_channel(address) as channel:
            yield control_pb2_grpc.ControlStub(channel)
            os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.timeout(300)  # ten starts of a process
def test_kill_9_at_any_time_leaves_nothing_wrong(tmp_path: Path) -> None:
    """Killed ever later into one create and attach; the last start carries on and finds all in order."""

    async def work(stub: "control_pb2_grpc.ControlAsyncStub") -> control_pb2.Volume:
        create = control_pb2.CreateVolumeRequest(size_bytes=GIB, name="v", client_token="t")
        with cairn_errors("control"):
            await stub.CreateVolume(create, timeout=LIMIT_S)
            return await stub.AttachVolume(control_pb2.AttachVolumeRequest(volume="v"), timeout=LIMIT_S)

    async def scenario() -> None:
        async with cluster_at(tmp_path) as cluster:
            for delay_s in (0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.6):
                async with killed_at_the_end(cluster, tmp_path) as stub:
                    doing = asyncio.ensure_future(work(stub))
                    await asyncio.wait([doing], timeout=delay_s)
                with suppress(CairnError, grpc.RpcError, asyncio.CancelledError):
                    await doing
            async with killed_at_the_end(cluster, tmp_path) as stub:
                volume = await work(stub)
                assert volume.state == control_pb2.VOLUME_STATE_IN_USE
                listed = await answer_of(stub.ListVolumes(control_pb2.ListVolumesRequest(), timeout=LIMIT_S))
                assert [each.id for each in listed.volumes] == [volume.id]
                assert cluster.held() == expected_replicas([volume])

                async def serves() -> bool:
                    now = await stub.GetVolume(control_pb2.GetVolumeRequest(volume="v"), timeout=LIMIT_S)
                    serving = cluster.front_ends[0].volumes
                    return {name: opened.epoch for name, opened in serving.items()} == {volume.id: now.epoch}

                await until(serves, "the front-end serves it in the catalog's epoch")

    asyncio.run(scenario())
