"""The messages of blockstore.replication as those of replica.proto, and back.

Records and what reads bring are the hot path, and bytes already. So their messages are put together
and taken apart by hand (blockstore.grpc_payload).
"""

import struct
from collections.abc import Callable, Collection, Iterable
from typing import Final, NamedTuple

import xxhash

from blockstore.domain import (
    Member,
    Position,
    ReplicaAddress,
    ReplicaId,
    SegmentNumber,
    TablesPlace,
    VolumeId,
    check_id,
)
from blockstore.errors import Corrupt, Fenced, InvalidRequest
from blockstore.grpc_payload import cut_out, fields_of, parse, put_in, tag_of, varint
from blockstore.record import MAX_RECORD_SIZE, Record, decode_record
from blockstore.replication.messages import (
    AckedPositions,
    Append,
    AppendAnswer,
    CatchUp,
    FencedBy,
    SealAnswer,
    SealEpoch,
)
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import BLOCK_SIZE, KIB, MAX_RECORD_PAYLOAD, Epoch, Generation, Sequence

#: Of one message: a full record, or many small ones.
MAX_BATCH_BYTES: Final = MAX_RECORD_SIZE
#: Of one segment, old members included: none has nearly as many.
_MAX_MEMBERS: Final = 32
#: What the greetings of streams of messages begin with; the number is that of this encoding.
REPLICATE_GREETING: Final = b"cairn 2 records"
READ_GREETING: Final = b"cairn 1 reads"
GENERATION_GREETING: Final = b"cairn 1 generations"
#: Up to here protobuf takes a message with its records apart in less time than we need to find them in it.
_SMALL_MESSAGE_BYTES: Final = 16 * KIB
_RESULT: Final = struct.Struct("<QII")
_RECORDS_TAG: Final = tag_of(pb.ReplicateRequest.RECORDS_FIELD_NUMBER)


def greeting_to(kind: bytes, address: ReplicaAddress) -> bytes:
    """What a stream to this replica begins with. kind: one of the greetings' beginnings."""
    return b" ".join((kind, address.volume.encode(), str(address.segment).encode(), address.replica.encode()))


def to_position(message: pb.Position) -> Position:
    return Position(Epoch(message.epoch), Sequence(message.sequence))


def from_position(position: Position) -> pb.Position:
    return pb.Position(epoch=position.epoch, sequence=position.sequence)


def make_target(address: ReplicaAddress, epoch: int, configuration: int) -> pb.Target:
    return pb.Target(
        volume=address.volume,
        segment=address.segment,
        replica=address.replica,
        epoch=epoch,
        configuration=configuration,
    )


def _from_acked(acked: AckedPositions) -> list[pb.Acked]:
    return [pb.Acked(replica=replica, position=from_position(position)) for replica, position in acked]


def to_acked(messages: Collection[pb.Acked]) -> AckedPositions:
    """They are kept: raises InvalidRequest where these are no replicas, or too many."""
    if len(messages) > _MAX_MEMBERS:
        raise InvalidRequest(f"positions of {len(messages)} members, {_MAX_MEMBERS} at most")
    return tuple((ReplicaId(check_id("rep", each.replica)), to_position(each.position)) for each in messages)


def to_address(target: pb.Target) -> ReplicaAddress:
    return ReplicaAddress(VolumeId(target.volume), SegmentNumber(target.segment), ReplicaId(target.replica))


def to_records(encoded: Iterable[bytes | memoryview]) -> tuple[Record, ...]:
    """Records that came from outside; every checksum is verified. Raises Corrupt."""
    return tuple(decode_record(each) for each in encoded)


# ---- what a leader sends


def encode_seal(
    address: ReplicaAddress, message: SealEpoch, peers: Iterable[pb.Peer], known: Position
) -> pb.SealEpochRequest:
    return pb.SealEpochRequest(
        target=make_target(address, message.epoch, message.configuration),
        peers=peers,
        known=from_position(known),
        connection=message.connection,
    )


def decode_seal(request: pb.SealEpochRequest) -> SealEpoch:
    target = request.target
    return SealEpoch(Epoch(target.epoch), target.configuration, to_position(request.known), request.connection)


def encode_replicate(target: bytes, message: Append, peer: Callable[[ReplicaId], pb.Peer]) -> list[bytes | memoryview]:
    """A serialized ReplicateRequest, in parts. target: the serialized field of a request with only its target."""
    rest = rare_fields(message, peer)
    rest.request = message.request
    rest.commit.CopyFrom(from_position(message.commit))
    rest.end.CopyFrom(from_position(message.end))
    parts: list[bytes | memoryview] = [target, rest.SerializeToString()]
    for record in message.records:
        parts += (_RECORDS_TAG + varint(len(record.encoded)), record.encoded)
    return parts


def rare_fields(message: Append, peer: Callable[[ReplicaId], pb.Peer]) -> pb.ReplicateRequest:
    """A request with only what most messages lack. peer: where a member's node is."""
    rest = pb.ReplicateRequest(acked=_from_acked(message.acked), fill_anew=message.fill_anew)
    if message.catch_up is not None:
        rest.catch_up.target.CopyFrom(from_position(message.catch_up.target))
        rest.catch_up.base.CopyFrom(from_position(message.catch_up.base))
        rest.catch_up.peers.extend(peer(each) for each in message.catch_up.peers)
    return rest


def encode_target(address: ReplicaAddress, epoch: int, configuration: int) -> bytes:
    """For encode_replicate: it is the same in every message of a stream."""
    return pb.ReplicateRequest(target=make_target(address, epoch, configuration)).SerializeToString()


def decode_replicate(message: bytes | bytearray) -> tuple[pb.ReplicateRequest, Append]:
    """A serialized ReplicateRequest, of which nobody asks the records, and what it says; they may be views of it.

    Raises Corrupt where a record fails a checksum, InvalidRequest where it is no such message or
    brings too much.
    """
    if len(message) <= _SMALL_MESSAGE_BYTES:
        request = parse(pb.ReplicateRequest, message)
        encoded: list[bytes | memoryview] = list(request.records)
    else:
        request, encoded = _cut_out_records(message)
    if sum(map(len, encoded)) > MAX_BATCH_BYTES:
        raise InvalidRequest(f"a batch of more than {MAX_BATCH_BYTES} bytes of records")
    return request, _to_append(request, to_records(encoded))


def _cut_out_records(message: bytes | bytearray) -> tuple[pb.ReplicateRequest, list[bytes | memoryview]]:
    """A serialized ReplicateRequest without its records; these, as they lie in it."""
    rest: list[memoryview] = []
    encoded: list[bytes | memoryview] = []
    view = memoryview(message)
    for number, start, value, end in fields_of(message):
        if number == pb.ReplicateRequest.RECORDS_FIELD_NUMBER:
            encoded.append(view[value:end])
        else:
            rest.append(view[start:end])
    return parse(pb.ReplicateRequest, b"".join(rest)), encoded


def _to_append(request: pb.ReplicateRequest, records: tuple[Record, ...]) -> Append:
    return Append(
        Epoch(request.target.epoch),
        request.target.configuration,
        request.request,
        to_position(request.commit),
        to_position(request.end),
        records,
        to_catch_up(request),
        to_acked(request.acked),
        request.fill_anew,
    )


def to_catch_up(request: pb.ReplicateRequest) -> CatchUp | None:
    if not request.HasField("catch_up"):
        return None
    peers = tuple(ReplicaId(peer.replica) for peer in request.catch_up.peers)
    return CatchUp(to_position(request.catch_up.target), to_position(request.catch_up.base), peers)


# ---- reads


class ReadResults(NamedTuple):
    """What a ReadResponse says.

    results: (request, blocks, status) of each range. payload: the blocks of all, one after the other.
    message: what refusals say. absent: by request, the runs of blocks (first, count) that have no entry,
    counted from the start of the range; only of a replica with a source.
    """

    results: list[tuple[int, int, int]]
    payload: memoryview
    message: str
    absent: dict[int, list[tuple[int, int]]]


def encode_read_response(results: bytes, payload: list[bytes], message: str, absent: bytes = b"") -> list[bytes]:
    """A serialized ReadResponse, in parts.

    results: as result_entry makes them; payload: theirs, in order; absent: as absent_entry makes them.
    """
    digest = xxhash.xxh3_64(seed=_payload_seed(results, absent))
    for piece in payload:
        digest.update(piece)
    rest = pb.ReadResponse(results=results, checksum=digest.intdigest(), message=message, absent=absent)
    return put_in(rest, pb.ReadResponse.PAYLOAD_FIELD_NUMBER, payload)


def _payload_seed(results: bytes, absent: bytes) -> int:
    seed = xxhash.xxh3_64_intdigest(results)
    return xxhash.xxh3_64_intdigest(absent, seed) if absent else seed


def result_entry(request: int, blocks: int, status: int) -> bytes:
    """One entry of ReadResponse.results."""
    return _RESULT.pack(request, blocks, status)


def absent_entry(request: int, first: int, count: int) -> bytes:
    """One entry of ReadResponse.absent: `count` blocks from the range's block `first` on have no entry."""
    return _RESULT.pack(request, first, count)


def decode_read_response(message: bytes | bytearray) -> ReadResults:
    """Of a serialized ReadResponse, every number checked.

    Raises InvalidRequest where it is no such message, Corrupt where the payload fails its checksum.
    """
    response, payload = cut_out(pb.ReadResponse, message, pb.ReadResponse.PAYLOAD_FIELD_NUMBER)
    try:
        results = list(_RESULT.iter_unpack(response.results))
        absent = _absent_runs(results, response.absent) if response.absent else {}
    except struct.error as error:
        raise InvalidRequest(f"not a ReadResponse: {error}") from error
    if sum(blocks for _, blocks, _ in results) * BLOCK_SIZE != len(payload):
        raise InvalidRequest(f"a ReadResponse whose results do not add up to its {len(payload)} bytes")
    if xxhash.xxh3_64_intdigest(payload, _payload_seed(response.results, response.absent)) != response.checksum:
        raise Corrupt("what a node sent fails its checksum")
    return ReadResults(results, payload, response.message, absent)


def _absent_runs(results: list[tuple[int, int, int]], absent: bytes) -> dict[int, list[tuple[int, int]]]:
    """By request. Raises InvalidRequest where a run is in no result, or before the end of the one before it."""
    blocks = {request: count for request, count, _ in results}
    runs: dict[int, list[tuple[int, int]]] = {}
    for request, first, count in _RESULT.iter_unpack(absent):
        known = runs.setdefault(request, [])
        end = sum(known[-1]) if known else 0
        if count < 1 or first < end or first + count > blocks.get(request, 0):
            raise InvalidRequest(f"a ReadResponse with {count} absent blocks from {first} on, outside of its results")
        known.append((first, count))
    return runs


# ---- sealed generations


class GenerationRead(NamedTuple):
    """payload: of all ranges. guests: whether guests use the node. streams_port: where it takes streams, 0 nowhere."""

    payload: memoryview
    guests: bool
    streams_port: int


def encode_generation(payload: bytes, *, guests: bool, streams_port: int) -> list[bytes]:
    """A serialized ReadGenerationResponse, in parts."""
    checksum = xxhash.xxh3_64_intdigest(payload)
    rest = pb.ReadGenerationResponse(checksum=checksum, guests=guests, streams_port=streams_port)
    return put_in(rest, pb.ReadGenerationResponse.PAYLOAD_FIELD_NUMBER, [payload])


def decode_generation(message: bytes | bytearray) -> GenerationRead:
    """A serialized ReadGenerationResponse.

    Raises InvalidRequest where it is no such message, Corrupt where the payload fails its checksum.
    """
    response, payload = cut_out(pb.ReadGenerationResponse, message, pb.ReadGenerationResponse.PAYLOAD_FIELD_NUMBER)
    if xxhash.xxh3_64_intdigest(payload) != response.checksum:
        raise Corrupt("what a node sent of a generation fails its checksum")
    return GenerationRead(payload, response.guests, response.streams_port)


# ---- what a replica answers


def encode_seal_answer(answer: SealAnswer | FencedBy) -> pb.SealEpochResponse:
    if isinstance(answer, FencedBy):
        return pb.SealEpochResponse(epoch=answer.epoch, configuration=answer.configuration)
    return pb.SealEpochResponse(
        end=from_position(answer.end),
        commit=from_position(answer.commit),
        applied=from_position(answer.applied),
        whole=answer.whole,
        floor=from_position(answer.floor),
        epoch=answer.epoch,
        configuration=answer.configuration,
        generation=answer.generation,
        full=answer.full,
        known=_from_acked(answer.known),
        complete=answer.complete,
        damaged=answer.damaged,
    )


def decode_seal_answer(response: pb.SealEpochResponse, sent: SealEpoch) -> SealAnswer | FencedBy:
    """What was sealed is what was sent, or newer: then the sender is fenced."""
    if (response.epoch, response.configuration) != (sent.epoch, sent.configuration):
        return FencedBy(Epoch(response.epoch), response.configuration)
    return SealAnswer(
        epoch=Epoch(response.epoch),
        configuration=response.configuration,
        end=to_position(response.end),
        commit=to_position(response.commit),
        applied=to_position(response.applied),
        whole=response.whole,
        floor=to_position(response.floor),
        generation=Generation(response.generation),
        full=response.full,
        known=to_acked(response.known),
        complete=response.complete,
        damaged=response.damaged,
    )


def encode_place(place: TablesPlace) -> pb.TablesPlace:
    device, inode = place.fence
    return pb.TablesPlace(host=place.host, directory=place.directory, device=device, inode=inode)


def decode_place(place: pb.TablesPlace) -> TablesPlace:
    return TablesPlace(place.host, place.directory, (place.device, place.inode))


def encode_append_answer(answer: AppendAnswer | FencedBy) -> pb.ReplicateResponse:
    if isinstance(answer, FencedBy):
        return pb.ReplicateResponse(fenced_by=answer.epoch, fenced_by_configuration=answer.configuration)
    return pb.ReplicateResponse(
        request=answer.request,
        matched=from_position(answer.matched),
        commit=from_position(answer.commit),
        end=from_position(answer.end),
        whole=answer.whole,
        full=answer.full,
        behind=answer.behind,
        extents_done=answer.extents_done,
        extents_total=answer.extents_total,
        damaged=answer.damaged,
    )


def decode_append_answer(response: pb.ReplicateResponse, epoch: Epoch) -> AppendAnswer | FencedBy:
    """epoch: that of the stream which the answer came on."""
    if response.fenced_by:
        return FencedBy(Epoch(response.fenced_by), response.fenced_by_configuration)
    return AppendAnswer(
        epoch=epoch,
        request=response.request,
        matched=to_position(response.matched),
        commit=to_position(response.commit),
        end=to_position(response.end),
        whole=response.whole,
        full=response.full,
        behind=response.behind,
        extents_done=response.extents_done,
        extents_total=response.extents_total,
        damaged=response.damaged,
    )


def fenced_error(by: FencedBy) -> Fenced:
    """For a call that has no field of its own for it."""
    return Fenced(f"epoch {by.epoch}, configuration {by.configuration} was sealed here: a newer attachment exists")


def decode_read_request(message: bytes | bytearray) -> pb.ReadRequest:
    """A serialized ReadRequest. Raises InvalidRequest where it is none."""
    return parse(pb.ReadRequest, message)


def check_size(count: int) -> None:
    """A read's blocks, bounded before they are believed; where they are is for the store. Raises InvalidRequest."""
    if not 1 <= count <= MAX_RECORD_PAYLOAD // BLOCK_SIZE:
        raise InvalidRequest(f"a read of {count} blocks, 1 to {MAX_RECORD_PAYLOAD // BLOCK_SIZE} are allowed")


def peer_of(member: Member, address: str) -> pb.Peer:
    return pb.Peer(replica=member.replica, node=member.node, address=address)
