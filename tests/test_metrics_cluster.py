"""The metrics of every daemon of a real cluster: they follow what happens, and the sample rules find a killed node."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from blockstore.rpc import control_pb2 as pb
from blockstore.units import MIB
from tests.cli_guest import read, write
from tests.cluster import CONTROL, FRONT_END, NODE, SNAPSHOTD, Cluster
from tests.daemons import wait_for
from tests.metrics_page import DECLARED, Page, scrape
from tests.promtool import firing_alerts, require_promtool

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(240)]
METRICS = "127.0.0.1:0"
BLOCK = b"m" * 4096


def cluster(directory: Path) -> Cluster:
    return Cluster(
        directory,
        snapshotds=1,
        control_settings=dataclasses.replace(CONTROL, metrics=METRICS),
        node_settings=dataclasses.replace(NODE, metrics=METRICS),
        front_end_settings=dataclasses.replace(FRONT_END, metrics=METRICS),
        snapshotd_settings=dataclasses.replace(SNAPSHOTD, metrics=METRICS),
    )


def pages(cluster: Cluster) -> dict[str, Page]:
    """Of all daemons that run."""
    return {daemon.name: scrape(daemon) for daemon in cluster.daemons if daemon.running}


def test_the_metrics_of_a_cluster(tmp_path: Path) -> None:
    require_promtool()
    with cluster(tmp_path) as running:
        volume = running.create(16 * MIB)
        uri = running.attach(volume)
        check_that_all_are_there(running)
        check_front_end(running, volume, uri)
        check_nodes(running)
        (snapshot,) = running.snapshot(volume)
        check_snapshotd(running)
        check_control(running, volume)
        check_hydration(running, snapshot)
        check_a_killed_node(running, tmp_path)


def check_that_all_are_there(running: Cluster) -> None:
    """Every family is on the page, and what has no labels has a sample."""
    for daemon, kind in (
        (running.control, "control"), (running.nodes[0], "node"), (running.front_ends[0], "nbd"),
        (running.snapshotds[0], "snapshotd"),
    ):  # fmt: skip
        wait_for(f"all metrics of {kind}", lambda daemon=daemon, kind=kind: not lacking(scrape(daemon), kind))  # type: ignore[misc]


def lacking(page: Page, kind: str) -> set[str]:
    """Control's first look at its catalog may take longer than a scrape waits."""
    declared = {metric.name for metric in DECLARED[kind] if not metric.labels}
    return {name for name in declared - page.names if f"{name}_count" not in page.names}


def check_front_end(running: Cluster, volume: str, uri: str) -> None:
    (front_end,) = running.front_ends
    before = scrape(front_end)
    for number in range(5):
        write(uri, number * 4096, BLOCK)
    assert read(uri, 0, 8192) == 2 * BLOCK
    after = scrape(front_end)
    grown = {
        (name, command): after.sum(name, volume=volume, command=command)
        - before.sum(name, volume=volume, command=command)
        for name in ("cairn_nbd_commands_total", "cairn_nbd_command_bytes_total")
        for command in ("read", "write")
    }
    assert grown == {
        ("cairn_nbd_commands_total", "write"): 5,
        ("cairn_nbd_command_bytes_total", "write"): 5 * 4096,
        ("cairn_nbd_commands_total", "read"): 1,
        ("cairn_nbd_command_bytes_total", "read"): 8192,
    }
    assert after.value("cairn_nbd_command_duration_seconds_count", command="write") == 5
    assert 0 < after.value("cairn_nbd_command_seconds_total", volume=volume, command="write") < 60
    assert after.value("cairn_volume_commit_seconds_count", volume=volume) >= 5
    wait_for("its lease", lambda: scrape(front_end).value("cairn_volume_served", volume=volume) == 1)
    wait_for("all members", lambda: scrape(front_end).sum("cairn_volume_member_connected", volume=volume) == 3)
    assert after.value("cairn_volume_size_bytes", volume=volume) == 16 * MIB


def check_nodes(running: Cluster) -> None:
    for node in running.nodes:
        page = wait_for("a checkpoint", lambda node=node: checkpointed(scrape(node)))  # type: ignore[misc]
        assert 0 < page.value("cairn_journal_groups_total") <= page.value("cairn_journal_sync_seconds_count")
        assert page.value("cairn_journal_written_bytes_total") >= 5 * 4096
        assert page.value("cairn_replicas", state="whole") == page.sum("cairn_replica_whole") == 1
        assert page.sum("cairn_replica_file_bytes") > page.sum("cairn_replica_free_bytes")
        assert 0 < page.value("cairn_disk_free_bytes") < page.value("cairn_disk_capacity_bytes")
        assert page.value("cairn_disk_full") == 0


def checkpointed(page: Page) -> Page | None:
    whole = page.sum("cairn_replica_user_bytes") == 5 * 4096 and page.value("cairn_checkpoint_seconds_count") > 0
    return page if whole else None


def check_snapshotd(running: Cluster) -> None:
    page = wait_for("the ship", lambda: shipped(scrape(running.snapshotds[0])))
    assert page.value("cairn_snapshotd_open") == 1
    # Five times the same block; on a machine that is too busy, by more than one attempt.
    assert page.value("cairn_ship_read_bytes_total") >= page.value("cairn_ship_changed_bytes_total") == 5 * 4096
    assert page.value("cairn_ship_deduplicated_bytes_total") >= 4 * 4096
    assert page.value("cairn_ship_stored_bytes_total") < 4096
    assert page.value("cairn_store_requests_total", operation="put", outcome="ok") >= 3
    assert page.value("cairn_store_sent_bytes_total") > 0


def shipped(page: Page) -> Page | None:
    return page if page.value("cairn_ships_completed_total") == 1 else None


def check_control(running: Cluster, volume: str) -> None:
    page = wait_for("control to see the snapshot", lambda: completed(scrape(running.control)))
    assert page.value("cairn_control_active") == 1
    assert page.value("cairn_healthy") == 1
    assert page.value("cairn_volumes", state="in-use") == page.value("cairn_volumes_by_health", health="healthy") == 1
    assert page.value("cairn_volumes_attached", serving="serving") == 1
    assert page.value("cairn_volume_replicas", state="up") == page.sum("cairn_node_up") == 3
    assert page.value("cairn_metastore_call_seconds_count", operation="transact") > 0
    assert page.sum("cairn_metastore_errors_total") == 0


def completed(page: Page) -> Page | None:
    """Also once that look at the catalog is one at a healthy cluster."""
    whole = page.sum("cairn_snapshots", state="completed") == 1 and page.sum("cairn_healthy") == 1
    return page if whole else None


def check_hydration(running: Cluster, snapshot: str) -> None:
    restored = running.create(16 * MIB, snapshot=snapshot)
    uri = running.attach(restored)
    assert read(uri, 0, 4096) == BLOCK
    page = wait_for("what was fetched", lambda: fetched(scrape(running.snapshotds[0])))
    assert page.value("cairn_frames_fetched_total") >= 1
    assert page.value("cairn_frame_bytes_total") < 4096

    def hydrated() -> bool:
        return not running.call("GetVolume", pb.GetVolumeRequest(volume=restored)).HasField("source")

    wait_for("the volume to be hydrated", hydrated)


def fetched(page: Page) -> Page | None:
    return page if page.sum("cairn_served_bytes_total") else None


def check_a_killed_node(running: Cluster, directory: Path) -> None:
    """The rules say nothing of a sound cluster, and what has to be said of one with a node down."""
    sound = wait_for("control to find it healthy", lambda: pages_if(running, nodes=3))
    wait_for_alerts(running, directory, {}, nodes=3)
    running.nodes[2].kill()
    down = wait_for("control to miss the node", lambda: pages_if(running, nodes=2))
    assert set(down) == set(sound) - {running.nodes[2].name}
    wait_for_alerts(running, directory, {"CairnNodeDown": 1, "CairnUnhealthy": 1, "CairnMemberAway": 2}, nodes=2)


def wait_for_alerts(running: Cluster, directory: Path, expected: dict[str, int], *, nodes: int) -> None:
    """Until these fire and no others: where the machine is busy, one page more may tell of it just now."""
    fired: list[Counter[str]] = []

    def as_expected() -> bool:
        if (seen := pages_if(running, nodes=nodes)) is not None:
            fired.append(firing_alerts(seen, directory))
        return bool(fired) and fired[-1] == expected

    try:
        wait_for(f"the alerts {expected}", as_expected)
    except TimeoutError as error:
        raise AssertionError(f"{error}, but {fired}") from error


def pages_if(running: Cluster, *, nodes: int) -> dict[str, Page] | None:
    """All pages, once control knows so many nodes to be up, and the front-end reaches them for both volumes."""
    seen = pages(running)
    control, front_end = seen["control"], seen[running.front_ends[0].name]
    all_up = control.sum("cairn_node_up") == nodes and control.sum("cairn_healthy") == (nodes == 3)
    return seen if all_up and front_end.sum("cairn_volume_member_connected") == 2 * nodes else None
