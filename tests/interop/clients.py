"""What clients that are not ours do with an export: one function for each, over any NBD server.

Each takes the URI of a writable export whose content may be lost, of 256 MiB or more, and raises
AssertionError with the client's own words where something is not as it should be. They run against
the volume in memory and against a whole cluster alike. `PROGRAMS` is what they need.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from blockstore.units import MIB
from tests.programs import find_program, require_programs

PROGRAMS: Final = (
    "qemu-img",
    "qemu-io",
    "nbdinfo",
    "nbdcopy",
    "nbd-client",
    "fio",
    "mke2fs",
    "e2fsck",
    "/usr/bin/python3",
)
FILE_SYSTEM_BYTES: Final = 256 * MIB
_LIMIT_S: Final = 300
#: The binding is Debian's, for Debian's Python.
_SYSTEM_PYTHON: Final = "/usr/bin/python3"
#: Where qemu-io writes patterns, as offset and length: none on another, aligned, below a sector, over blocks' edges.
_RANGES: Final = (
    ("0", "512"),
    ("513", "1000"),
    ("4095", "2"),
    ("8191", "8194"),
    ("64k", "1M"),
    ("2100000", "33"),
    ("100000001", "1"),
    ("200M", "8M"),
)


def run(*command: str, directory: Path | None = None) -> str:
    """Run a client's program to its end; what it printed. Raises AssertionError where it fails."""
    require_programs(command[0])
    program = find_program(command[0])
    assert program is not None
    done = subprocess.run(
        [program, *command[1:]],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=_LIMIT_S,
        stdin=subprocess.DEVNULL,
    )
    printed = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{printed}"
    return done.stdout


# What the export says of itself.


def nbdinfo(uri: str) -> dict[str, Any]:
    """What nbdinfo says of the export; it offers all that a writable one of ours does."""
    (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
    offered = ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn")
    assert all(export[name] for name in offered), export
    assert not export["is_read_only"]
    assert export["block_size_minimum"] <= 512
    assert (export["block_size_preferred"], export["block_size_maximum"]) == (4096, 32 * MIB)
    return dict(export)


def qemu_img_info(uri: str) -> dict[str, Any]:
    """What qemu-img says of the export: its size, and that it is raw."""
    told = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", uri))
    assert told["virtual-size"] == nbdinfo(uri)["export-size"]
    return dict(told)


def list_exports(uri: str) -> set[str]:
    """The names that `nbd-client -l` and `nbdinfo --list` tell; both tell the same."""
    parts = urlsplit(uri)
    socket = parse_qs(parts.query).get("socket")
    where = ["-u", socket[0]] if socket else [str(parts.hostname), str(parts.port)]
    lines = run("nbd-client", "-l", *where).splitlines()
    names = {line.split(": ")[0] for line in lines if line and not line.startswith("Negotiation")}
    root = f"{parts.scheme}://{parts.netloc}/?{parts.query}" if socket else f"{parts.scheme}://{parts.netloc}"
    by_nbdinfo = json.loads(run("nbdinfo", "--list", "--json", root))["exports"]
    assert names == {export["export-name"] for export in by_nbdinfo}, lines
    return names


# Small and odd requests.


def qemu_io(uri: str) -> None:
    """Patterns at odd places, with and without FUA, then over one another, zeroed and trimmed."""
    patterns = [f"-P {number} {start} {length}" for number, (start, length) in enumerate(_RANGES, 1)]
    reads = [f"read {pattern}" for pattern in patterns]
    writes = [f"write {'-f ' * (number % 2)}{pattern}" for number, pattern in enumerate(patterns)]
    run_qemu_io(uri, [*writes, "flush", *reads])
    over = ["write -P 99 100 5000", "write -z 201M 1M", "write -z -u 203M 1000", "discard 205M 1M"]
    news = ["read -P 99 100 5000", "read -P 0 201M 1M", "read -P 0 203M 1000", "read -P 0 205M 1M"]
    olds = ["read -P 1 0 100", "read -P 8 200M 1M", "read -P 8 202M 1M", "read -P 8 212861928 3096", *reads[3:7]]
    run_qemu_io(uri, [*over, *news, *olds])


def run_qemu_io(uri: str, commands: Sequence[str]) -> None:
    """Run qemu-io's commands one after the other; it tells of a pattern that is not there, and so do we."""
    arguments = [argument for command in commands for argument in ("-c", command)]
    printed = run("qemu-io", "-f", "raw", *arguments, uri)
    wrong = [line for line in printed.splitlines() if "fail" in line.lower() or "error" in line.lower()]
    assert not wrong, f"{commands}: {wrong}"


def libnbd_binding(uri: str) -> None:
    """libnbd's Python binding: requests side by side over several connections, errors, odd requests."""
    require_programs(_SYSTEM_PYTHON)
    run(_SYSTEM_PYTHON, str(Path(__file__).parent / "libnbd_client.py"), uri)


# Whole images.


def make_file_system(image: Path, size_bytes: int = FILE_SYSTEM_BYTES) -> Path:
    """A real ext4 file system in a file, half full: sources of this Python's library, and incompressible bytes."""
    require_programs("mke2fs", "e2fsck")
    content = image.with_suffix(".content")
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("asyncio", "concurrent", "email", "encodings", "json", "unittest"):
        shutil.copytree(library / name, content / name)
    for number in range(size_bytes // 2 // MIB):
        (content / f"noise-{number}").write_bytes(os.urandom(MIB - number))
    with image.open("wb") as file:
        file.truncate(size_bytes)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", str(content), str(image))
    run("e2fsck", "-fn", str(image))
    shutil.rmtree(content)
    return image


def nbdcopy_in_and_out(uri: str, image: Path, directory: Path) -> None:
    """Copy an image in and out again by nbdcopy: the same bytes, and still a sound file system."""
    back = directory / "nbdcopy.img"
    run("nbdcopy", "--flush", str(image), uri)
    run("nbdcopy", uri, str(back))
    same_image(image, back)
    run("e2fsck", "-fn", str(back))
    back.unlink()


def qemu_img_in_and_out(uri: str, image: Path, directory: Path) -> None:
    """Copy an image in, compare it there, and copy it out again, by qemu-img."""
    back = directory / "qemu-img.img"
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), uri)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(back))
    same_image(image, back)
    back.unlink()


def same_image(image: Path, back: Path) -> None:
    """`back`, as long as the volume, begins with `image`; raises AssertionError where it does not."""
    assert back.stat().st_size >= image.stat().st_size
    with back.open("r+b") as file:
        file.truncate(image.stat().st_size)
    assert filecmp.cmp(image, back, shallow=False), f"{back.name} is not what was copied in"


def qemu_img_bench(uri: str) -> None:
    """Requests of QEMU's own making, 16 at once: reads, then writes with a flush behind each sixteenth."""
    for kind in ([], ["-w", "--pattern=7", "--flush-interval=16"]):
        told = run("qemu-img", "bench", "-f", "raw", "-c", "128", "-d", "16", "-s", "6k", *kind, uri)
        assert "Run completed" in told
    run_qemu_io(uri, ["read -P 7 0 768k"])


# Checksums under load.


def fio_verify(uri: str, directory: Path, depth: int, size: str = "64M") -> None:
    """Random writes from 512 bytes to 1 MiB, checksums verified; at depth 1 or more."""
    _fio(
        uri, directory, f"--iodepth={depth}", "--rw=randwrite", "--bsrange=512-1M", "--bs_unaligned=0", f"--size={size}"
    )


def fio_verify_blocks(uri: str, directory: Path, block_size: str, depth: int, size: str = "4M") -> None:
    """Random writes of one size, read and verified while others go on."""
    mixed = ("--verify_backlog=64", "--verify_backlog_batch=16")
    _fio(uri, directory, f"--iodepth={depth}", "--rw=randwrite", f"--bs={block_size}", f"--size={size}", *mixed)


def fio_verify_mixed(uri: str, directory: Path, depth: int, size: str = "64M") -> None:
    """Reads and writes of many sizes at random; what was written is verified at the end."""
    mix = "--bssplit=512/20:4k/40:12k/10:64k/20:1M/10"
    _fio(uri, directory, f"--iodepth={depth}", "--rw=randrw", "--rwmixread=40", mix, f"--size={size}")


def fio_verify_trim(uri: str, directory: Path, depth: int, size: str = "32M") -> None:
    """Blocks trimmed and written again while their neighbours are trimmed at random, and verified meanwhile."""
    trimmed = ("--name=trim", "--rw=randtrim", "--bsrange=512-256k", f"--offset={size}", "--verify=0")
    both = (f"--iodepth={depth}", f"--size={size}")
    _fio(uri, directory, *both, "--rw=randtrimwrite", "--bs=16k", *trimmed, *both, "--ioengine=nbd", f"--uri={uri}")


def _fio(uri: str, directory: Path, *arguments: str) -> None:
    verify = ("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randrepeat=1")
    run("fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", *verify, *arguments, directory=directory)


#: By name, those that take a URI and a directory to work in: `for name, check in ALL.items()`.
ALL: Final[Mapping[str, Callable[[str, Path], object]]] = {
    "nbdinfo": lambda uri, directory: nbdinfo(uri),
    "qemu-img info": lambda uri, directory: qemu_img_info(uri),
    "nbd-client -l": lambda uri, directory: list_exports(uri),
    "qemu-io": lambda uri, directory: qemu_io(uri),
    "qemu-img bench": lambda uri, directory: qemu_img_bench(uri),
    "libnbd": lambda uri, directory: libnbd_binding(uri),
    "fio depth 1": lambda uri, directory: fio_verify(uri, directory, 1),
    "fio depth 64": lambda uri, directory: fio_verify(uri, directory, 64),
    "fio mixed": lambda uri, directory: fio_verify_mixed(uri, directory, 64),
    "fio trim": lambda uri, directory: fio_verify_trim(uri, directory, 64),
}
