"""Volumes attached and detached by control: who serves them, with which epoch, and what ends that."""

import asyncio
from pathlib import Path

import pytest

from blockstore.control import reasons
from blockstore.errors import CairnError, Conflict, Corrupt, Fenced, QuorumUnavailable
from blockstore.rpc import control_pb2
from blockstore.units import GIB
from tests.control_cluster import Cluster, Control, cluster_at, control_at, until
from tests.control_scenario import run, until_down
from tests.patient_time import run_patiently

AVAILABLE = control_pb2.VOLUME_STATE_AVAILABLE
IN_USE = control_pb2.VOLUME_STATE_IN_USE
ERROR = control_pb2.VOLUME_STATE_ERROR
ATTACHED = control_pb2.ATTACHMENT_STATE_ATTACHED
DETACHING = control_pb2.ATTACHMENT_STATE_DETACHING

# ---- attaching


def test_attach_opens_the_volume_with_all_it_takes(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(2 * GIB, name="v", tags={"k": "v"})
        volume = await control.attach("v", read_only=True)
        assert volume.state == IN_USE
        assert (volume.attachment.state, volume.attachment.epoch) == (ATTACHED, 1)
        assert list(volume.attachment.uris) == ["nbd://127.0.0.1:10809/v"]
        ticket = cluster.front_ends[0].volumes[volume.id].ticket
        assert (ticket.name, ticket.size_bytes, ticket.epoch, ticket.read_only) == ("v", 2 * GIB, 1, True)
        assert dict(ticket.tags) == {"k": "v"}
        assert len(ticket.segments[0].configuration.members) == 3
        assert not ticket.accept_loss

    run(tmp_path, scenario)


def test_attaching_again_changes_nothing_unless_forced(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        first = await control.attach("v")
        assert await control.attach("v") == first
        assert await control.attach("v", front_end=cluster.front_ends[0].id) == first
        with pytest.raises(Conflict, match="attached for writing already"):
            await control.attach("v", read_only=True)
        forced = await control.attach("v", force=True)
        assert (forced.epoch, cluster.front_ends[0].volumes[first.id].epoch) == (2, 2)

    run(tmp_path, scenario)


def test_attaching_again_asks_the_front_end_that_has_it(tmp_path: Path) -> None:
    """It may have died a moment ago: then nothing answers at the URI that a success would name."""

    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        await control.attach("v")
        await cluster.front_ends[0].stop()
        with pytest.raises(QuorumUnavailable, match=cluster.front_ends[0].id):
            await control.attach("v")

    run(tmp_path, scenario, lease_s=30.0)


def test_another_front_end_takes_a_volume_over_only_by_force(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        one, other = cluster.front_ends
        volume = await control.create(name="v")
        await control.attach("v", front_end=one.id)
        with pytest.raises(Conflict, match="--force"):
            await control.attach("v", front_end=other.id)
        taken = await control.attach("v", front_end=other.id, force=True)
        assert (taken.attachment.front_end, taken.epoch) == (other.id, 2)
        assert other.volumes[volume.id].epoch == 2

        async def given_up() -> bool:
            return not one.volumes

        await until(given_up, "the other one hears of it")

    run(tmp_path, scenario, front_ends=2)


def test_without_a_name_the_front_end_with_the_fewest_volumes_gets_it(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        for _ in range(4):
            await control.attach((await control.create()).id)
        assert [len(each.volumes) for each in cluster.front_ends] == [2, 2]

    run(tmp_path, scenario, front_ends=2)


def test_what_cannot_be_opened_is_available_again(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        cluster.front_ends[0].outcome = QuorumUnavailable("one member answers")
        with pytest.raises(QuorumUnavailable, match="one member answers"):
            await control.attach("v")
        volume = await control.get("v")
        assert volume.state == AVAILABLE
        assert "one member answers" in volume.reason
        cluster.front_ends[0].outcome = None
        again = await control.attach("v")
        assert (again.epoch, again.reason) == (2, "")

    run(tmp_path, scenario)


def test_lost_records_are_an_error_that_only_accepting_the_loss_ends(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        front_end = cluster.front_ends[0]
        await control.create(name="v")
        front_end.outcome = Corrupt("records above (1, 7) may be missing")
        with pytest.raises(Corrupt, match="above"):
            await control.attach("v")
        volume = await control.get("v")
        assert (volume.state, volume.reason) == (ERROR, "records above (1, 7) may be missing")
        front_end.outcome = None
        with pytest.raises(Conflict, match="--accept-loss"):
            await control.attach("v")
        recovered = await control.attach("v", accept_loss=True)
        assert (recovered.state, recovered.reason) == (IN_USE, "")
        assert front_end.volumes[volume.id].ticket.accept_loss
        cluster.front_ends[0] = front_end = await front_end.restart()

        async def renewed() -> bool:
            return volume.id in front_end.volumes

        await until(renewed, "it is open again")
        assert not front_end.volumes[volume.id].ticket.accept_loss

    run(tmp_path, scenario)


def test_a_front_end_may_find_out_later_that_records_are_lost(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        front_end = cluster.front_ends[0]
        volume = await control.create(name="v")
        await control.attach("v")
        front_end.says[volume.id] = control_pb2.VolumeReport(
            volume=volume.id, epoch=1, state=control_pb2.SERVING_STATE_LOST, why="two disks are gone"
        )

        async def in_error() -> bool:
            now = await control.get("v")
            return now.state == ERROR and now.reason == "two disks are gone" and not now.HasField("attachment")

        await until(in_error, "the volume is in error")

    run(tmp_path, scenario)


def test_a_front_end_that_starts_anew_gets_its_volumes_with_a_new_epoch(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(name="v")
        await control.attach("v")
        old = cluster.front_ends[0]
        cluster.front_ends[0] = new = await old.restart()

        async def open_again() -> bool:
            return volume.id in new.volumes

        await until(open_again, "the new process has it")
        now = await control.get("v")
        assert (now.epoch, now.attachment.state, new.volumes[volume.id].epoch) == (2, ATTACHED, 2)
        renewal = control_pb2.RenewAttachmentRequest(volume=volume.id, front_end=old.id, instance=old.instance)
        with pytest.raises(Fenced, match="another process"):
            await control.call("RenewAttachment", renewal)
        beat = control_pb2.FrontEndHeartbeatRequest(front_end=old.id, instance=old.instance, address="127.0.0.1:1")
        with pytest.raises(Fenced, match="another process"):
            await control.call("FrontEndHeartbeat", beat)

    run(tmp_path, scenario)


def test_a_front_end_that_starts_anew_while_attaching_is_asked_again(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(name="v")
        old = cluster.front_ends[0]
        old.may_open.clear()
        attaching = asyncio.ensure_future(control.attach("v"))
        await old.opening.wait()
        renewal = control_pb2.RenewAttachmentRequest(volume=volume.id, front_end=old.id, instance=old.instance)
        with pytest.raises(Fenced):  # While it is being attached the attempts are control's.
            await control.call("RenewAttachment", renewal)
        cluster.front_ends[0] = new = await old.restart()
        with pytest.raises(CairnError):
            await attaching

        async def settled() -> bool:
            return (await control.get("v")).state == AVAILABLE

        await until(settled, "it is available again")
        await control.attach("v")
        assert new.volumes[volume.id].epoch == (await control.get("v")).epoch

    run(tmp_path, scenario)


def test_every_attempt_has_an_epoch_of_its_own(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        front_end = cluster.front_ends[0]
        volume = await control.create(name="v")
        await control.attach("v")
        renewal = control_pb2.RenewAttachmentRequest(
            volume=volume.id, front_end=front_end.id, instance=front_end.instance
        )
        tickets = await asyncio.gather(*(control.call("RenewAttachment", renewal) for _ in range(8)))
        assert sorted(ticket.epoch for ticket in tickets) == list(range(2, 10))

        def current(epoch: int) -> control_pb2.GetAttachmentRequest:
            return control_pb2.GetAttachmentRequest(volume=volume.id, front_end=front_end.id, epoch=epoch)

        assert (await control.call("GetAttachment", current(9))).epoch == 9
        with pytest.raises(Fenced):
            await control.call("GetAttachment", current(8))
        unknown = control_pb2.RenewAttachmentRequest(
            volume="vol-00000000000000000", front_end=front_end.id, instance=front_end.instance
        )
        with pytest.raises(Fenced):
            await control.call("RenewAttachment", unknown)

    run(tmp_path, scenario)


def test_a_ticket_names_the_addresses_of_now(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        front_end = cluster.front_ends[0]
        volume = await control.create(name="v")
        await control.attach("v")
        cluster.nodes[0] = moved = await cluster.nodes[0].restart()
        request = control_pb2.GetAttachmentRequest(volume=volume.id, front_end=front_end.id, epoch=1)

        async def at_new_address() -> bool:
            ticket: control_pb2.OpenTicket = await control.call("GetAttachment", request)
            addresses = {member.node: member.address for member in ticket.segments[0].configuration.members}
            return addresses[moved.id] == moved.endpoint.address

        await until(at_new_address, "the ticket has the new address")

    run(tmp_path, scenario)


# ---- detaching


def test_detach_closes_and_is_idempotent(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        await control.attach("v")
        volume = await control.detach("v")
        assert volume.state == AVAILABLE
        assert not volume.HasField("attachment")
        assert cluster.front_ends[0].volumes == {}
        assert await control.detach("v") == volume

    run(tmp_path, scenario)


def test_a_front_end_that_is_gone_is_detached_by_force_and_fenced_by_epoch(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        gone, other = cluster.front_ends
        await control.create(name="v")
        await control.attach("v", front_end=gone.id)
        await gone.stop()
        await until_down(control, gone.id)
        with pytest.raises(QuorumUnavailable, match="--force"):
            await control.detach("v")
        assert (await control.detach("v", force=True)).state == AVAILABLE
        assert (await control.attach("v", front_end=other.id)).epoch == 2

    run(tmp_path, scenario, front_ends=2, lease_s=2.0)


def test_detaching_goes_on_when_the_front_end_comes_back(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        await control.attach("v")
        await cluster.front_ends[0].stop()
        with pytest.raises(QuorumUnavailable):
            await control.detach("v")
        cluster.front_ends[0] = await cluster.front_ends[0].restart()

        async def is_available() -> bool:
            return (await control.get("v")).state == AVAILABLE

        await until(is_available, "the new process says that it has it not")
        assert cluster.front_ends[0].volumes == {}

    run(tmp_path, scenario)


def test_a_front_end_that_a_new_control_has_not_heard_yet_is_not_down(tmp_path: Path) -> None:
    async def check() -> None:
        async with cluster_at(tmp_path) as cluster:
            async with cluster.control() as control:
                await control.create(name="v")
                await control.attach("v")
            async with control_at(cluster.directory, lease_s=60.0) as control:
                detaching = asyncio.ensure_future(control.detach("v"))
                await until(lambda: is_detaching(control), "it has begun")
                cluster.front_ends[0].control = control.address
                assert (await detaching).state == AVAILABLE
            assert cluster.front_ends[0].volumes == {}

    async def is_detaching(control: Control) -> bool:
        return (await control.get("v")).attachment.state == DETACHING

    run_patiently(check())


def test_a_detach_that_waits_for_clients_is_answered_and_goes_on(tmp_path: Path) -> None:
    async def check() -> None:
        async with cluster_at(tmp_path) as cluster:
            async with cluster.control() as control:
                await control.create(name="v")
                await control.attach("v")
            async with cluster.control(call_timeout_s=0.5) as control:  # too short for anything else on a slow machine
                await scenario(cluster, control)

    async def scenario(cluster: Cluster, control: Control) -> None:
        [front_end] = cluster.front_ends
        front_end.may_close.clear()
        answer = await control.detach("v")
        assert (answer.state, answer.attachment.state) == (IN_USE, DETACHING)

        async def clients() -> bool:
            health = await control.call("GetVolumeHealth", control_pb2.GetVolumeRequest(volume="v"))
            return bool(health.clients == 2 and health.serving == "serving")

        await until(clients, "it is known whom it waits for")
        front_end.may_close.set()

        async def detached() -> bool:
            return (await control.get("v")).state == AVAILABLE

        await until(detached, "it is detached by itself")

    run_patiently(check())


def test_why_an_attach_failed_is_told_while_something_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "WELL_FOR_S", 0.5)

    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        [held] = cluster.nodes[0].replicas.values()
        held.damage = "a row fails its check"

        async def damaged() -> bool:
            return any(each.state == "damaged" for each in (await control.status()).volumes[0].replicas)

        await until(damaged, "control knows")
        cluster.front_ends[0].outcome = QuorumUnavailable("two nodes are away")
        with pytest.raises(QuorumUnavailable, match="two nodes are away"):
            await control.attach("v")
        assert "the last attach failed: " in (await control.get("v")).reason
        loop = asyncio.get_running_loop()
        wrong_until = loop.time() + 1.2

        async def still_told() -> bool:
            assert (await control.get("v")).reason
            return loop.time() > wrong_until

        await until(still_told, "it was told all the time")
        held.damage = ""

        async def forgotten() -> bool:
            return not (await control.get("v")).reason

        await until(forgotten, "all has been well for long")

    run(tmp_path, scenario)
