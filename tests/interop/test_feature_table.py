"""docs/nbd.md, "Beside other servers": each cell is what its row's command shows of a real server.

A cell is "yes", "no", or a value, of the server as it comes. One that names options in backticks says: no without,
yes with them. "no" holds whatever options the page names. What output means is for the row's judge to say (`JUDGES`).
"""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from blockstore.units import MIB
from tests.interop.newer_libnbd import newer_libnbd
from tests.interop.other_servers import Column, Kind, Server, Servers
from tests.programs import require_found, require_programs

pytestmark = pytest.mark.timeout(600)

PAGE: Final = (Path(__file__).parents[2] / "docs" / "nbd.md").read_text()
SECTION: Final = PAGE.split("\n## Beside other servers\n")[1].split("\n## ")[0]
#: That the page's figures are of: a program, and what it prints its version with.
VERSIONS: Final = {"nbdkit": "--version", "qemu-nbd": "--version", "nbd-server": "-V", "nbdinfo": "--version"}
_LIMIT_S: Final = 60
_STYLES: Final = ("simple", "structured", "extended")


@dataclass(frozen=True)
class Row:
    """One of the table. command: as it stands there; looked_at: the names that follow it."""

    feature: str
    cells: dict[str, str]
    command: str
    looked_at: tuple[str, ...]


def rows() -> dict[str, Row]:
    """The table's, by their feature."""
    lines = [line for line in SECTION.splitlines() if line.startswith("| ")]
    (_, *columns, _), *others = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    found = {}
    for feature, *cells, shown_by in others:
        quoted = re.match(r"`(.+?)`", shown_by)
        assert quoted is not None, f"{feature}: no command shows it"
        names = tuple(re.findall(r"\b[a-z]+_[a-z_]+\b", shown_by[quoted.end() :]))
        found[feature] = Row(feature, dict(zip(columns, cells, strict=True)), quoted[1].replace(r"\|", "|"), names)
    return found


ROWS: Final = rows()
COLUMNS: Final = tuple(next(iter(ROWS.values())).cells)


# What output means.


@dataclass(frozen=True)
class Output:
    """Of a row's command: its exit status, and all that it said."""

    status: int
    text: str


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _styles(output: Output, _: Row) -> str:
    """A server that has one of them has those before it."""
    found = re.search(r"using (\w+) packets", output.text)
    assert found is not None, output
    return ", ".join(_STYLES[: _STYLES.index(found[1]) + 1])


def _holes(output: Output, _: Row) -> str:
    """Offset, length and kind of each chunk; 2 is LIBNBD_READ_HOLE."""
    kinds = [int(kind) for kind in re.findall(r"^\d+ \d+ (\d)$", output.text, re.MULTILINE)]
    assert kinds, output
    return _yes(2 in kinds)


def _long(output: Output, _: Row) -> str:
    assert output.status == 0 or "request too large" in output.text, output
    return _yes(output.status == 0)


def _context(output: Output, _: Row) -> str:
    assert output.status == 0 or "does not support metadata context" in output.text, output
    return _yes(output.status == 0)


def _changes(output: Output, _: Row) -> str:
    assert output.status == 0, output
    return _yes(re.search(r"^\s+(cairn:dirty|qemu:dirty-bitmap):", output.text, re.MULTILINE) is not None)


def _printed(output: Output, _: Row) -> str:
    return _yes({"True": True, "False": False}[output.text.strip()])


def _offered(output: Output, row: Row) -> str:
    """All that the row names, or nothing of it."""
    told = dict(re.findall(r"^\s+(\w+): (.+)$", output.text, re.MULTILINE))
    assert row.looked_at
    assert all(name in told for name in row.looked_at), output
    values = {told[name] for name in row.looked_at}
    return _yes(values == {"true"}) if len(values) == 1 else f"some: {told}"


def _block_sizes(output: Output, _: Row) -> str:
    assert output.status == 0, output
    sizes = [int(size) for size in re.findall(r"^\s+block_size_\w+: (\d+)$", output.text, re.MULTILINE)]
    return ", ".join(f"{size // MIB} MiB" if size >= MIB else str(size) for size in sizes) or "not told"


def _words(output: Output, _: Row) -> str:
    assert "command failed: Invalid argument" in output.text, output
    return _yes("error server message: " in output.text)


def _under_tls(output: Output, _: Row) -> str:
    return _yes(output.status == 0 and "with TLS" in output.text)


def _in_plain(output: Output, _: Row) -> str:
    assert output.status == 0 or "server replied with error" in output.text, output
    return _yes(output.status == 0 and "without TLS" in output.text)


def _refused(output: Output, _: Row) -> str:
    return _yes(output.status != 0)


Judge = Callable[[Output, Row], str]
JUDGES: Final[dict[str, tuple[Kind, Judge]]] = {
    "replies": (Kind.PLAIN, _styles),
    "holes in reads are not sent": (Kind.PLAIN, _holes),
    "lengths above 4 GiB": (Kind.PLAIN, _long),
    "base:allocation": (Kind.PLAIN, _context),
    "qemu:allocation-depth": (Kind.PLAIN, _context),
    "changes since a snapshot": (Kind.PLAIN, _changes),
    "status of some contexts": (Kind.PLAIN, _printed),
    "CACHE, DF, FAST_ZERO": (Kind.PLAIN, _offered),
    "FUA, FLUSH, TRIM": (Kind.PLAIN, _offered),
    "WRITE_ZEROES": (Kind.PLAIN, _offered),
    "CAN_MULTI_CONN": (Kind.PLAIN, _offered),
    "block sizes": (Kind.PLAIN, _block_sizes),
    "errors with words": (Kind.PLAIN, _words),
    "TLS": (Kind.TLS, _under_tls),
    "without TLS beside it": (Kind.TLS, _in_plain),
    "clients without a certificate are refused": (Kind.TLS, _refused),
    "TLS by keys agreed on beforehand (PSK)": (Kind.TLS, _under_tls),
}


# The servers.


def require_versions() -> None:
    """Go on if the programs are those that the page speaks of."""
    require_programs(*VERSIONS, "qemu-img", "nbdsh")
    missing = []
    for program, option in VERSIONS.items():
        said = subprocess.run([program, option], capture_output=True, text=True, check=False)
        version = re.search(r"\d+\.\d+", said.stdout + said.stderr)
        if version is None or not re.search(rf"\b{re.escape(version[0])}\b", SECTION):
            missing.append(f"{program} of the version that docs/nbd.md names")
    require_found(missing)


@dataclass(frozen=True)
class Running:
    servers: Servers
    columns: dict[str, Column]
    newer: Path

    def judge(self, row: Row, server: Server) -> str:
        """What the row's command shows of the server."""
        command = re.sub(r"^newer ", f"{self.newer} ", self.servers.fill_in(row.command, server))
        environment = {**os.environ, "LC_ALL": "C", "PATH": f"/usr/bin:{os.environ['PATH']}"}  # Debian's Python has nbd
        done = subprocess.run(
            ["sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=_LIMIT_S,
            env=environment,
        )
        return JUDGES[row.feature][1](Output(done.returncode, done.stdout), row)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    require_versions()
    newer = newer_libnbd()
    with ExitStack() as stack:
        servers = Servers(tmp_path_factory.mktemp("servers"), stack)
        yield Running(servers, servers.start(), newer)


def test_each_row_has_a_judge() -> None:
    assert ROWS.keys() == JUDGES.keys()


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("feature", ROWS)
def test_a_cell_is_what_its_command_shows(running: Running, feature: str, column: str) -> None:
    row = ROWS[feature]
    cell = row.cells[column]
    plain, *others = running.columns[column][JUDGES[feature][0]]
    if options := re.findall(r"`(.+?)`", cell):
        assert running.judge(row, plain) == "no", f"without {options}"
        (wanted,) = [each for each in others if all(option in each.configuration for option in options)]
        assert not any(option in plain.configuration for option in options)
        assert running.judge(row, wanted) == "yes", f"with {options}"
        return
    assert running.judge(row, plain) == cell
    if cell == "no":
        assert [running.judge(row, each) for each in others] == ["no"] * len(others)
