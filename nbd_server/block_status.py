"""BLOCK_STATUS: what was asked, what the device is asked for it, and the descriptors that answer it.

Contexts that say what blocks are share one question to the device; each snapshot's changes are one more. Descriptors
are whole blocks but at the ends, none has the status of the one before it, and those that reach beyond the request are
cut: so REQ_ONE is the first of them. An answer may end early (NBD, "Structured reply types", BLOCK_STATUS).

Invariant: bytes that are told to read as zeroes did so at some moment between the request and its answer.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from blockstore.units import BLOCK_SIZE
from nbd_server import wire
from nbd_server.device import Device
from nbd_server.metadata import Extent, changed_flags, shown_flags
from nbd_server.replies import Answer
from nbd_server.terms import Context, Terms
from nbd_server.transmission import RULES, Refusal, Request, beyond_end
from nbd_server.wire import Command, CommandFlag, WireError

#: Of one context in one answer: 64 KiB with extended headers, half of that else.
MAX_DESCRIPTORS: Final = 4096
#: Longest that a compact descriptor can say, in whole blocks.
_COMPACT_LENGTH: Final = (1 << 32) - BLOCK_SIZE
#: Of a descriptor, as long as it is not on the wire yet.
_DESCRIPTOR_BYTES: Final = 128


def memory_bytes(request: Request, terms: Terms) -> int:
    """What the answer may take at most, however the blocks lie, from its first context on until it is sent."""
    if request.flags & CommandFlag.PAYLOAD_LEN:
        named = max(0, request.length - wire.STATUS_FILTER_BYTES) // wire.CONTEXT_ID_BYTES
        contexts, descriptors = min(named, len(terms.contexts)), MAX_DESCRIPTORS
    else:
        contexts, descriptors = len(terms.contexts), min(MAX_DESCRIPTORS, request.length // BLOCK_SIZE + 2)
    if request.flags & CommandFlag.REQ_ONE:
        descriptors = 1
    return contexts * descriptors * _DESCRIPTOR_BYTES


def asked(request: Request, terms: Terms, size_bytes: int) -> tuple[Request, tuple[Context, ...]] | Refusal:
    """What a BLOCK_STATUS asks for: the request with its length in the export, and of which contexts."""
    if not request.flags & CommandFlag.PAYLOAD_LEN or request.payload is None:
        return request, terms.contexts
    length, numbers = wire.parse_status_filter(request.payload)
    contexts = {context.number: context for context in terms.contexts}
    if len(set(numbers)) < len(numbers) or not contexts.keys() >= set(numbers):
        return Refusal(WireError.EINVAL, f"contexts {numbers}: {tuple(contexts)} were selected, each may be named once")
    request = replace(request, length=length, payload=None)
    if not length:
        return Refusal(WireError.EINVAL, "the status of no byte at all")
    if request.offset + length > size_bytes:
        return beyond_end(request, size_bytes, RULES[terms.style][Command.BLOCK_STATUS])
    return request, tuple(contexts[number] for number in numbers)


async def answer(request: Request, contexts: tuple[Context, ...], device: Device, *, compact: bool) -> Answer:
    """The descriptors of each context. Raises as the device does."""
    told: Answer = []
    shown = None
    for context in contexts:
        if not context.snapshot:
            if shown is None:
                shown = await device.shown(request.offset, request.length)
            runs: Iterable[Extent] = (Extent(run.length, shown_flags(context.name, run)) for run in shown)
        else:
            changes = await device.changed(request.offset, request.length, context.snapshot)
            runs = (Extent(run.length, changed_flags(run)) for run in changes)
        told.append((context, _extents(runs, request, compact=compact)))
    return told


def _extents(runs: Iterable[Extent], request: Request, *, compact: bool) -> list[Extent]:
    """Runs of blocks as descriptors of the request's bytes."""
    limit = 1 if request.flags & CommandFlag.REQ_ONE else MAX_DESCRIPTORS
    longest = _COMPACT_LENGTH if compact else request.length
    extents: list[Extent] = []
    end = request.offset + request.length
    at = request.offset
    stop = at - at % BLOCK_SIZE
    for length, flags in runs:
        stop += length * BLOCK_SIZE
        while at < min(stop, end):
            if extents and extents[-1].flags == flags and extents[-1].length < longest:
                piece = min(stop - at, end - at, longest - extents[-1].length)
                extents[-1] = Extent(extents[-1].length + piece, flags)
            elif len(extents) < limit:
                piece = min(stop - at, end - at, longest)
                extents.append(Extent(piece, flags))
            else:
                return extents
            at += piece
    assert extents, "a device tells at least one block"
    return extents
