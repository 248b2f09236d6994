"""Waiting for a volume: until it is served to NBD clients, reached a state, or is let go of."""

import asyncio
from collections.abc import Callable

from blockstore.cli import documents
from blockstore.cli.client import ATTACH_TIMEOUT_S, POLL_S, ControlClient, wait_until
from blockstore.errors import Conflict, NotFound, QuorumUnavailable
from blockstore.rpc import control_pb2 as pb


async def attach_and_wait(
    client: ControlClient, request: pb.AttachVolumeRequest, wait_s: float, update: Callable[[str], None]
) -> pb.Volume:
    """Attach, and wait until it is served; `update` is told how far it is.

    Raises what control answers, QuorumUnavailable where it is not served after `wait_s` seconds (it
    stays attached, and the front-end keeps trying), and Conflict where somebody detached it meanwhile.
    """
    volume = await client.volume(request.volume)
    attaching = asyncio.create_task(client.call(client.stub.AttachVolume, request, ATTACH_TIMEOUT_S))
    try:
        while not (await asyncio.wait({attaching}, timeout=POLL_S))[0]:
            update(_how_far(await client.health(volume.id)))
    finally:
        if not attaching.done():
            attaching.cancel()
    return await _until_served(client, attaching.result(), wait_s, update)


async def _until_served(
    client: ControlClient, volume: pb.Volume, wait_s: float, update: Callable[[str], None]
) -> pb.Volume:
    why = "nothing is known of it yet"

    async def served() -> pb.Volume | None:
        nonlocal why
        health = await client.health(volume.id)
        if health is None or not health.volume.HasField("attachment"):
            reason = f": {health.volume.reason}" if health and health.volume.reason else ""
            raise Conflict(f"{volume.id} was detached while it was being attached{reason}")
        why = _how_far(health)
        update(why)
        return health.volume if health.serving == "serving" and health.volume.attachment.uris else None

    if not wait_s:
        return volume
    return await wait_until(
        served,
        wait_s,
        lambda: QuorumUnavailable(
            f"{volume.id} is attached, but not served after {wait_s:.0f} s: {why}; "
            "the front-end keeps trying, see `cairn status`"
        ),
    )


def _how_far(health: pb.VolumeHealth | None) -> str:
    """What the volume waits for, in one line."""
    if health is None:
        return "control does not know the volume yet"
    parts = [f"{health.volume.id} is {health.serving or documents.volume_state(health.volume)}"]
    parts += [health.volume.reason] if health.volume.reason else []
    for each in health.replicas:
        if each.state != "up":
            copied = f" {each.extents_done}/{each.extents_total}" if each.extents_total else ""
            parts.append(f"{each.node} {each.state}{copied}")
    return ", ".join(parts)


async def until_state(
    client: ControlClient,
    volume: pb.Volume,
    state: pb.VolumeState.ValueType,
    wait_s: float,
    update: Callable[[str], None] = lambda _: None,
) -> pb.Volume:
    """The volume once it is in `state`; as it is where there is no time to wait. `update` is told what it waits for.

    Raises QuorumUnavailable after `wait_s` seconds, and Conflict where it ends in `error`.
    """
    latest = volume

    async def reached() -> pb.Volume | None:
        nonlocal latest
        latest = await client.volume(volume.id)
        if latest.state == pb.VOLUME_STATE_ERROR:
            raise Conflict(f"{volume.id} is in error: {latest.reason}")
        if latest.state != state:
            update(f"{volume.id} is {documents.volume_state(latest)}{': ' + latest.reason if latest.reason else ''}")
        return latest if latest.state == state else None

    if volume.state == state or not wait_s:
        return volume
    return await wait_until(
        reached,
        wait_s,
        lambda: QuorumUnavailable(
            f"{volume.id} is still {documents.volume_state(latest)} after {wait_s:.0f} s"
            f"{': ' + latest.reason if latest.reason else ''}; it goes on by itself, see `cairn volume show`"
        ),
    )


async def until_detached(
    client: ControlClient, volume: pb.Volume, wait_s: float, update: Callable[[str], None]
) -> pb.Volume:
    """The volume once its front-end has let go of it; as it is where there is no time to wait.

    Raises QuorumUnavailable after `wait_s` seconds, and Conflict where somebody attached it again meanwhile.
    """
    waits_for = ""

    async def let_go() -> pb.Volume | None:
        nonlocal waits_for
        health = await client.health(volume.id)
        if health is None:
            raise NotFound(f"{volume.id} was deleted meanwhile")
        now = health.volume
        if not now.HasField("attachment"):
            return now
        if now.attachment.state != pb.ATTACHMENT_STATE_DETACHING:
            raise Conflict(f"{volume.id} was detached, and attached again meanwhile, to {now.attachment.front_end}")
        waits_for = _who_keeps(health)
        update(f"{volume.id} is being detached: {waits_for}")
        return None

    if volume.state == pb.VOLUME_STATE_AVAILABLE or not wait_s:
        return volume
    return await wait_until(
        let_go,
        wait_s,
        lambda: QuorumUnavailable(
            f"{volume.id} is not detached after {wait_s:.0f} s: {waits_for}; it goes on by itself, see "
            "`cairn volume show`; --force does not wait"
        ),
    )


def _who_keeps(health: pb.VolumeHealth) -> str:
    """What a volume that is being detached waits for."""
    front_end = health.volume.attachment.front_end
    if not health.serving:
        return f"front-end {front_end} does not answer"
    if not health.clients:
        return f"front-end {front_end} lets go of it"
    whom = "an NBD client has" if health.clients == 1 else f"{health.clients} NBD clients have"
    return f"{whom} requests in flight at front-end {front_end}, which disconnects them after its --drain-s"


async def recovery_needed(client: ControlClient, volume: str) -> pb.VolumeHealth:
    """How a volume in `error` does. Raises Conflict for one that needs no recovery, NotFound where there is none."""
    found = await client.volume(volume)
    if found.state != pb.VOLUME_STATE_ERROR:
        raise Conflict(
            f"{volume} is {documents.volume_state(found)} and needs no recovery: only a volume in error does"
        )
    health = await client.health(found.id)
    if health is None:
        raise NotFound(f"no volume {volume!r}: `cairn volume list` shows all")
    return health
