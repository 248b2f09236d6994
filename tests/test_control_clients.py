"""A volume that is attached for one client, as `cairn attach` does: nobody else takes it, and it moves for that one."""

from pathlib import Path

import pytest

from blockstore.errors import Conflict, InvalidRequest, QuorumUnavailable
from tests.control_cluster import Cluster, Control, until
from tests.control_scenario import run, until_down


def test_nobody_else_takes_it_without_force(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        mine = await control.attach("v", client="host-1")
        assert mine.attachment.client == "host-1"
        assert cluster.front_ends[0].volumes[mine.id].ticket.client == "host-1"
        assert await control.attach("v", client="host-1") == mine
        for other in ("host-2", ""):
            with pytest.raises(Conflict, match="attached for client host-1"):
                await control.attach("v", client=other)
        taken = await control.attach("v", client="host-2", force=True)
        assert (taken.attachment.client, taken.epoch) == ("host-2", mine.epoch + 1)
        with pytest.raises(Conflict, match="attached for client host-2"):
            await control.attach("v", client="host-1")
        assert (await control.get("v")).attachment.client == "host-2"

    run(tmp_path, scenario)


def test_one_that_anybody_may_use_is_not_taken_either(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        await control.attach("v")
        with pytest.raises(Conflict, match="attached for any NBD client"):
            await control.attach("v", client="host-1")

    run(tmp_path, scenario)


def test_its_own_client_moves_it_from_a_front_end_that_is_down(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        first = await control.attach("v", client="host-1")
        holder, other = sorted(cluster.front_ends, key=lambda each: each.id != first.attachment.front_end)
        assert (await control.attach("v", client="host-1")).epoch == first.epoch, "it is not moved while that is up"
        await holder.stop()
        await until_down(control, holder.id)
        with pytest.raises(QuorumUnavailable):
            await control.attach("v")
        moved = await control.attach("v", client="host-1")
        assert (moved.attachment.front_end, moved.attachment.client) == (other.id, "host-1")
        assert moved.epoch == first.epoch + 1
        with pytest.raises(Conflict, match="attached for client host-1"):
            await control.attach("v", client="host-2")

    run(tmp_path, scenario, front_ends=2, lease_s=1.0)


def test_a_front_end_that_the_client_cannot_reach_is_avoided(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        first = await control.attach("v", client="host-1")
        moved = await control.attach("v", client="host-1", avoid=first.attachment.front_end)
        assert moved.attachment.front_end != first.attachment.front_end
        with pytest.raises(InvalidRequest, match="no name for a client"):
            await control.attach("v", client="a b")

    run(tmp_path, scenario, front_ends=2)


def test_the_client_stays_through_a_restart_of_its_front_end(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(name="v")
        await control.attach("v", client="host-1")
        cluster.front_ends[0] = front_end = await cluster.front_ends[0].restart()

        async def open_again() -> bool:
            return volume.id in front_end.volumes

        await until(open_again, "its front-end has taken a new epoch for it")
        assert front_end.volumes[volume.id].ticket.client == "host-1"
        renewed = await control.attach("v", client="host-1")
        assert renewed.attachment.client == "host-1"
        assert renewed.id == volume.id

    run(tmp_path, scenario)
