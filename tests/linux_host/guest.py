"""A guest that boots a kernel with an initramfs of this machine's programs, runs one script there, and ends.

The script works against an NBD server on this machine's loopback. `run` waits for it; `running` is for a
test that does things meanwhile (`machine.Machine`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from blockstore.config import split_address
from tests.linux_host.initramfs import Initramfs
from tests.linux_host.kernel import Kernel, Series, find_kernel
from tests.linux_host.machine import KERNEL_ARGUMENTS, PROGRAM, Machine, Result
from tests.programs import require_programs

PROGRAMS: Final = (
    *("bash", "nbd-client", "mke2fs", "e2fsck", "mkfs.xfs", "xfs_repair", "busybox"),
    *("blkdiscard", "fallocate"),  # busybox has both without what makes zeroes
)
MODULES: Final = (
    *("virtio_pci", "virtio_net", "virtio_blk", "nbd", "crc32c_generic", "crc32c_intel", "ext4", "xfs"),
    *("tls", "aes_generic", "gcm", "ctr", "ghash_generic", "seqiv"),  # what TLS in the kernel looks for
)
#: What the guest needs of this machine, besides the kernel.
_NEEDED: Final = (PROGRAM, "ldd", *PROGRAMS)
#: This machine's 127.0.0.1, in QEMU's user network.
HOST: Final = "10.0.2.2"
_MOUNT: Final = "mkdir /host; mount -t ext4 -o ro /dev/vda /host"
_INIT: Final = """#!/sbin/busybox sh
/sbin/busybox --install -s /bin
export PATH=/sbin:/bin HOME=/ LD_LIBRARY_PATH=/lib NBD_HOST={host} NBD_PORT={port} NBD_EXPORT='{export}'
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /tmp
ln -s /proc/self/mounts /etc/mtab
ln -s /proc/self/fd /dev/fd
for module in /modules/*; do insmod $module; done
{mount}
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
stty -F /dev/ttyS1 raw
stty -F /dev/ttyS3 -echo
bash /script </dev/null >/dev/ttyS1 2>&1 3</dev/ttyS3
echo $? >/dev/ttyS2
stty -F /dev/ttyS1 raw # which waits until all is sent
stty -F /dev/ttyS2 raw
poweroff -f
"""


def require_kernel(series: Series) -> Kernel:
    """A kernel to boot, where all that a guest needs is there; else the test is skipped, or fails if CI=true."""
    require_programs(*_NEEDED)
    return find_kernel(series)


def script(*names: str, **variables: int | str) -> str:
    """The scripts of these names, one after another, with these variables set."""
    settings = "".join(f"{variable}={value}\n" for variable, value in variables.items())
    return settings + "".join((Path(__file__).parent / f"{name}.sh").read_text() for name in names)


def running(
    kernel: Kernel,
    text: str,
    directory: Path,
    uri: str = "",
    limit_s: float = 60,
    *,
    disk: Path | None = None,
    programs: Sequence[str] = (),
    modules: Sequence[str] = (),
    drive: str = "",
    processors: int = 2,
) -> Machine:
    """Boot `kernel` and run `text` there with bash; NBD_HOST, NBD_PORT and NBD_EXPORT are those of the URI.

    directory: for this run's files; kept, so that a test's failure can be looked into. disk: an ext4 image, mounted
    read-only at /host. drive: what QEMU's option -drive says of another one, which is /dev/vda where `disk` is not.
    programs, modules: what it has besides what every guest has.
    """
    directory.mkdir(parents=True, exist_ok=True)
    address, _, export = uri.removeprefix("nbd://").partition("/")
    port = split_address(address)[1] if address else 0
    initrd = directory / "initrd"
    init = _INIT.format(host=HOST, port=port, export=export, mount="" if disk is None else _MOUNT)
    initrd.write_bytes(_make_root(kernel, text, init, (*PROGRAMS, *programs), (*MODULES, *modules)))
    options = _options(kernel.image, initrd, disk, processors) + (["-drive", drive] if drive else [])
    return Machine(options, directory, limit_s)


def run(kernel: Kernel, text: str, directory: Path, uri: str = "", limit_s: float = 60) -> Result:
    """The same, from beginning to end."""
    with running(kernel, text, directory, uri, limit_s) as machine:
        return machine.end()


def _make_root(kernel: Kernel, text: str, init: str, programs: Sequence[str], modules: Sequence[str]) -> bytes:
    root = Initramfs()
    for path in ("dev", "proc", "sys", "tmp", "mnt", "etc", "run", "bin"):
        root.directory(path)
    for name in programs:
        root.add_program(name)
    root.link("sbin/mkfs.ext4", "mke2fs")
    root.add("etc/mke2fs.conf", Path("/etc/mke2fs.conf").read_bytes())
    root.add_modules(modules, kernel.modules)
    root.add("script", text.encode())
    root.add("init", init.encode(), executable=True)
    return root.pack()


def _options(image: Path, initrd: Path, disk: Path | None, processors: int) -> list[str]:
    options = ["-kernel", str(image), "-initrd", str(initrd), "-append", f"{KERNEL_ARGUMENTS} nbd.nbds_max=4"]
    options += ["-smp", str(processors)]
    options += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
    if disk is not None:
        options += ["-drive", f"file={disk},if=virtio,format=raw,readonly=on"]
    return options
