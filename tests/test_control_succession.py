"""One control as the active one, standing by, and not yet either: what callers are told, and when that changes."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockstore.config import ControlSettings
from blockstore.control import leadership
from blockstore.control.daemon import serving
from blockstore.control.leadership import Roster, candidacy
from blockstore.control.metastore import etcd_client
from blockstore.control.metastore.etcd_address import EtcdAddress
from blockstore.control.metastore.etcd_client import EtcdClient
from blockstore.errors import CairnError, Corrupt, InvalidRequest, QuorumUnavailable
from blockstore.grpc_endpoint import control_target, open_control_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import control_pb2, control_pb2_grpc
from blockstore.rpc import etcd_pb2 as pb
from tests.control_beating import answer_of
from tests.control_cluster import until
from tests.etcd_server import EtcdServer, running_etcd

CALL_S = 30.0


@asynccontextmanager
async def control_on(etcd: EtcdServer, state: Path, **changes: Any) -> AsyncIterator[str]:
    settings = ControlSettings(
        state=state,
        listen="127.0.0.1:0",
        metastore=etcd.url(),
        lease_s=0.5,
        **{"leader_lease_s": 3.0, **changes},
    )
    async with serving(settings) as (address, _):
        yield address


async def status(addresses: str) -> control_pb2.StatusResponse:
    async with open_control_channel(addresses) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        with cairn_errors():
            answer = await answer_of(stub.Status(control_pb2.StatusRequest(), timeout=CALL_S, wait_for_ready=True))
    assert isinstance(answer, control_pb2.StatusResponse)
    return answer


async def refusal(address: str) -> str:
    """Why it does not answer; empty where it does."""
    try:
        await status(address)
    except QuorumUnavailable as error:
        return str(error)
    return ""


async def until_active(address: str) -> None:
    async def answers() -> bool:
        return not await refusal(address)

    await until(answers, f"{address} to be active")


def test_of_two_one_answers_and_the_other_says_who_does(tmp_path: Path) -> None:
    async def scenario(etcd: EtcdServer) -> None:
        # So long that it is not over where this process is not run for a while.
        async with control_on(etcd, tmp_path / "b", leader_lease_s=30.0) as second:
            await until_active(second)
            async with control_on(etcd, tmp_path / "a", leader_lease_s=30.0) as first:

                async def told() -> bool:
                    return f"the active one is at {second}" in await refusal(first)

                await until(told, "the first to know the second")

                async def knows() -> bool:
                    return [each.active for each in (await status(second)).controls] == [True, False]

                await until(knows, "the second to know the first")
                _, port = first.split(":")
                both = f"localhost:{port},{second}"
                for _ in range(5):
                    assert [each.active for each in (await status(both)).controls] == [True, False]
        async with control_on(etcd, tmp_path / "a") as first:
            await until_active(first)
            assert [each.address for each in (await status(first)).controls] == [first]

    with running_etcd(tmp_path) as etcd:
        asyncio.run(scenario(etcd))


def test_without_etcd_it_stands_by_and_says_why_until_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_client, "LIMIT_S", 0.5)
    monkeypatch.setattr(etcd_client, "ATTEMPT_S", 0.3)

    async def scenario(etcd: EtcdServer) -> None:
        etcd.kill()
        async with control_on(etcd, tmp_path / "a") as address:

            async def says_why() -> bool:
                return "does not answer" in await refusal(address)

            await until(says_why, "it to say why")
            monkeypatch.undo()
            await asyncio.to_thread(etcd.start)
            await until_active(address)
            # Its place is taken away by hand: it stands anew.
            before = etcd.ctl("get", "--prefix", "/cairn/control/", "--keys-only")
            etcd.ctl("del", "--prefix", "/cairn/control/")

            async def stands_anew() -> bool:
                now = etcd.ctl("get", "--prefix", "/cairn/control/", "--keys-only")
                return bool(now.strip()) and now != before

            await until(stands_anew, "it to stand anew")
            await until_active(address)

    with running_etcd(tmp_path) as etcd:
        asyncio.run(scenario(etcd))


def test_who_stands_by_takes_over_also_where_its_watch_has_fallen_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leadership, "_LOOK_S", 0.2)

    class Deafened(EtcdClient):
        deaf = False

        async def watch(self, start: bytes, end: bytes, revision: int) -> AsyncIterator[pb.WatchResponse]:
            hears = not self.deaf
            async for response in super().watch(start, end, revision):
                if hears and self.deaf:
                    await asyncio.Event().wait()
                yield response

    async def scenario(etcd: EtcdServer) -> None:
        address = EtcdAddress(tuple(etcd.clients))
        clients = EtcdClient(address), Deafened(address)
        rosters = [Roster(client) for client in clients]
        following = [asyncio.ensure_future(roster.run()) for roster in rosters]
        async with candidacy(clients[1], rosters[1], "nobody", 30.0):
            pass  # it has been told of something
        async with AsyncExitStack() as first_place:
            first = await first_place.enter_async_context(candidacy(clients[0], rosters[0], "first", 30.0))
            await first.elected()
            async with candidacy(clients[1], rosters[1], "second", 30.0) as second:
                waiting = asyncio.ensure_future(second.elected())
                while len(rosters[1].places()) < 2:  # noqa: ASYNC110 - what it is told, and nobody says when
                    await asyncio.sleep(0.01)
                clients[1].deaf = True
                await first_place.aclose()
                await waiting
        for each in following:
            each.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        for client in clients:
            await client.close()

    with running_etcd(tmp_path) as etcd:
        asyncio.run(scenario(etcd))


def test_what_trying_again_does_not_mend_ends_it(tmp_path: Path) -> None:
    async def ends(etcd: EtcdServer, **changes: Any) -> CairnError:
        settings = ControlSettings(state=tmp_path / "a", listen="127.0.0.1:0", metastore=etcd.url(), **changes)
        async with serving(settings) as (_, working):
            with pytest.raises(CairnError) as raised:
                await asyncio.wait_for(working, 60)
        return raised.value

    with running_etcd(tmp_path) as etcd:
        password = tmp_path / "password"
        password.write_text("x")
        wrong_user = {"metastore_user": "nobody", "metastore_password_file": password}
        assert isinstance(asyncio.run(ends(etcd, **wrong_user)), InvalidRequest)
        etcd.ctl("put", "/cairn/format", "another")
        assert isinstance(asyncio.run(ends(etcd)), Corrupt)


def test_several_addresses_are_one_target() -> None:
    assert control_target("a:1")[0] == "a:1"
    assert control_target("127.0.0.1:1,127.0.0.2:2")[0] == "ipv4:127.0.0.1:1,127.0.0.2:2"
    assert control_target("127.0.0.1:1,[::1]:2")[0] == "ipv6:[::ffff:127.0.0.1]:1,[::1]:2"
    for wrong in ("a:1,", "a:1,b", ""):
        with pytest.raises(InvalidRequest):
            control_target(wrong)


def test_a_host_that_nobody_knows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any, **more: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(QuorumUnavailable, match="the host of x:2 is not known"):
        control_target("x:2,y:1")


def test_none_of_several_is_active(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_control_channel("127.0.0.1:1,127.0.0.1:2") as channel:
            stub = control_pb2_grpc.ControlStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.GetVolume(control_pb2.GetVolumeRequest(volume="v"), timeout=CALL_S)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())
