"""What `cairn attach` and `cairn detach` do on this host, from the request to the end.

Order. Attaching: control has the volume served for this client, a link is made, the kernel gets it. Detaching: what
the device has is flushed, nobody may hold it any more, the kernel lets go of it, its supervisor ends, control closes
the volume. Either may be killed anywhere and made again. A device of this client that is connected already is gone on
with: its links are replaced, so that this process has it in its hands.
"""

import asyncio
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from blockstore.config import AttachSettings
from blockstore.errors import CairnError, Conflict, Fenced, InvalidRequest, NotFound, QuorumUnavailable
from blockstore.rpc import control_pb2 as pb
from nbd_server.kernel import handover
from nbd_server.kernel.devices import Host, LocalDevice, Owner, device_index, is_device_name
from nbd_server.kernel.link import Link, open_links
from nbd_server.kernel.messages import Command, Request
from nbd_server.kernel.netlink import KernelNbd, kernel_nbd
from nbd_server.kernel.supervision import State
from nbd_server.kernel.supervisor import Supervisor
from nbd_server.kernel.whereabouts import Place, Whereabouts, control_at, no_port_at

_log = structlog.get_logger(__name__)
#: Opening a volume has 30 s at control; a try of the supervisor must not wait so long for one answer.
_FIRST_CALL_S: Final = 45.0
_CALL_S: Final = 6.0
#: Of the handshake, when the volume has just been opened.
_FIRST_LINK_S: Final = 10.0
#: A supervisor looks at its device four times a second.
_ENDS_WITHIN_S: Final = 10.0
_POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be attached. device: /dev/nbdN, or empty for a free one."""

    volume: str
    device: str = ""
    read_only: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True)
class Attached:
    """What is attached now."""

    device: LocalDevice
    front_end: str


async def attach(
    settings: AttachSettings,
    wanted: Wanted,
    ready: Callable[[Attached], None],
    tell: Callable[[State], None],
    host: Host | None = None,
) -> None:
    """Attach, say `ready`, and watch until the device is disconnected; `tell` hears of each state.

    Raises what control and the kernel refuse, and Fenced where the volume is taken away: the device is disconnected
    then, because nothing can be written through it any more. Where this is cancelled the device stays, unwatched.
    """
    host = host or Host()
    client = settings.client or host.client()
    tls = settings.tls_certificates is not None
    async with control_at(settings.control, client, _FIRST_CALL_S, tls=tls) as control, kernel_nbd() as nbd:
        volume = await control.volume(wanted.volume)
        with host.watching(volume.id):
            parts = _Parts(settings, wanted, host, nbd, control, Owner(volume.id, client, usable(settings.connections)))
            supervisor = await _begin(parts, ready, tell)
            await supervisor.run()
            if supervisor.ended_by is not None:
                await nbd.ask(Request(Command.DISCONNECT, index=supervisor.index))
                raise Fenced(f"{volume.id} is disconnected here: {supervisor.ended_by}")


@dataclass(frozen=True, slots=True)
class _Parts:
    settings: AttachSettings
    wanted: Wanted
    host: Host
    nbd: KernelNbd
    control: Whereabouts
    owner: Owner


async def _begin(parts: _Parts, ready: Callable[[Attached], None], tell: Callable[[State], None]) -> Supervisor:
    before = await parts.control.volume(parts.owner.volume)
    found = _connected_here(parts)
    place = await parts.control.attach(parts.owner.volume, read_only=parts.wanted.read_only, force=parts.wanted.force)
    links: tuple[Link, ...] = ()
    owner = parts.owner
    if found is not None and found.owner is not None:
        owner = found.owner
        if owner.connections != parts.owner.connections:
            _log.warning("the device keeps as many links as it has", device=found.path, links=owner.connections)
    try:
        if found is None:
            links, index = await _connect(parts, place)
        else:
            index = found.index
    except CairnError:
        if not before.HasField("attachment"):
            await parts.control.detach(parts.owner.volume)
        raise
    device = parts.host.find(index)
    if device is None:
        raise Conflict(f"/dev/nbd{index} was disconnected as soon as it was connected: see `dmesg`")
    parts.control.set_timeout(_CALL_S)
    ready(Attached(device, place.front_end))
    return Supervisor(
        parts.nbd,
        parts.host,
        parts.control,
        parts.settings,
        index=index,
        owner=owner,
        read_only=parts.wanted.read_only,
        place=place,
        links=links,
        tell=tell,
    )


def _connected_here(parts: _Parts) -> LocalDevice | None:
    """The device of this host that has the volume already. Raises Conflict where it cannot be gone on with."""
    for device in parts.host.devices():
        if device.owner is None or device.owner.volume != parts.owner.volume:
            continue
        if device.owner != parts.owner:
            raise Conflict(f"{device.path} has {device.owner.volume} for client {device.owner.client}: detach it first")
        if parts.wanted.device and device_index(parts.wanted.device) != device.index:
            raise Conflict(f"{device.owner.volume} is attached at {device.path} already")
        return device
    return None


async def _connect(parts: _Parts, place: Place) -> tuple[tuple[Link, ...], int]:
    links = await _first_links(place, parts.owner, parts.settings.tls_certificates)
    wanted = parts.wanted.device
    try:
        index = await handover.connect(
            parts.nbd,
            parts.host,
            links,
            parts.owner,
            index=device_index(wanted) if wanted else None,
            dead_timeout_s=parts.settings.dead_timeout_s,
        )
    except BaseException:
        for link in links:
            link.cut()
        raise
    return links, index


async def _first_links(place: Place, owner: Owner, certificates: Path | None) -> tuple[Link, ...]:
    """Over the first way that works. Raises what the last one did."""
    error: CairnError = no_port_at(place, tls=certificates is not None)
    for target in place.targets:
        try:
            return await open_links(target, owner.client, owner.connections, _FIRST_LINK_S, certificates)
        except CairnError as failed:
            error = failed
    raise error


# ---- detaching


async def detach(settings: AttachSettings, name: str, *, force: bool, host: Host | None = None) -> pb.Volume:
    """Detach the volume, or what the device has; control's word on it.

    Raises NotFound where it is not attached on this host, and Conflict where it is in use, unless `force`.
    """
    host = host or Host()
    async with control_at(settings.control, settings.client, _FIRST_CALL_S) as control, kernel_nbd() as nbd:
        device = await _find(host, control, name)
        assert device.owner is not None
        if not force:
            await control.volume(device.owner.volume)  # so that nothing is begun that control cannot end
        await asyncio.to_thread(_let_go, host, device, force)
        await nbd.ask(Request(Command.DISCONNECT, index=device.index))
        await _until_unwatched(host, device.owner.volume)
        try:
            return await _detach_at_control(control, device.owner, force)
        except CairnError as error:
            raise type(error)(
                f"{device.path} is disconnected, and {device.owner.volume} is not detached yet: {error}; "
                "`cairn volume detach` does that"
            ) from error


async def _detach_at_control(control: Whereabouts, owner: Owner, force: bool) -> pb.Volume:
    found = await control.volume(owner.volume)
    if found.attachment.client != owner.client:
        return found  # it was taken over, and is not ours to detach
    detached = await control.detach(owner.volume, force=force)
    if detached.HasField("attachment"):
        raise QuorumUnavailable(f"front-end {detached.attachment.front_end} has not let go of it yet, and goes on")
    return detached


async def _find(host: Host, control: Whereabouts, name: str) -> LocalDevice:
    attached = [each for each in host.devices() if each.owner is not None]
    if is_device_name(name):
        found = [each for each in attached if each.index == device_index(name)]
    else:
        found = [each for each in attached if each.owner and each.owner.volume == name]
        if not found and attached:
            volume = (await control.volume(name)).id
            found = [each for each in attached if each.owner and each.owner.volume == volume]
    if not found:
        raise NotFound(f"{name} is not attached on this host: `cairn attach --list` shows what is")
    return found[0]


def _let_go(host: Host, device: LocalDevice, force: bool) -> None:
    """Flush it, and make sure that nobody has it. force: neither stops it."""
    if force:
        return
    if device.used_by or host.is_claimed(device.index):
        uses = ", ".join(device.used_by) or "something has it open for itself"
        raise Conflict(f"{device.path} is in use ({uses}): unmount it first, or lose what is open with --force")
    if device.read_only:
        return
    try:
        host.flush(device.index)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC):
            raise CairnError(f"{device.path} cannot be flushed: {error}; --force detaches it all the same") from error
        raise


async def _until_unwatched(host: Host, volume: str) -> None:
    """Its supervisor has seen that the device is gone: it asks control for nothing any more."""
    try:
        async with asyncio.timeout(_ENDS_WITHIN_S):
            while host.is_watched(volume):  # noqa: ASYNC110 - another process's lock
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise Conflict(f"the `cairn attach` of {volume} does not end: end it, then detach the volume again") from error


def usable(connections: int) -> int:
    """How many links this host's kernel would use of so many.

    It has a queue for each processor, or for each socket if those are fewer, and the first of several sockets is of no
    use (`stand_in`): so one less than there are processors, and at least one.
    """
    most = max(1, (os.cpu_count() or 1) - 1)
    if connections > most:
        _log.warning("this host has not processors enough for so many links", wanted=connections, links=most)
    return min(connections, most)


def check_wanted(wanted: Wanted) -> None:
    """Raises InvalidRequest for a device's name that is none, and for a volume that looks like a device."""
    if wanted.device:
        device_index(wanted.device)
    if is_device_name(wanted.volume):
        raise InvalidRequest(f"{wanted.volume!r} is a device: name the volume first, then the device")
