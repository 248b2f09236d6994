"""A snapshotd that is down, that never registered, or that is gone for good: what the status says, and `forget`."""

from pathlib import Path

import pytest

from blockstore.errors import Conflict, NotFound
from blockstore.rpc import control_pb2, snapshot_pb2
from tests.control_cluster import LEASE_S, Cluster, Control, cluster_at, control_at, until
from tests.control_store import MemoryDaemon
from tests.patient_time import run_patiently

DAEMON = "sd-00000000000000009"
WHY = "s3://bucket/x does not answer"


async def words_of(control: Control, subject: str) -> str:
    """What the status says of it; empty where it says nothing."""
    return "; ".join(each.message for each in (await control.status()).problems if each.subject == subject)


async def starting(control: Control, why: str = "") -> None:
    """What a snapshotd says while it has no repository."""
    request = snapshot_pb2.RegisterDaemonRequest(daemon=DAEMON, instance="i", store="s3://bucket/x", why=why)
    await control.call("RegisterDaemon", request)


async def forget(control: Control, daemon: str) -> None:
    await control.call("ForgetDaemon", snapshot_pb2.ForgetDaemonRequest(daemon=daemon))


async def known(control: Control) -> list[str]:
    return [each.id for each in (await control.call("GetStore", snapshot_pb2.GetStoreRequest())).daemons]


def test_one_that_was_started_and_never_registers_is_a_problem_until_it_does(tmp_path: Path) -> None:
    async def check() -> None:
        async with control_at(tmp_path, lease_s=2.0) as control:
            await starting(control)
            assert await words_of(control, DAEMON) == "", "it has just been started"
            await starting(control, WHY)
            await starting(control)

            async def is_told() -> str:
                return await words_of(control, DAEMON)

            told = await until(is_told, "a problem")
            assert "not registered" in told
            assert WHY in told, "a later start that has no reason yet takes none back"
            assert f"cairn store forget {DAEMON}" in told
            (problem,) = (await control.status()).problems
            assert problem.severity == control_pb2.SEVERITY_WARNING
            daemon = MemoryDaemon(9)
            await daemon.endpoint.start()
            await daemon.register(control.stub)
            assert await words_of(control, DAEMON) == ""
            await daemon.stop()

    run_patiently(check())


def test_one_that_never_registers_can_be_forgotten(tmp_path: Path) -> None:
    async def check() -> None:
        async with control_at(tmp_path, lease_s=0.2) as control:
            await starting(control, WHY)

            async def is_told() -> str:
                return await words_of(control, DAEMON)

            await until(is_told, "a problem")
            await forget(control, DAEMON)
            assert await words_of(control, DAEMON) == ""
            with pytest.raises(NotFound, match="store show"):
                await forget(control, DAEMON)

    run_patiently(check())


def test_one_that_is_gone_is_told_with_what_to_do_and_forgotten_once_it_is_down(tmp_path: Path) -> None:
    async def check() -> None:
        async with cluster_at(tmp_path, nodes=1, daemons=2) as cluster, cluster.control() as control:
            gone, stays = cluster.daemons
            with pytest.raises(Conflict, match="stop it first"):
                await forget(control, gone.id)
            await gone.fall_silent()

            async def is_told() -> str:
                return await words_of(control, gone.id)

            told = await until(is_told, "a problem")
            assert "last heard" in told
            assert f"`cairn store forget {gone.id}` where it is gone for good" in told
            await forget(control, gone.id)
            assert await known(control) == [stays.id]
            assert await words_of(control, gone.id) == ""
            await _comes_back(cluster, control, gone)

    run_patiently(check())


def test_one_that_is_up_and_cannot_write_is_a_problem_until_it_can(tmp_path: Path) -> None:
    async def check() -> None:
        async with cluster_at(tmp_path, nodes=1, daemons=1) as cluster, cluster.control() as control:
            (daemon,) = cluster.daemons
            daemon.why = "the repository belongs to the cluster x"

            async def is_told() -> bool:
                return "writes nothing to the object store: the repository" in await words_of(control, daemon.id)

            async def is_well() -> bool:
                return not await words_of(control, daemon.id)

            await until(is_told, "a problem")
            daemon.why = ""
            await until(is_well, "no problem")

    run_patiently(check())


async def _comes_back(cluster: Cluster, control: Control, daemon: MemoryDaemon) -> None:
    """It was not gone for good: it registers again."""
    cluster.daemons[0] = await daemon.restart()

    async def is_known() -> bool:
        return daemon.id in await known(control)

    await until(is_known, "it is back")


def test_right_after_a_start_of_control_nobody_is_forgotten_who_may_be_up(tmp_path: Path) -> None:
    async def check() -> None:
        async with control_at(tmp_path) as control:
            daemon = MemoryDaemon(9)
            await daemon.endpoint.start()
            await daemon.register(control.stub)
            await daemon.stop()
        async with control_at(tmp_path, lease_s=LEASE_S) as control:
            with pytest.raises(Conflict, match="stop it first"):
                await forget(control, DAEMON)
            assert await known(control) == [DAEMON]

    run_patiently(check())
