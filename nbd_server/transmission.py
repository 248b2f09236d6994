"""The transmission phase: which requests may run, and what a client is told of those that may not, or failed. Pure.

`refusal` says whether a request may run, by `RULES` and what was negotiated; `failure`, what the client is told of one
that ended with an error: validating, doing and translating are three functions. Requests come out of bytes in
request_parser.py; replies are made in replies.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from blockstore.errors import CairnError
from blockstore.units import MIB
from blockstore.values import value
from nbd_server import wire
from nbd_server.terms import Style, Terms
from nbd_server.wire import Command, CommandFlag, WireError

#: Longest READ and WRITE; NBD, "Block size constraints", lets clients assume it.
MAX_REQUEST_BYTES: Final = 32 * MIB


class Refusal(NamedTuple):
    """Why a request is refused, or failed. why: for people. offset: of the first byte that is concerned, if one is."""

    error: int
    why: str
    offset: int | None = None


@value
class Request:
    """What a client asks for.

    command, flags: maybe none that are known, and then it is refused. offset, length: in bytes; of a BLOCK_STATUS with
    a payload, length is the payload's. payload: what came with a request that is to run, its owner's alone.
    """

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes | bytearray | None = None
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds for one command (NBD, "Request types", "Command flags" and "Error values").

    flags: those that it may have. required: those that it must have.
    """

    flags: int
    changes: bool
    beyond_end: WireError
    max_bytes: int
    required: int = 0


# Requests without a payload are bound by their header alone.
_ANY_LENGTH: Final = (1 << 64) - 1
_FUA, _PAYLOAD_LEN = int(CommandFlag.FUA), int(CommandFlag.PAYLOAD_LEN)
_ZEROES: Final = _FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO

_SIMPLE: Final[Mapping[int, Rule]] = {
    Command.READ: Rule(_FUA, False, WireError.EINVAL, MAX_REQUEST_BYTES),
    Command.WRITE: Rule(_FUA, True, WireError.ENOSPC, MAX_REQUEST_BYTES),
    Command.FLUSH: Rule(_FUA, False, WireError.EINVAL, 0),
    Command.TRIM: Rule(_FUA, True, WireError.EINVAL, _ANY_LENGTH),
    Command.CACHE: Rule(_FUA, False, WireError.EINVAL, _ANY_LENGTH),
    Command.WRITE_ZEROES: Rule(_ZEROES, True, WireError.ENOSPC, _ANY_LENGTH),
}
_STRUCTURED: Final[Mapping[int, Rule]] = {
    **_SIMPLE,
    Command.READ: Rule(_FUA | CommandFlag.DF, False, WireError.EINVAL, MAX_REQUEST_BYTES),
    Command.BLOCK_STATUS: Rule(_FUA | CommandFlag.REQ_ONE, False, WireError.EINVAL, _ANY_LENGTH),
}
RULES: Final[Mapping[Style, Mapping[int, Rule]]] = {
    Style.SIMPLE: _SIMPLE,
    Style.STRUCTURED: _STRUCTURED,
    Style.EXTENDED: {
        **_STRUCTURED,
        Command.WRITE: Rule(_FUA | _PAYLOAD_LEN, True, WireError.ENOSPC, MAX_REQUEST_BYTES, required=_PAYLOAD_LEN),
        Command.BLOCK_STATUS: Rule(_FUA | CommandFlag.REQ_ONE | _PAYLOAD_LEN, False, WireError.EINVAL, _ANY_LENGTH),
    },
}


def changes(request: Request) -> bool:
    """Whether the request, which may run, changes what the export holds."""
    return _SIMPLE[request.command].changes if request.command in _SIMPLE else False


def refusal(request: Request, size_bytes: int, read_only: bool, terms: Terms) -> Refusal | None:
    """Why `request` may not run on an export of that size; None where it may."""
    rule = RULES[terms.style].get(request.command)
    if rule is None:
        return Refusal(WireError.EINVAL, f"command {request.command} is not known here, or was not negotiated")
    if request.flags & ~rule.flags or rule.required & ~request.flags:
        return _refuse_flags(request, rule)
    if request.command >= Command.FLUSH and (refused := _refuse_by_command(request, terms)) is not None:
        return refused
    if read_only and rule.changes:
        return Refusal(WireError.EPERM, "the export is read-only")
    return _refuse_range(request, size_bytes, rule)


def _refuse_range(request: Request, size_bytes: int, rule: Rule) -> Refusal | None:
    if request.length > rule.max_bytes:
        return Refusal(WireError.EINVAL, f"{request.length} bytes: at most {rule.max_bytes} in one request")
    if request.offset + request.length > size_bytes and not _has_filter(request):
        return beyond_end(request, size_bytes, rule)
    return None


def _refuse_flags(request: Request, rule: Rule) -> Refusal:
    wrong, lacking = request.flags & ~rule.flags, rule.required & ~request.flags
    why = f"flags {wrong:#x} are not allowed" if wrong else f"flags {lacking:#x} are missing"
    return Refusal(WireError.EINVAL, f"{why} for command {request.command} as it was negotiated")


def _refuse_by_command(request: Request, terms: Terms) -> Refusal | None:
    """What holds for one command alone."""
    if request.command == Command.FLUSH and request.offset:
        return Refusal(WireError.EINVAL, "a flush has neither offset nor length")
    if request.command == Command.BLOCK_STATUS:
        if not terms.contexts:
            return Refusal(WireError.EINVAL, "no metadata context was selected for this export")
        if _has_filter(request):
            return _refuse_filter(request.length, len(terms.contexts))
        if not request.length:
            return Refusal(WireError.EINVAL, "the status of no byte at all")
    return None


def _refuse_filter(length: int, contexts: int) -> Refusal | None:
    """Of a payload that names contexts (NBD, "Request types", NBD_CMD_BLOCK_STATUS)."""
    count, rest = divmod(length - wire.STATUS_FILTER_BYTES, wire.CONTEXT_ID_BYTES)
    if rest or not 0 < count <= contexts:
        return Refusal(WireError.EINVAL, f"a payload of {length} bytes: it names 1 to {contexts} contexts")
    return None


def _has_filter(request: Request) -> bool:
    return request.command == Command.BLOCK_STATUS and bool(request.flags & _PAYLOAD_LEN)


def beyond_end(request: Request, size_bytes: int, rule: Rule) -> Refusal:
    """Of a request that does not lie inside the export."""
    why = f"bytes {request.offset} to {request.offset + request.length} reach beyond the end at {size_bytes}"
    return Refusal(rule.beyond_end, why, max(request.offset, size_bytes) if request.length else None)


_ON_THE_WIRE: Final = frozenset(int(error) for error in WireError)


def wire_error(command: int, error: BaseException) -> int:
    """What the client is told where `command` ended with `error`.

    The table of blockstore.errors, save for what the NBD text does not allow in a reply: EIO then.
    """
    codes = error.codes if isinstance(error, CairnError) else CairnError.codes
    code = codes.nbd_write if command in (Command.WRITE, Command.WRITE_ZEROES) else codes.nbd_other
    return code if code in _ON_THE_WIRE else WireError.EIO


def failure(command: int, error: BaseException) -> Refusal:
    """The same with words. What nobody foresaw is in the server's log alone."""
    why = str(error) if isinstance(error, CairnError) else "the server failed in a way that nobody foresaw: see its log"
    return Refusal(wire_error(command, error), why)
