"""`cairn units`: unit files for systemd, which run this very installation."""

import shlex
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Final

import typer

from blockstore.cli.options import Output, OutputOption
from blockstore.cli.screen import show
from blockstore.errors import AlreadyExists

_FOLDERS: Final = (files("blockstore.cli").joinpath("unit_files"), files("nbd_server.kernel"))
_KINDS: Final = (".service", ".socket")
_NEXT: Final = (
    "useradd --system --home-dir /var/lib/cairn cairn",
    "systemctl daemon-reload",
    "systemctl enable --now cairn-control cairn-node@a cairn-nbd cairn-snapshotd",
)


def read_unit(name: str) -> str:
    """A unit file, with this installation's command in it."""
    template = next(each.joinpath(name) for each in _FOLDERS if each.joinpath(name).is_file())
    command = shlex.join([str(Path(sys.executable).parent / "cairn")])
    return template.read_text().replace("@CAIRN@", command)


def unit_names() -> list[str]:
    """All that there are."""
    found = (each.name for folder in _FOLDERS for each in folder.iterdir())
    return sorted(name for name in found if name.endswith(_KINDS))


def units(
    directory: Annotated[Path, typer.Option("--directory", help="Where to write them.", file_okay=False)] = Path(
        "/etc/systemd/system"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there and differ.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Write unit files for systemd: control, nodes, the front-end with its socket, snapshotd, attached volumes.

    They run this installation's `cairn` as the user cairn; each says in its first lines where its options go. Files
    in /etc/systemd/system are root's to write.
    """
    wanted = {directory / name: read_unit(name) for name in unit_names()}
    differing = [path for path, text in wanted.items() if path.exists() and path.read_text() != text]
    if differing and not force:
        raise AlreadyExists(f"{', '.join(map(str, differing))}: there, and not the same; --force replaces them")
    directory.mkdir(parents=True, exist_ok=True)
    for path, text in wanted.items():
        path.write_text(text)
    written = [str(path) for path in wanted]
    text = "\n".join([*written, "", "Next, as root:", *(f"  {each}" for each in _NEXT)])
    show(output, {"files": written, "next": list(_NEXT)}, lambda: text)
