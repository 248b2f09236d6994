"""A disk that a machine boots from, by its firmware alone: a boot loader, a kernel, and a root file system.

An MBR partition table (as written by DOS), Syslinux on the FAT partition, ext4 on the other; all of it is
made without privileges. Before the root is mounted it is checked: what is printed is for the test.
"""

import struct
import subprocess
from pathlib import Path
from typing import Final

from blockstore.units import MIB
from tests.linux_host.initramfs import Initramfs
from tests.linux_host.kernel import Kernel
from tests.linux_host.machine import KERNEL_ARGUMENTS
from tests.programs import find_program

NEEDED: Final = ("syslinux", "mformat", "mcopy", "mke2fs", "e2fsck", "busybox", "ldd")
_MODULES: Final = ("virtio_pci", "virtio_blk", "crc32c_generic", "crc32c_intel", "ext4")
_SECTOR: Final = 512
_BOOT_START: Final = MIB
_ROOT_START: Final = 48 * MIB
#: More than a front-end takes to start, on a machine that is busy.
_RECONNECT_S: Final = 200
_FAT16: Final = 0x0E
_LINUX: Final = 0x83
_MBR_CODE: Final = Path("/usr/lib/SYSLINUX/mbr.bin")
_CONFIGURATION: Final = f"""DEFAULT linux
LABEL linux
  LINUX vmlinuz
  INITRD initrd
  APPEND {KERNEL_ARGUMENTS}
"""
#: A mount replays the journal; after that nothing may be wrong.
_INIT: Final = """#!/sbin/busybox sh
/sbin/busybox --install -s /bin
export PATH=/sbin:/bin LD_LIBRARY_PATH=/lib
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module; done
ln -s /proc/self/mounts /etc/mtab
stty -F /dev/ttyS1 raw
exec >/dev/ttyS1 2>&1
echo "Linux $(uname -r)"
mkdir /new
mount -t ext4 /dev/vda2 /new && umount /new && e2fsck -f -n /dev/vda2 && echo FSCK CLEAN
mount -t ext4 /dev/vda2 /new
for each in proc sys dev; do mount --move /$each /new/$each; done
unset LD_LIBRARY_PATH
exec switch_root /new /sbin/init
"""


def make_boot_disk(directory: Path, kernel: Kernel, root: Path, size_bytes: int) -> Path:
    """The image, with holes; its root file system has what is in `root`, which runs /sbin/init.

    directory: must be empty, and has it afterwards.
    """
    image = directory / "boot.raw"
    with image.open("wb") as disk:
        disk.truncate(size_bytes)
        disk.write(_MBR_CODE.read_bytes()[:440])
        disk.seek(446)
        disk.write(_partition(_FAT16, _BOOT_START, _ROOT_START, active=True))
        disk.write(_partition(_LINUX, _ROOT_START, size_bytes, active=False))
        disk.seek(_SECTOR - 2)
        disk.write(b"\x55\xaa")
    _make_boot_partition(directory, image, kernel)
    blocks = f"{(size_bytes - _ROOT_START) // 1024}k"
    _run("mke2fs", "-q", "-t", "ext4", "-d", root, "-E", f"offset={_ROOT_START}", image, blocks)
    return image


def options(uri: str) -> list[str]:
    """QEMU's, for a machine whose only disk is that export; it waits for a server that is away, and asks again."""
    return ["-drive", f"file={uri},format=raw,if=virtio,discard=unmap,file.reconnect-delay={_RECONNECT_S}"]


def _partition(kind: int, start: int, end: int, *, active: bool) -> bytes:
    """An entry of the table; start, end: bytes. Cylinders are not said: all that boots here takes sector numbers."""
    first, count = start // _SECTOR, (end - start) // _SECTOR
    return struct.pack("<B3sB3sII", 0x80 * active, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", first, count)


def _make_boot_partition(directory: Path, image: Path, kernel: Kernel) -> None:
    where, sectors = f"{image}@@{_BOOT_START}", (_ROOT_START - _BOOT_START) // _SECTOR
    _run("mformat", "-i", where, "-T", sectors, "-h", 16, "-s", 63, "-H", _BOOT_START // _SECTOR, "::")
    files = {"vmlinuz": kernel.image.read_bytes(), "initrd": _initrd(kernel), "syslinux.cfg": _CONFIGURATION.encode()}
    for name, content in files.items():
        (directory / name).write_bytes(content)
        _run("mcopy", "-i", where, directory / name, f"::{name}")
        (directory / name).unlink()
    _run("syslinux", "--install", "--offset", _BOOT_START, image)


def _initrd(kernel: Kernel) -> bytes:
    initrd = Initramfs()
    for path in ("dev", "proc", "sys", "root", "etc", "bin"):
        initrd.directory(path)
    for name in ("busybox", "e2fsck"):
        initrd.add_program(name)
    initrd.add_modules(_MODULES, kernel.modules)
    initrd.add("init", _INIT.encode(), executable=True)
    return initrd.pack()


def _run(name: str, *arguments: object) -> None:
    """Raises CalledProcessError."""
    subprocess.run([str(find_program(name)), *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
