"""A leader's records, and what a replica answers, on a stream of messages: a fixed header, then the records.

To make and to take apart a message of protobuf's, as gRPC's streams carry (blockstore.replica_codec), cost a fifth of
what a node did with a single write of 4 KiB. What a message seldom has is protobuf's here, too, and between the two.
All numbers are little-endian.

A message of records:

    check    xxh3-64 over the next three (8): TCP's own is no match for a position that is believed
    header   request (8), epoch (8), configuration (4), commit (16), end (16), size of the rest (4), records (4)
    sizes    of each record (4)
    rest     a ReplicateRequest with what is left: catch_up, acked, fill_anew; mostly empty
    records  with checksums of their own

An answer is a check over all that follows (8), a byte of flags, then request (8), matched (16), commit (16), end (16),
extents done (8) and in all (8); or, where a newer epoch was sealed, that flag, the epoch (8) and its configuration (4).
A position is epoch and sequence.
"""

import struct
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

import xxhash

from blockstore.domain import Position, ReplicaId
from blockstore.errors import Corrupt, InvalidRequest
from blockstore.grpc_payload import parse
from blockstore.message_stream import Message
from blockstore.replica_codec import MAX_BATCH_BYTES, rare_fields, to_acked, to_catch_up, to_records
from blockstore.replication.messages import Append, AppendAnswer, FencedBy
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import Epoch

_CHECK: Final = struct.Struct("<Q")
_HEADER: Final = struct.Struct("<QQIQQQQII")
_ANSWER: Final = struct.Struct("<BQQQQQQQQQ")
_FENCED: Final = struct.Struct("<BQI")
_HEADER_END: Final = _CHECK.size + _HEADER.size

#: What an answer says with one bit each.
_WHOLE, _FULL, _BEHIND, _DAMAGED, _FENCED_BY = 1, 2, 4, 8, 128
_ALL: Final = _WHOLE | _FULL | _BEHIND | _DAMAGED


class ReceivedAppend(NamedTuple):
    """peers: where the nodes of its catch_up are."""

    message: Append
    peers: Collection[pb.Peer]


def encode_append(message: Append, peer: Callable[[ReplicaId], pb.Peer]) -> list[bytes | memoryview]:
    """In parts. peer: where a member's node is."""
    has_rest = message.catch_up is not None or message.acked or message.fill_anew
    rest = rare_fields(message, peer).SerializeToString() if has_rest else b""
    records = [record.encoded for record in message.records]
    sizes = struct.pack(f"<{len(records)}I", *map(len, records))
    header = _HEADER.pack(
        message.request, message.epoch, message.configuration, *message.commit, *message.end, len(rest), len(records)
    )
    return [_with_check(header + sizes + rest), *records]


def decode_append(message: Message) -> ReceivedAppend:
    """Its records are views of `message`.

    Raises InvalidRequest where it is no such message or brings too much, Corrupt where a record fails a checksum.
    """
    if len(message) < _HEADER_END:
        raise InvalidRequest(f"a message of records of {len(message)} bytes")
    request, epoch, configuration, ce, cs, ee, es, rest_size, count = _HEADER.unpack_from(message, _CHECK.size)
    rest_at = _HEADER_END + 4 * count
    at = rest_at + rest_size
    if at > len(message):
        raise InvalidRequest(f"a message of {len(message)} bytes says that it has {count} records and {rest_size} more")
    view = memoryview(message)
    _verify(view[:at])
    ends = list(accumulate(struct.unpack_from(f"<{count}I", message, _HEADER_END), initial=at))
    if ends[-1] != len(message) or ends[-1] - at > MAX_BATCH_BYTES:
        raise InvalidRequest(f"{count} records of {ends[-1] - at} bytes in a message of {len(message)}")
    records = to_records([view[start:end] for start, end in pairwise(ends)])
    commit, end = Position._make((ce, cs)), Position._make((ee, es))
    append = Append(Epoch(epoch), configuration, request, commit, end, records)
    if not rest_size:
        return ReceivedAppend(append, ())
    rest = parse(pb.ReplicateRequest, bytes(view[rest_at:at]))
    append = replace(append, catch_up=to_catch_up(rest), acked=to_acked(rest.acked), fill_anew=rest.fill_anew)
    return ReceivedAppend(append, rest.catch_up.peers)


def encode_answer(answer: AppendAnswer | FencedBy) -> bytes:
    if isinstance(answer, FencedBy):
        return _with_check(_FENCED.pack(_FENCED_BY, answer.epoch, answer.configuration))
    flags = answer.whole * _WHOLE | answer.full * _FULL | answer.behind * _BEHIND | answer.damaged * _DAMAGED
    positions = (*answer.matched, *answer.commit, *answer.end)
    return _with_check(_ANSWER.pack(flags, answer.request, *positions, answer.extents_done, answer.extents_total))


def decode_answer(message: Message, epoch: Epoch) -> AppendAnswer | FencedBy:
    """epoch: that of the stream which it came on. Raises InvalidRequest and Corrupt."""
    flags = message[_CHECK.size] if len(message) > _CHECK.size else 0
    layout = _FENCED if flags == _FENCED_BY else _ANSWER
    if len(message) != _CHECK.size + layout.size or (layout is _ANSWER and flags & ~_ALL):
        raise InvalidRequest(f"{len(message)} bytes with flags {flags:#x} are no answer to records")
    _verify(memoryview(message))
    if layout is _FENCED:
        _, newer, newer_configuration = _FENCED.unpack_from(message, _CHECK.size)
        return FencedBy(Epoch(newer), newer_configuration)
    _, request, me, ms, ce, cs, ee, es, done, total = _ANSWER.unpack_from(message, _CHECK.size)
    return AppendAnswer(
        epoch, request, Position._make((me, ms)), Position._make((ce, cs)), Position._make((ee, es)),
        bool(flags & _WHOLE), bool(flags & _FULL), bool(flags & _BEHIND), done, total, bool(flags & _DAMAGED),
    )  # fmt: skip


def _with_check(content: bytes) -> bytes:
    return _CHECK.pack(xxhash.xxh3_64_intdigest(content)) + content


def _verify(checked: memoryview) -> None:
    """Raises Corrupt where the check that it begins with is not that of the rest."""
    if _CHECK.unpack_from(checked)[0] != xxhash.xxh3_64_intdigest(checked[_CHECK.size :]):
        raise Corrupt("what came on a stream of records fails its checksum")
