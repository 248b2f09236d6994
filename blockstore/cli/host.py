"""`cairn attach` and `cairn detach`: a volume as a block device of this Linux host, and how to be rid of it.

The code behind them (nbd_server.kernel) is imported when they run: other commands do not wait for what it imports.
"""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockstore.cli import documents, tables
from blockstore.cli.completion import complete_volume
from blockstore.cli.control_address import find_control
from blockstore.cli.logs import set_up_logging
from blockstore.cli.options import ControlOption, Output, OutputOption, StateOption
from blockstore.cli.screen import say, show
from blockstore.cli.units import read_unit
from blockstore.config import AttachSettings
from blockstore.daemon import stop_signals, tell_ready
from blockstore.errors import InvalidRequest
from blockstore.systemd import notify
from blockstore.units import format_size

if TYPE_CHECKING:
    from nbd_server.kernel.devices import Host, LocalDevice
    from nbd_server.kernel.session import Attached, Wanted
    from nbd_server.kernel.supervision import State

ClientOption = Annotated[
    str,
    typer.Option(
        "--client",
        envvar="CAIRN_CLIENT",
        help="This host's name for control, which no other host has.",
        show_default="made of /etc/machine-id",
    ),
]


def attach(
    volume: Annotated[
        str, typer.Argument(metavar="VOLUME", help="The volume's id or name.", autocompletion=complete_volume)
    ] = "",
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Like /dev/nbd0.", show_default="a free one")] = "",
    *,
    state: StateOption,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse writes.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Take it away from the host that has it, whose file system then fails.")
    ] = False,
    dead_timeout: Annotated[
        int,
        typer.Option("--dead-timeout", metavar="SECONDS", help="How long I/O waits for a front-end before it fails."),
    ] = AttachSettings().dead_timeout_s,
    connections: Annotated[
        int,
        typer.Option(
            "--connections",
            metavar="COUNT",
            envvar="CAIRN_CONNECTIONS",
            help="To the front-end, 1 to 16; this host uses one less than it has processors.",
        ),
    ] = AttachSettings().connections,
    client: ClientOption = "",
    tls_certificates: Annotated[
        Path | None,
        typer.Option(
            "--tls-certificates",
            metavar="DIR",
            envvar="CAIRN_TLS_CERTIFICATES",
            help="Use TLS, with ca-cert.pem, client-cert.pem and client-key.pem of this directory.",
            file_okay=False,
            exists=True,
        ),
    ] = None,
    list_devices: Annotated[bool, typer.Option("--list", help="Show what is attached on this host, and end.")] = False,
    unit: Annotated[bool, typer.Option("--unit", help="Print cairn-attach@.service for systemd, and end.")] = False,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a volume a block device of this Linux host, and watch over it until it is detached.

    Where the front-end restarts, hangs or dies, the device is given a connection to one that serves the volume, and
    I/O waits meanwhile. This runs in the foreground, or as the systemd unit cairn-attach@VOLUME (docs/nbd.md). When it
    is ended the device stays; started again it goes on with it. Needs root, and the kernel's nbd driver.
    """
    if list_devices:
        _list(output)
        return
    if unit:
        print(read_unit("cairn-attach@.service"), end="")
        return
    if not volume:
        raise InvalidRequest("Missing argument 'VOLUME': what to attach; or --list, to see what is")
    from nbd_server.kernel.session import Wanted, check_wanted  # noqa: PLC0415 - see above

    wanted = Wanted(volume, device, read_only, force)
    check_wanted(wanted)
    settings = AttachSettings(
        control=find_control(control, state),
        client=client,
        dead_timeout_s=dead_timeout,
        connections=connections,
        tls_certificates=tls_certificates.absolute() if tls_certificates else None,
    )
    set_up_logging()
    asyncio.run(_attach(settings, wanted, output))


def detach(
    name: Annotated[str, typer.Argument(metavar="VOLUME|DEVICE", help="The volume, or its device on this host.")],
    *,
    state: StateOption,
    force: Annotated[
        bool, typer.Option("--force", help="Although it is mounted, or its front-end does not answer; writes are lost.")
    ] = False,
    control: ControlOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Flush a block device that `cairn attach` made, disconnect it, and detach its volume."""
    from nbd_server.kernel import session  # noqa: PLC0415 - see above

    found = asyncio.run(session.detach(AttachSettings(control=find_control(control, state)), name, force=force))
    show(output, documents.volume(found), lambda: tables.volume(found))


async def _attach(settings: AttachSettings, wanted: "Wanted", output: Output) -> None:
    from nbd_server.kernel import session  # noqa: PLC0415 - see above

    stopped = stop_signals()

    def ready(attached: "Attached") -> None:
        document = _document(attached.device) | {"front_end": attached.front_end}
        show(output, document, lambda: attached.device.path)
        tell_ready(f"{wanted.volume} is {attached.device.path}")

    def tell(state: "State") -> None:
        notify(f"STATUS={wanted.volume}: {state.value}")

    watching = asyncio.create_task(session.attach(settings, wanted, ready, tell))
    ends: list[asyncio.Future[Any]] = [watching, stopped]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if watching.done():
        watching.result()
        return
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    say(f"{wanted.volume} is watched no more; `cairn attach` goes on with it, `cairn detach` ends it")


def _list(output: Output) -> None:
    from nbd_server.kernel.devices import Host  # noqa: PLC0415 - see above

    host = Host()
    found = [each for each in host.devices() if each.owner is not None]
    rows = [_row(host, each) for each in found]
    document = {"devices": [_document(each) | {"watched": _is_watched(host, each)} for each in found]}
    show(
        output,
        document,
        lambda: tables.grid(("DEVICE", "VOLUME", "SIZE>", "MODE", "LINKS>", "WATCHED", "USED BY"), rows),
    )


def _row(host: "Host", device: "LocalDevice") -> tuple[str, ...]:
    assert device.owner is not None
    mode, watched = "read-only" if device.read_only else "", "yes" if _is_watched(host, device) else "no"
    size = format_size(device.size_bytes)
    links = str(device.owner.connections)
    return device.path, device.owner.volume, size, mode, links, watched, ", ".join(device.used_by)


def _is_watched(host: "Host", device: "LocalDevice") -> bool:
    return device.owner is not None and host.is_watched(device.owner.volume)


def _document(device: "LocalDevice") -> dict[str, Any]:
    return {
        "device": device.path,
        "volume": device.owner.volume if device.owner else None,
        "client": device.owner.client if device.owner else None,
        "connections": device.owner.connections if device.owner else None,
        "size_bytes": device.size_bytes,
        "read_only": device.read_only,
        "used_by": list(device.used_by),
    }
