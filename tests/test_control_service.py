"""Each call of the Control service, with nodes and front-ends that answer over real gRPC."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from blockstore.config import Placement
from blockstore.errors import (
    AlreadyExists,
    CairnError,
    Conflict,
    Corrupt,
    Fenced,
    InvalidRequest,
    NoSpace,
    NotFound,
    QuorumUnavailable,
)
from blockstore.rpc import control_pb2
from blockstore.rpc.replica_pb2 import Position
from blockstore.units import GIB, MAX_VOLUME_SIZE
from tests.control_cluster import Cluster, Control, MemoryNode, cluster_at, expected_replicas, until

AVAILABLE = control_pb2.VOLUME_STATE_AVAILABLE
IN_USE = control_pb2.VOLUME_STATE_IN_USE
ERROR = control_pb2.VOLUME_STATE_ERROR
CREATING = control_pb2.VOLUME_STATE_CREATING
ATTACHED = control_pb2.ATTACHMENT_STATE_ATTACHED

Scenario = Callable[[Cluster, Control], Awaitable[None]]


def run(directory: Path, scenario: Scenario, *, nodes: int = 3, front_ends: int = 1, **settings: Any) -> None:
    async def all_of_it() -> None:
        async with cluster_at(directory, nodes, front_ends) as cluster, cluster.control(**settings) as control:
            await scenario(cluster, control)

    asyncio.run(all_of_it())


# ---- creating


def test_a_new_volume_is_available_with_three_replicas_in_three_zones(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(3 * GIB, name="data", tags={"team": "db"})
        assert (volume.state, volume.size_bytes, volume.name) == (AVAILABLE, 3 * GIB, "data")
        assert volume.id.startswith("vol-")
        assert dict(volume.tags) == {"team": "db"}
        assert volume.created_at_ms > 1_600_000_000_000
        assert not volume.warnings
        members = volume.segments[0].configuration.members
        assert {member.zone for member in members} == {"zone-1", "zone-2", "zone-3"}
        assert {member.address for member in members} == {node.endpoint.address for node in cluster.nodes}
        assert cluster.held() == expected_replicas([volume])
        assert await control.get("data") == await control.get(volume.id)

    run(tmp_path, scenario)


def test_the_same_token_gives_the_same_volume_also_at_once(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        made = await asyncio.gather(*(control.create(GIB, name="v", client_token="t") for _ in range(5)))
        assert len({volume.id for volume in made}) == 1
        assert len(await control.volumes()) == 1
        assert len(cluster.held()) == 3
        with pytest.raises(Conflict, match="used for another volume"):
            await control.create(2 * GIB, name="v", client_token="t")

    run(tmp_path, scenario)


def test_a_name_is_unique_until_its_volume_is_gone(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        with pytest.raises(AlreadyExists, match="'v' is taken"):
            await control.create(name="v")
        await asyncio.gather(*(control.create() for _ in range(2)))  # Without a name as many as you like.
        assert (await control.delete("v")).deleted
        await control.create(name="v")

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size_bytes": 0}, "0 bytes"),
        ({"size_bytes": 4097}, "multiple of 4096"),
        ({"size_bytes": MAX_VOLUME_SIZE + 4096}, "multiple of 4096"),
        ({"name": "-x"}, "no name"),
        ({"name": "a/b"}, "no name"),
        ({"name": "vol-0123456789abcdef0"}, "no name"),
        ({"name": "x" * 129}, "no name"),
        ({"tags": {"": "v"}}, "tag ''"),
        ({"tags": {"k": "v" * 257}}, "tag 'k'"),
        ({"tags": {str(number): "" for number in range(51)}}, "51 tags"),
        ({"client_token": "t" * 65}, "token"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        with pytest.raises(InvalidRequest, match=message):
            await control.create(**{"size_bytes": GIB, **fields})
        assert await control.volumes() == []

    run(tmp_path, scenario)


def test_two_nodes_are_too_few(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        with pytest.raises(QuorumUnavailable, match="there are 2"):
            await control.create()

    run(tmp_path, scenario, nodes=2, lease_s=1.5)


@pytest.mark.parametrize("placement", Placement)
def test_with_too_few_zones_it_refuses_or_warns(tmp_path: Path, placement: Placement) -> None:
    async def scenario() -> None:
        async with cluster_at(tmp_path, nodes=0) as cluster:
            cluster.nodes = [MemoryNode.make(number, zone) for number, zone in ((1, "a"), (2, "a"), (3, "b"))]
            for node in cluster.nodes:
                await node.start()
            async with cluster.control(placement=placement, lease_s=1.5) as control:
                if placement is Placement.STRICT:
                    with pytest.raises(Conflict, match=r"2 zones \(a, b\)"):
                        await control.create()
                    return
                volume = await control.create()
                assert volume.state == AVAILABLE
                assert "2 zones" in volume.warnings[0]
                problems = (await control.status()).problems
                assert [(each.severity, each.subject) for each in problems] == [
                    (control_pb2.SEVERITY_WARNING, volume.id)
                ]

    asyncio.run(scenario())


def test_it_goes_on_creating_when_a_node_comes_back(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        cluster.nodes[1].refuses = NoSpace("no room")
        creating = asyncio.ensure_future(control.create())

        async def waits() -> bool:
            volumes = await control.volumes()
            return bool(volumes) and "no room" in volumes[0].reason

        await until(waits, "the reason is shown")
        assert (await control.volumes())[0].state == CREATING
        cluster.nodes[1].refuses = None
        volume = await creating
        assert (volume.state, volume.reason) == (AVAILABLE, "")

    run(tmp_path, scenario)


def test_a_replica_that_can_never_be_made_is_an_error_with_its_reason(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        cluster.nodes[0].refuses = AlreadyExists("that replica belongs to another volume")
        with pytest.raises(Conflict, match="belongs to another volume"):
            await control.create(name="v")
        volume = await control.get("v")
        assert volume.state == ERROR
        with pytest.raises(Conflict, match="in error"):
            await control.attach("v", accept_loss=True)
        cluster.nodes[0].refuses = None
        assert (await control.delete("v")).deleted
        assert cluster.held() == {}

    run(tmp_path, scenario)


def test_volumes_spread_by_free_space(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        for _ in range(4):
            await control.create(10 * GIB)
        counts = [len(node.replicas) for node in cluster.nodes]
        assert sorted(counts) == [2, 2, 2, 3, 3]

    run(tmp_path, scenario, nodes=5)


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

        async def is_down() -> bool:
            return not {each.id: each.up for each in (await control.status()).front_ends}[gone.id]

        await until(is_down, "its lease ends")
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


# ---- resizing, deleting


def test_a_volume_grows_also_while_attached_and_never_shrinks(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(GIB, name="v")

        async def resize(size_bytes: int) -> control_pb2.Volume:
            request = control_pb2.ResizeVolumeRequest(volume="v", size_bytes=size_bytes)
            resized: control_pb2.Volume = await control.call("ResizeVolume", request)
            return resized

        assert (await resize(2 * GIB)).segments[0].size_bytes == 2 * GIB
        await control.attach("v")
        assert (await resize(3 * GIB)).size_bytes == 3 * GIB
        assert cluster.front_ends[0].volumes[volume.id].size_bytes == 3 * GIB
        with pytest.raises(InvalidRequest, match="only grow"):
            await resize(GIB)
        with pytest.raises(InvalidRequest, match="multiple"):
            await resize(3 * GIB + 1)

    run(tmp_path, scenario)


def test_delete_waits_for_detach_and_leaves_nothing(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        await control.attach("v")
        with pytest.raises(Conflict, match="detach it first"):
            await control.delete("v")
        await control.detach("v")
        assert (await control.delete("v")).deleted
        assert cluster.held() == {}
        with pytest.raises(NotFound, match="no volume 'v'"):
            await control.get("v")

    run(tmp_path, scenario)


def test_a_node_that_was_away_deletes_its_replica_when_it_comes_back(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        away = cluster.nodes[2]
        await away.stop()

        async def is_down() -> bool:
            request = control_pb2.GetNodeRequest(node=away.id)
            return not (await control.call("GetNode", request)).up

        await until(is_down, "its lease ends")
        assert (await control.delete("v")).deleted
        assert set(cluster.held().values()) == {away.id}
        cluster.nodes[2] = back = await away.restart()

        async def is_empty() -> bool:
            return not back.replicas

        await until(is_empty, "its replica is deleted")

    run(tmp_path, scenario, lease_s=2.0)


def test_deleting_goes_on_in_the_background_where_a_node_fails(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        cluster.nodes[0].refuses = QuorumUnavailable("busy")
        answer = await control.delete("v")
        assert not answer.deleted
        assert (await control.get("v")).state == control_pb2.VOLUME_STATE_DELETING
        with pytest.raises(Conflict, match="being deleted"):
            await control.attach("v")
        cluster.nodes[0].refuses = None

        async def is_gone() -> bool:
            return not await control.volumes()

        await until(is_gone, "the volume is gone")
        assert cluster.held() == {}

    run(tmp_path, scenario)


# ---- nodes


def test_nodes_are_listed_and_removed_when_empty_and_down(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        listed = (await control.call("ListNodes", control_pb2.ListNodesRequest())).nodes
        assert [(node.zone, node.up, node.replicas) for node in listed] == [
            ("zone-1", True, 1),
            ("zone-2", True, 1),
            ("zone-3", True, 1),
        ]
        request = control_pb2.RemoveNodeRequest(node=cluster.nodes[0].id)
        with pytest.raises(Conflict, match="stop it first"):
            await control.call("RemoveNode", request)
        await cluster.nodes[0].stop()

        async def is_down() -> bool:
            return not (await control.call("GetNode", control_pb2.GetNodeRequest(node=request.node))).up

        await until(is_down, "its lease ends")
        with pytest.raises(Conflict, match="holds replicas"):
            await control.call("RemoveNode", request)
        await control.delete("v")
        await control.call("RemoveNode", request)
        with pytest.raises(NotFound):
            await control.call("RemoveNode", request)

    run(tmp_path, scenario, lease_s=2.0)


@pytest.mark.parametrize(
    "fields", [{"node": "node-1"}, {"node": "vol-00000000000000001"}, {"address": "here"}, {"zone": ""}]
)
def test_a_node_that_says_nonsense_is_refused(tmp_path: Path, fields: dict[str, str]) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        request = control_pb2.RegisterNodeRequest(node="node-00000000000000001", address="127.0.0.1:1", zone="a")
        for name, value in fields.items():
            setattr(request, name, value)
        with pytest.raises(InvalidRequest):
            await control.call("RegisterNode", request)

    run(tmp_path, scenario, nodes=0, front_ends=0)


def test_whoever_is_unknown_is_told_to_register(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        node = control_pb2.NodeHeartbeatRequest(node="node-00000000000000001", address="127.0.0.1:1")
        with pytest.raises(NotFound):
            await control.call("NodeHeartbeat", node)
        front_end = control_pb2.FrontEndHeartbeatRequest(front_end="fe-00000000000000001", address="127.0.0.1:1")
        with pytest.raises(NotFound):
            await control.call("FrontEndHeartbeat", front_end)

    run(tmp_path, scenario, nodes=0, front_ends=0)


# ---- positions (design, section 3, rule 10)


def test_what_a_replica_acked_is_remembered_and_told_to_the_node_and_the_front_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster_at(tmp_path) as cluster:
            front_end, node = cluster.front_ends[0], cluster.nodes[0]
            async with cluster.control() as control:
                volume = await control.create(name="v")
                await control.attach("v")
                (replica,) = node.replicas
                report = control_pb2.VolumeReport(
                    volume=volume.id, epoch=1, state=control_pb2.SERVING_STATE_SERVING, size_bytes=GIB
                )
                report.members.add(replica=replica, connected=True, whole=True).matched.CopyFrom(
                    Position(epoch=1, sequence=700)
                )
                front_end.says[volume.id] = report

                async def is_known() -> bool:
                    members = (await control.get("v")).segments[0].configuration.members
                    known = {member.replica: member.known.sequence for member in members}
                    return known[replica] == 700 and await is_saved(control)

                async def is_saved(control: Control) -> bool:
                    return any(b'"sequence":700' in each.value for each in (await control.store.list("known/")).items)

                await until(is_known, "the position is kept")
                # Where a filling replica stands, or one of an epoch to come, is no ack.
                for whole, epoch in ((False, 1), (True, 9)):
                    report.members[0].whole = whole
                    report.members[0].matched.CopyFrom(Position(epoch=epoch, sequence=900))
                    beat = control_pb2.FrontEndHeartbeatRequest(
                        front_end=front_end.id,
                        instance=front_end.instance,
                        address=front_end.endpoint.address,
                        volumes=[report],
                    )
                    await control.call("FrontEndHeartbeat", beat)
                members = (await control.get("v")).segments[0].configuration.members
                assert max(member.known.sequence for member in members) == 700
            front_end.says.clear()
            async with cluster.control() as control:  # A control that was killed knows it still.
                assert node.known[replica] == (1, 700)  # Told at registration.
                node.known.clear()

                async def is_told() -> bool:
                    return node.known.get(replica) == (1, 700)

                await until(is_told, "a whole replica that ends lower is told in answer to its heartbeat")
                node.replicas[replica].end.CopyFrom(Position(epoch=1, sequence=700))
                renewal = control_pb2.RenewAttachmentRequest(
                    volume=volume.id, front_end=front_end.id, instance=front_end.instance
                )
                ticket: control_pb2.OpenTicket = await control.call("RenewAttachment", renewal)
                known = {each.replica: each.known.sequence for each in ticket.segments[0].configuration.members}
                assert known[replica] == 700

    asyncio.run(scenario())
