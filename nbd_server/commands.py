"""What each command asks of the device, once its request was found good.

`start` begins a request, or says why it is refused after all, for a reason that only the device or the payload tells;
nothing was changed then.
"""

import asyncio
from typing import Any, Final

from nbd_server import block_status
from nbd_server.device import Device
from nbd_server.terms import Style, Terms
from nbd_server.transmission import MAX_REQUEST_BYTES, Refusal, Request
from nbd_server.wire import Command, CommandFlag, WireError

_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)


def memory_bytes(request: Request, terms: Terms) -> int:
    """What a request takes until its client has the answer: the payload, the result of a read, descriptors at most.

    0 also where it is too long to be good.
    """
    if request.command <= _WRITE:
        return request.length if request.length <= MAX_REQUEST_BYTES else 0
    return block_status.memory_bytes(request, terms) if request.command == Command.BLOCK_STATUS else 0


def start(request: Request, device: Device, terms: Terms) -> asyncio.Future[Any] | Refusal:
    """Any request but DISC. The result of a READ is its data, that of a BLOCK_STATUS the descriptors."""
    if request.command == _READ:
        return device.read(request.offset, request.length)
    if request.command == _WRITE:
        return device.write(request.offset, request.payload or b"")
    return _start_without_data(request, device, terms)


def _start_without_data(request: Request, device: Device, terms: Terms) -> asyncio.Future[Any] | Refusal:
    if request.command == Command.FLUSH:
        return device.flush()
    if request.command == Command.TRIM:
        return device.trim(request.offset, request.length)
    if request.command == Command.WRITE_ZEROES:
        return _zero(request, device)
    if request.command == Command.CACHE:
        return device.cache(request.offset, request.length)
    return _tell_status(request, device, terms)


def _zero(request: Request, device: Device) -> asyncio.Future[Any] | Refusal:
    """FAST_ZERO: refused before anything is changed (NBD, "Request types", NBD_CMD_WRITE_ZEROES)."""
    if request.flags & CommandFlag.FAST_ZERO and not device.zero_is_fast(request.offset, request.length):
        return Refusal(WireError.ENOTSUP, "zeroes are no faster here than a write: parts of blocks, or of a snapshot")
    return device.zero(request.offset, request.length, allocate=bool(request.flags & CommandFlag.NO_HOLE))


def _tell_status(request: Request, device: Device, terms: Terms) -> asyncio.Future[Any] | Refusal:
    assert request.command == Command.BLOCK_STATUS
    found = block_status.asked(request, terms, device.size_bytes)
    if isinstance(found, Refusal):
        return found
    work = block_status.answer(*found, device, compact=terms.style is not Style.EXTENDED)
    return asyncio.get_running_loop().create_task(work)
