"""A machine boots from a volume, and its database goes on without a node, a front-end, and after a power cut."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockstore.units import KIB, MIB
from tests.cluster import Cluster
from tests.daemons import wait_for
from tests.linux_host import boot_disk, database
from tests.linux_host.guest import require_kernel, script
from tests.linux_host.initramfs import Initramfs
from tests.linux_host.kernel import Kernel, Series
from tests.linux_host.machine import Machine
from tests.loopback import own_host
from tests.programs import require_programs

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(1000)]

SIZE = 256 * MIB
#: Of each boot; a quiet machine takes a tenth of it.
LIMIT_S = 300
#: So many transactions more are committed after each event.
MORE = 10
#: So slow that a restored volume has most of its blocks elsewhere while a machine boots from it.
SLOW = 64 * KIB


def make_disk(directory: Path, kernel: Kernel) -> Path:
    """A disk with PostgreSQL and a database."""
    root = Initramfs()
    for path in ("dev", "proc", "sys", "tmp", "bin"):
        root.directory(path)
    for name in ("busybox", "bash"):
        root.add_program(name)
    database.add_programs(root)
    root.add("sbin/init", script("init").encode(), executable=True)
    root.add("work", script("booted", PROGRAMS=str(database.PROGRAMS)).encode())
    place = directory / "root"
    root.write(place)
    database.make_database(place / "database")
    return boot_disk.make_boot_disk(directory, kernel, place, SIZE)


def copy_image(image: Path, uri: str) -> None:
    """To a new volume; holes stay holes."""
    options = ["-n", "--target-is-zero", "-f", "raw", "-O", "raw"]
    subprocess.run(["qemu-img", "convert", *options, str(image), uri], check=True, timeout=LIMIT_S)


@dataclass(frozen=True)
class State:
    """What a machine said is on its disk: transactions that are committed, files that are synced."""

    transactions: int
    files: int


def state_of(machine: Machine) -> State:
    committed, synced = (machine.said(pattern) for pattern in (r"COMMITTED (\d+)\n", r"SYNCED (\d+)\n"))
    return State(int(committed[-1]) if committed else 0, len(synced))


def goes_on(machine: Machine) -> State:
    """Waits for more transactions and another file."""
    before = state_of(machine)

    def more() -> bool:
        now = state_of(machine)
        return now.transactions >= before.transactions + MORE and now.files > before.files

    machine.wait_until(f"more than {before}", more)
    return state_of(machine)


def check(machine: Machine, least: State) -> None:
    """That is there, and all else is right, after the recovery and again after more work."""
    machine.wait_for("READY")
    machine.tell("check")
    result = machine.end()
    print(result)
    assert result.status == 0, str(result)
    assert [each in result.output for each in ("FSCK CLEAN", "RECOVERED", "\nCLEAN")] == [True] * 3, str(result)
    balanced = [int(each) for each in machine.said(r"(?<!NOT )BALANCED\|(\d+)\n")]
    assert len(balanced) == 2, str(result)
    assert least.transactions <= balanced[0] < balanced[1], str(result)
    assert int(machine.said(r"LISTED (\d+)")[0]) >= least.files, str(result)


class ComingBack(Cluster):
    """Its front-end, too, comes back to a port that nobody else was given meanwhile."""

    def _listen(self, name: str) -> str:
        return f"{own_host()}:0"


def restart_front_end(cluster: Cluster) -> None:
    """Killed, and started again at the same port, where its clients look for it."""
    (front_end,) = cluster.front_ends
    address = front_end.read_address("nbd_address")
    front_end.command[front_end.command.index("--nbd-listen") + 1] = address
    front_end.kill()
    cluster.start(front_end)


def has_export(uri: str) -> bool:
    """Asked there, as the machine will; what control says of a front-end may be of the process before."""
    return not subprocess.run(["qemu-img", "info", uri], capture_output=True, check=False).returncode


def load(cluster: Cluster, machine: Machine, volume: str) -> tuple[str, State]:
    """A node is killed and comes back, the front-end too, another node does not; a snapshot, and what it must have."""
    machine.wait_for("READY")
    machine.tell("load")
    goes_on(machine)
    cluster.nodes[0].kill()
    goes_on(machine)
    cluster.start(cluster.nodes[0])
    cluster.wait_whole(volume, LIMIT_S)
    restart_front_end(cluster)
    state = goes_on(machine)
    (snapshot,) = cluster.snapshot(volume, wait=False)
    cluster.nodes[1].kill()
    goes_on(machine)
    return snapshot, state


def test_a_machine_boots_and_its_database_outlives_nodes_front_ends_and_power_cuts(tmp_path: Path) -> None:
    require_programs(*boot_disk.NEEDED, *database.NEEDED, "qemu-img")
    (tmp_path / "disk").mkdir()
    image = make_disk(tmp_path / "disk", require_kernel(Series.LINUX_6_12))
    with ComingBack(tmp_path, snapshotds=1) as cluster:
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        copy_image(image, uri)
        with Machine(boot_disk.options(uri), tmp_path / "first", LIMIT_S) as machine:
            snapshot, in_snapshot = load(cluster, machine, volume)
            cluster.front_ends[0].kill()
            machine.kill()
            acknowledged = state_of(machine)
        cluster.start(cluster.front_ends[0])
        uri = cluster.uri(volume)
        wait_for("it to be served", lambda: has_export(uri), LIMIT_S)
        with Machine(boot_disk.options(uri), tmp_path / "second", LIMIT_S) as machine:
            check(machine, acknowledged)

        cluster.start(cluster.nodes[1])
        cluster.wait_whole(volume, LIMIT_S)
        cluster.wait_completed(snapshot, LIMIT_S)
        restored = cluster.restore(snapshot, SLOW)
        with Machine(boot_disk.options(cluster.attach(restored)), tmp_path / "third", LIMIT_S) as machine:
            check(machine, in_snapshot)
            assert cluster.volume(restored).HasField("source"), "it was hydrated before all was checked"
