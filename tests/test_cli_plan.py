"""The plan of `cairn up`: what was remembered, what was asked for, what is free."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockstore.cli.plan import Wishes, free_address, make_plan
from blockstore.cli.state_directory import Plan, StateDirectory
from blockstore.config import split_address
from blockstore.errors import Conflict, InvalidRequest
from tests.loopback import own_host

HOST = own_host()
ANY = Wishes(host=HOST, control_port=0, nbd_port=0)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody listens."""
    with socket.create_server((HOST, 0)) as listening:
        yield listening.getsockname()[1]


def addresses(plan: Plan) -> list[str]:
    listening = [plan.control, plan.nbd, plan.front_end, plan.snapshotd, *(node.listen for node in plan.nodes)]
    return [*listening, *plan.metrics.values()]


def test_a_new_cluster_has_three_nodes_in_three_zones() -> None:
    plan = make_plan(None, ANY)
    assert [(node.name, node.zone) for node in plan.nodes] == [
        ("node-1", "zone-1"), ("node-2", "zone-2"), ("node-3", "zone-3")
    ]  # fmt: skip
    assert len(set(addresses(plan))) == 13
    assert list(plan.metrics) == ["control", "node-1", "node-2", "node-3", "nbd", "snapshotd"]
    assert all(split_address(each)[1] for each in addresses(plan))


def test_the_next_start_is_at_the_same_ports() -> None:
    plan = make_plan(None, ANY)
    assert make_plan(plan, Wishes(host=HOST)) == plan


def test_a_port_that_somebody_took_is_replaced(taken: int) -> None:
    plan = make_plan(None, ANY)
    remembered = Plan(plan.control, f"{HOST}:{taken}", plan.front_end, plan.nodes)
    again = make_plan(remembered, Wishes(host=HOST))
    assert again.nbd != remembered.nbd
    assert again.control == remembered.control


def test_a_port_that_was_asked_for_is_not_replaced(taken: int) -> None:
    with pytest.raises(Conflict, match=str(taken)):
        make_plan(None, Wishes(host=HOST, control_port=taken, nbd_port=0))


def test_nodes_may_be_added() -> None:
    plan = make_plan(None, ANY)
    more = make_plan(plan, Wishes(host=HOST, nodes=5, zones=("zone-1", "zone-2", "zone-3", "x", "y")))
    assert more.nodes[:3] == plan.nodes
    assert [node.zone for node in more.nodes[3:]] == ["x", "y"]
    assert [node.zone for node in make_plan(plan, Wishes(host=HOST, nodes=4)).nodes][3] == "zone-4"


def test_zones_say_how_many_nodes_there_are() -> None:
    plan = make_plan(None, Wishes(host=HOST, zones=("a", "b", "c", "d"), control_port=0, nbd_port=0))
    assert [node.zone for node in plan.nodes] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "wishes",
    [
        Wishes(host=HOST, nodes=2),
        Wishes(host=HOST, nodes=0),
        Wishes(host=HOST, nodes=-1),
        Wishes(host=HOST, nodes=1000),
        Wishes(host=HOST, nodes=4, zones=("zone-1", "zone-2")),
        Wishes(host=HOST, zones=("zone-1", "zone-2", "elsewhere")),
        Wishes(host="192.0.2.1"),
        Wishes(host=HOST, control_port=70000),
    ],
)
def test_what_is_refused_where_three_nodes_have_data(wishes: Wishes) -> None:
    with pytest.raises(InvalidRequest):
        make_plan(make_plan(None, ANY), wishes)


def test_an_address_whose_port_was_taken_meanwhile(taken: int) -> None:
    address = free_address(f"{HOST}:{taken}")
    assert address != f"{HOST}:{taken}"
    assert free_address(address) == address


def test_the_object_store_is_remembered() -> None:
    plan = make_plan(
        None, Wishes(host=HOST, control_port=0, nbd_port=0, store="s3://bucket/x", s3_endpoint="http://[::1]:9")
    )
    assert (plan.store, plan.s3_endpoint) == ("s3://bucket/x", "http://[::1]:9")
    assert make_plan(plan, Wishes(host=HOST)) == plan
    other = make_plan(plan, Wishes(host=HOST, store="elsewhere", s3_endpoint=""))
    assert (other.store, other.s3_endpoint) == (str(Path.cwd() / "elsewhere"), "")


def test_the_object_store_of_a_new_cluster_is_its_own() -> None:
    assert make_plan(None, ANY).store == ""


def test_a_plan_from_before_there_was_snapshotd(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    plan = make_plan(None, ANY)
    directory.write_plan(plan)
    document = json.loads((tmp_path / "cluster.json").read_text())
    for name in ("snapshotd", "store", "s3_endpoint"):
        del document[name]
    (tmp_path / "cluster.json").write_text(json.dumps(document))
    read = directory.read_plan()
    assert read is not None
    assert make_plan(read, Wishes(host=HOST)).nodes == plan.nodes
    assert split_address(make_plan(read, Wishes(host=HOST)).snapshotd)[1]
