"""What is told of a host's NBD devices, over a tree that looks like the kernel's."""

from dataclasses import replace
from pathlib import Path

import pytest

from blockstore.errors import Conflict, InvalidRequest
from nbd_server.kernel.devices import Host, Owner, Traffic, device_index, is_device_name

OWNER = Owner("vol-00000000000000001", "host-1")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three devices: nbd0 is ours, nbd1 is not connected, nbd2 is somebody else's."""
    for index in range(3):
        write(tmp_path, f"sys/block/nbd{index}/size", "2048")
        write(tmp_path, f"sys/block/nbd{index}/ro", "0")
        write(tmp_path, f"sys/block/nbd{index}/dev", f"43:{index * 32}")
    for index in (0, 2):
        write(tmp_path, f"sys/block/nbd{index}/pid", "77")
    write(tmp_path, "sys/block/nbd0/backend", OWNER.backend)
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_names_of_devices() -> None:
    assert (device_index("/dev/nbd12"), device_index("nbd0")) == (12, 0)
    assert not is_device_name("/dev/nbd0p1")
    for wrong in ("/dev/sda", "nbd", "/dev/nbd-1", ""):
        with pytest.raises(InvalidRequest, match="no NBD device"):
            device_index(wrong)


def test_devices_and_whose_they_are(root: Path) -> None:
    ours, other = Host(root).devices()
    assert (ours.path, ours.owner, ours.size_bytes, ours.read_only) == ("/dev/nbd0", OWNER, 1 << 20, False)
    assert (other.index, other.owner) == (2, None)
    host = Host(root)
    assert (host.owner(0), host.owner(1), host.find(1)) == (OWNER, None, None)
    for text in ("cairn:vol-1:host:more", "cairn:vol-1:host:0", "cairn:vol-1:host:2:2"):
        write(root, "sys/block/nbd0/backend", text)
        assert host.owner(0) is None


@pytest.mark.parametrize("connections", [1, 2, 16])
def test_how_many_links_a_device_has_is_kept_by_the_kernel(root: Path, connections: int) -> None:
    write(root, "sys/block/nbd0/backend", replace(OWNER, connections=connections).backend)
    owner = Host(root).owner(0)
    assert owner == OWNER
    assert owner is not None
    assert owner.connections == connections


def test_who_has_it(root: Path) -> None:
    mounts = ("22 1 43:0 / /mnt/a\\040b rw - ext4 /dev/nbd0 rw", "23 1 43:99 / /x rw - tmpfs none rw")
    write(root, "proc/self/mountinfo", "\n".join(mounts))
    write(root, "proc/swaps", "Filename\tType\n/dev/nbd2 partition 1 0 -2")
    write(root, "sys/block/nbd0/nbd0p1/dev", "43:1")
    (root / "sys/block/nbd0/nbd0p1/holders/dm-0").mkdir(parents=True)
    ours, other = Host(root).devices()
    assert ours.used_by == ("mounted at /mnt/a b", "held by dm-0")
    assert other.used_by == ("swap",)


def test_requests(root: Path) -> None:
    write(root, "sys/block/nbd0/inflight", "       1        2")
    write(root, "sys/block/nbd0/stat", "10 0 80 5 20 0 160 9 3 1 14 30 0 0 0 40 2")
    assert Host(root).traffic(0) == Traffic(in_flight=3, completed=100)


def test_one_process_watches_a_volume(root: Path) -> None:
    host = Host(root)
    assert not host.is_watched("vol-1")
    with host.watching("vol-1"):
        assert host.is_watched("vol-1")
        assert not host.is_watched("vol-2")
        with pytest.raises(Conflict, match="another"), Host(root).watching("vol-1"):
            pass
    assert not host.is_watched("vol-1")


def test_a_host_has_a_name_of_its_own_that_tells_nothing(root: Path) -> None:
    with pytest.raises(InvalidRequest, match="--client"):
        Host(root).client()
    write(root, "etc/machine-id", "0123456789abcdef0123456789abcdef")
    name = Host(root).client()
    assert name == Host(root).client()
    assert name.startswith("host-")
    assert "0123456789abcdef" not in name
