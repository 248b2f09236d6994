"""`cairn pki`: certificates for TLS between NBD clients and front-ends."""

import shlex
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from blockstore.cli import tables
from blockstore.cli.options import Output, OutputOption
from blockstore.cli.screen import program, show
from blockstore.config import DEFAULT_NBD_PORT
from blockstore.errors import InvalidRequest
from blockstore.pki.uses import Use
from nbd_server.uri import NbdTarget, tls_commands

if TYPE_CHECKING:
    from blockstore.pki.certificates import Description
    from blockstore.pki.directory import Issued

app = typer.Typer(help="Certificates for TLS: an authority of your own, servers and clients.", no_args_is_help=True)

#: Changing it means new files on every host, so it outlives what it vouches for.
_AUTHORITY_DAYS: Final = 3650
#: What browsers accept at most; `cairn pki renew` needs no restart.
_CERTIFICATE_DAYS: Final = 397

DaysOption = Annotated[int, typer.Option("--days", metavar="DAYS", min=1, max=36500, help="How long it is valid.")]
PkiOption = Annotated[Path, typer.Option("--pki", metavar="DIR", help="The authority's directory.", file_okay=False)]
_DIRECTORY: Final = Path("pki")


@app.command("init")
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to make it: a new directory.")] = _DIRECTORY,
    name: Annotated[str, typer.Option("--name", help="The authority's name.")] = "Cairn CA",
    days: DaysOption = _AUTHORITY_DAYS,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make an authority. Who has DIR/ca-key.pem can pose as any server or client: keep it off servers."""
    from blockstore.pki import directory as files  # noqa: PLC0415 - other commands do not wait for its library

    made = files.init(directory, name, timedelta(days=days))
    option = "" if directory == _DIRECTORY else f" --pki {shlex.quote(str(directory))}"
    steps = [
        f"{program()} pki issue server NAME --host HOST{option}    # for each front-end",
        f"{program()} pki issue client NAME{option}                # for each host that uses volumes",
    ]
    _show(output, made, steps)


@app.command("issue")
def issue(
    use: Annotated[Use, typer.Argument(metavar="server|client", help="What it is for.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its common name: whom access rules mean.")],
    *,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="HOST", help="DNS name or address by which clients reach a server; repeatable."),
    ] = None,
    days: DaysOption = _CERTIFICATE_DAYS,
    pki: PkiOption = _DIRECTORY,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where its files go.", show_default="NAME in --pki")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a certificate and its key in a directory of their own, with the authority's certificate beside them."""
    from blockstore.pki import directory as files  # noqa: PLC0415 - see above

    if use is Use.AUTHORITY:
        raise InvalidRequest("`cairn pki init` makes an authority; here are made those of a server or a client")
    if use is Use.CLIENT and host:
        raise InvalidRequest("--host is for servers: a client is known by its NAME")
    hosts = (host or [name]) if use is Use.SERVER else []
    made = files.issue(pki, use, name, hosts, lifetime=timedelta(days=days), out=out)
    _show(output, made, server_steps(made) if use is Use.SERVER else client_steps(made))


@app.command("renew")
def renew(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `cairn pki issue` made.", file_okay=False)],
    days: DaysOption = _CERTIFICATE_DAYS,
    pki: PkiOption = _DIRECTORY,
    output: OutputOption = Output.TABLE,
) -> None:
    """Replace a certificate by one that lasts longer: same key, same names. A front-end takes it without a restart."""
    from blockstore.pki import directory as files  # noqa: PLC0415 - see above

    _show(output, files.renew(pki, directory, timedelta(days=days)), [])


@app.command("show")
def show_certificates(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A certificate, or a directory of them.")] = _DIRECTORY,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what certificates are for, and when they expire."""
    from blockstore.pki import directory as files  # noqa: PLC0415 - see above

    found = files.show(path)
    rows = [
        (str(file), each.use.value if each.use else "", each.subject, ", ".join(each.names), _valid_until(each))
        for file, each in found
    ]
    document = {"certificates": [{"file": str(file), **_document(each)} for file, each in found]}
    show(output, document, lambda: tables.grid(("FILE", "USE", "SUBJECT", "HOSTS", "VALID UNTIL"), rows))


def server_steps(made: "Issued") -> list[str]:
    """How a front-end uses it."""
    authority = _quoted(made.directory / "ca-cert.pem")
    command = f"{program()} nbd run --tls require --tls-cert {_quoted(made.certificate)} --tls-key {_quoted(made.key)}"
    return [f"{command} --tls-ca {authority}"]


def client_steps(made: "Issued") -> list[str]:
    """How each client uses it; HOST, VOLUME and the port are for the user to fill in."""
    directory = str(made.directory.absolute())
    target = NbdTarget("VOLUME", "HOST", DEFAULT_NBD_PORT, tls=True)
    return [
        *tls_commands(target, directory),
        f"sudo {program()} attach VOLUME --tls-certificates {shlex.quote(directory)}",
    ]


def _show(output: Output, made: "Issued", steps: Sequence[str]) -> None:
    said = made.description
    document = {
        "directory": str(made.directory),
        "certificate": str(made.certificate),
        "key": str(made.key),
        **_document(said),
        "next": list(steps),
    }
    show(output, document, lambda: _text(made, said, steps))


def _text(made: "Issued", said: "Description", steps: Sequence[str]) -> str:
    about = f"{said.use.value if said.use else ''} {said.subject}".strip()
    hosts = f", for {', '.join(said.names)}" if said.names else ""
    lines = [f"{about}{hosts}, valid until {_valid_until(said)}", str(made.certificate), f"{made.key} (secret)"]
    return "\n".join([*lines, *(["", "Try:"] if steps else []), *(f"  {step}" for step in steps)])


def _document(said: "Description") -> dict[str, Any]:
    return {
        "subject": said.subject,
        "common_name": said.common_name,
        "issuer": said.issuer,
        "use": said.use.value if said.use else None,
        "names": list(said.names),
        "not_before": said.not_before.isoformat(),
        "not_after": said.not_after.isoformat(),
        "days_left": said.days_left(),
        "serial": f"{said.serial:x}",
        "fingerprint_sha256": said.fingerprint,
    }


def _valid_until(said: "Description") -> str:
    days = said.days_left()
    return f"{said.not_after:%Y-%m-%d} ({f'{days} days' if days >= 0 else 'expired'})"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
