"""Where a volume is served for this client: what control is asked, and what is held to when it does not answer."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from blockstore.errors import CairnError, Conflict, Fenced, NotFound, QuorumUnavailable
from blockstore.grpc_endpoint import open_control_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc.control_pb2_grpc import ControlStub
from nbd_server.uri import NbdTarget, parse_uri

if TYPE_CHECKING:
    from blockstore.rpc.control_pb2_grpc import ControlAsyncStub

Response = TypeVar("Response")


class Taken(CairnError):
    """The volume is another client's now, or is no more: there is nothing to go on with."""

    codes = Fenced.codes


@dataclass(frozen=True, slots=True)
class Place:
    """Where it is served. targets: the ways to one front-end; a unix socket, where it is on this host, first."""

    front_end: str
    epoch: int
    size_bytes: int
    targets: tuple[NbdTarget, ...]


class Whereabouts:
    """Control's word on one volume.

    client: this host. tls: it uses no network but by TLS. Each call has a deadline of `timeout_s`, and raises what
    control answers.
    """

    def __init__(self, stub: "ControlAsyncStub", address: str, client: str, timeout_s: float, *, tls: bool) -> None:
        self._stub = stub
        self._address = address
        self._client = client
        self._timeout_s = timeout_s
        self._tls = tls

    def set_timeout(self, timeout_s: float) -> None:
        """Of the calls from now on."""
        self._timeout_s = timeout_s

    async def volume(self, volume: str) -> pb.Volume:
        """The volume of that id or name."""
        return await self._call(self._stub.GetVolume, pb.GetVolumeRequest(volume=volume))

    async def attach(self, volume: str, *, read_only: bool, force: bool = False, avoid: str = "") -> Place:
        """Have it served somewhere for this client: where it is, or where that front-end is down, elsewhere.

        Raises Taken where it is another client's or gone. What else is raised may be otherwise in a moment: control
        does not answer, no front-end can serve it now, or it is being detached.
        """
        request = pb.AttachVolumeRequest(
            volume=volume, client=self._client, read_only=read_only, force=force, avoid=avoid
        )
        try:
            return place_of(await self._call(self._stub.AttachVolume, request), tls=self._tls)
        except Conflict:
            await self._check_ours(volume)
            raise
        except NotFound as error:
            raise Taken(str(error)) from error

    async def detach(self, volume: str, *, force: bool = False) -> pb.Volume:
        """Nobody's any more."""
        return await self._call(self._stub.DetachVolume, pb.DetachVolumeRequest(volume=volume, force=force))

    async def _check_ours(self, volume: str) -> None:
        """Raises Taken where it is attached for somebody else."""
        found = await self.volume(volume)
        if found.HasField("attachment") and found.attachment.client != self._client:
            whom = f"client {found.attachment.client}" if found.attachment.client else "any NBD client"
            raise Taken(
                f"{volume} is attached for {whom} at {found.attachment.front_end}: detach it there, or take it over "
                "with --force"
            )

    async def _call(self, method: Callable[..., Awaitable[Response]], request: Any) -> Response:
        with cairn_errors(f"control at {self._address}"):
            return await method(request, timeout=self._timeout_s)


@asynccontextmanager
async def control_at(address: str, client: str, timeout_s: float, *, tls: bool = False) -> AsyncIterator[Whereabouts]:
    """Control at HOST:PORT; whether it answers shows with the first call. For the rest, see Whereabouts."""
    async with open_control_channel(address) as channel:
        yield Whereabouts(ControlStub(channel), address, client, timeout_s, tls=tls)


def place_of(volume: pb.Volume, *, tls: bool = False) -> Place:
    """Where an attached volume is served: at ports with TLS, or at those without; unix sockets need none."""
    attachment = volume.attachment
    known = (parse_uri(uri) for uri in attachment.uris)
    usable = (each for each in known if each.tls == tls or (each.socket_path and not each.tls))
    targets = sorted(usable, key=lambda each: not each.socket_path)
    return Place(attachment.front_end, attachment.epoch, volume.size_bytes, tuple(targets))


def no_port_at(place: Place, *, tls: bool) -> QuorumUnavailable:
    """For a place without targets: what there is, this host does not use."""
    how = (
        "has no TLS: leave --tls-certificates out, or give it some" if tls else "needs TLS: give --tls-certificates DIR"
    )
    return QuorumUnavailable(f"{place.front_end} has no port for this host: it {how}")
