"""A guest that boots, runs one script against an NBD server on this machine's loopback, and ends.

Emulated by QEMU (TCG), because a machine that runs tests may have no KVM. The first serial port is
the kernel's console, the second carries what the script prints, the third its exit status: so a
guest that dies before the script's end is told apart from a script that fails. The fourth brings the
script, as its file descriptor 3, the lines that this machine writes to a FIFO (`words_of`).
"""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.linux_host.initramfs import Initramfs
from tests.linux_host.kernel import Kernel, Series, find_kernel
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
_NEEDED: Final = ("qemu-system-x86_64", "ldd", *PROGRAMS)
#: This machine's 127.0.0.1, in QEMU's user network.
_HOST: Final = "10.0.2.2"
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
if [ -b /dev/vda ]; then mkdir /host; mount -t ext4 -o ro /dev/vda /host; fi
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


@dataclass(frozen=True)
class Result:
    """status: the script's; None where the guest went down or ran out of time before its end."""

    status: int | None
    output: str
    console: str
    seconds: float

    def __str__(self) -> str:
        if self.status is None:
            ended = f"the guest did not reach the script's end in {self.seconds:.0f} s"
            return f"{self.output}\n{ended}:\n{self.console[-4000:]}"
        return f"{self.output}\nstatus {self.status} after {self.seconds:.0f} s"


def require_kernel(series: Series) -> Kernel:
    """A kernel to boot, where all that a guest needs is there; else the test is skipped, or fails if CI=true."""
    require_programs(*_NEEDED)
    return find_kernel(series)


def file_system_script(file_system: str) -> str:
    """Makes, fills, checks, reads and trims a file system: ext4 or xfs, on at least 320 MiB."""
    return f"FILE_SYSTEM={file_system}\n" + (Path(__file__).parent / "file_system.sh").read_text()


def words_of(directory: Path) -> Path:
    """The FIFO whose lines the script of the guest in `directory` reads from file descriptor 3."""
    return directory / "words.in"


def run(
    kernel: Kernel,
    text: str,
    directory: Path,
    *,
    port: int = 0,
    export: str = "",
    timeout_s: float = 60,
    disk: Path | None = None,
) -> Result:
    """Boot `kernel` and run `text` there with bash; NBD_HOST, NBD_PORT and NBD_EXPORT are set.

    directory: for this run's files; kept, so that a test's failure can be looked into. disk: an ext4 image, mounted
    read-only at /host.
    """
    directory.mkdir(parents=True, exist_ok=True)
    initrd = directory / "initrd"
    initrd.write_bytes(_make_root(kernel, text, _INIT.format(host=_HOST, port=port, export=export)))
    ports = {name: directory / name for name in ("console", "output", "status")}
    words = words_of(directory)
    for path in (words, words.with_suffix(".out")):
        os.mkfifo(path)
    began = time.monotonic()
    _boot(_command(kernel.image, initrd, ports, words.with_suffix(""), disk), timeout_s)
    read = {name: path.read_text(errors="replace") if path.exists() else "" for name, path in ports.items()}
    status = int(read["status"]) if read["status"].strip().isdigit() else None
    return Result(status, read["output"], read["console"], time.monotonic() - began)


def _make_root(kernel: Kernel, text: str, init: str) -> bytes:
    root = Initramfs()
    for path in ("dev", "proc", "sys", "tmp", "mnt", "etc", "run", "bin"):
        root.directory(path)
    for name in PROGRAMS:
        root.add_program(name)
    root.link("sbin/mkfs.ext4", "mke2fs")
    root.add("etc/mke2fs.conf", Path("/etc/mke2fs.conf").read_bytes())
    root.add_modules(MODULES, kernel.modules)
    root.add("script", text.encode())
    root.add("init", init.encode(), executable=True)
    return root.pack()


def _command(image: Path, initrd: Path, ports: dict[str, Path], words: Path, disk: Path | None) -> list[str]:
    command = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "768"]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    command += ["-kernel", str(image), "-initrd", str(initrd)]
    # no_timer_check: on a busy machine an emulated timer may look broken to a kernel, which panics then.
    command += ["-append", "console=ttyS0 panic=-1 loglevel=6 nbd.nbds_max=4 no_timer_check"]
    command += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
    if disk is not None:
        command += ["-drive", f"file={disk},if=virtio,format=raw,readonly=on"]
    for path in ports.values():
        command += ["-serial", f"file:{path}"]
    return [*command, "-serial", f"pipe:{words}"]


def _boot(command: list[str], timeout_s: float) -> None:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as guest:
        try:
            guest.wait(timeout_s)
        except subprocess.TimeoutExpired:
            guest.kill()
        except BaseException:
            guest.kill()
            raise
