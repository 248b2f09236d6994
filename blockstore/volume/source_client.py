"""What a volume was made from, and the calls that bring its blocks: the SnapshotStore service of snapshotd.

Each call is tried at every daemon that serves the source, the one that answered last first. A source never
changes, so it does not matter who answers; what came is checked against its checksum and against what was
asked for. `patiently` tries on while nobody answers, until a deadline: a source that was away and is back
is found by itself.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import grpc
import xxhash

from blockstore.domain import SnapshotId
from blockstore.errors import CairnError, Corrupt, InvalidRequest, QuorumUnavailable
from blockstore.grpc_connections import Connections
from blockstore.grpc_errors import cairn_errors
from blockstore.grpc_payload import cut_out
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.rpc import snapshot_pb2_grpc
from blockstore.units import BLOCK_SIZE
from blockstore.volume.block_bits import mask

#: The part of a volume that one bitmap describes: 128 MiB.
SHARD_BLOCKS: Final = 32_768
#: One call fetches at most so much.
MAX_FETCH_BLOCKS: Final = 256
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
_BITMAP_BYTES: Final = SHARD_BLOCKS // 8
_FETCH: Final = "/cairn.v1.SnapshotStore/Fetch"

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Source:
    """root: SHA-256 of the snapshot's root object. addresses: of the daemons that serve it, best first.

    first_block, size_bytes: the part of the snapshot that it is, all of it unless `part` was asked for.
    """

    snapshot: SnapshotId
    root: bytes
    size_bytes: int
    addresses: tuple[str, ...]
    first_block: int = 0

    def part(self, first_block: int, size_bytes: int) -> "Source | None":
        """What a segment has of it that begins with this block and has this size; None where nothing."""
        left = self.size_bytes - first_block * BLOCK_SIZE
        if left <= 0:
            return None
        return replace(self, first_block=self.first_block + first_block, size_bytes=min(left, size_bytes))


@dataclass(frozen=True, slots=True)
class Fetched:
    """Blocks of a source from `start` on. mapped: bit i is block start + i. payload: the mapped ones, in order."""

    start: int
    mapped: int
    payload: memoryview

    def blocks(self, first: int, count: int) -> memoryview:
        """Blocks [first, first + count), counted from `start`; all of them are mapped."""
        assert self.mapped >> first & mask(count) == mask(count)
        at = (self.mapped & mask(first)).bit_count() * BLOCK_SIZE
        return self.payload[at : at + count * BLOCK_SIZE]


class SourceClient:
    """Calls to whoever serves one source. call_timeout_s: of each call to each daemon."""

    def __init__(self, source: Source, call_timeout_s: float) -> None:
        self.source = source
        self.trouble = ""
        """Why the last call failed; empty where it did not."""
        self._call_timeout_s = call_timeout_s
        self._addresses = list(source.addresses)
        self._daemons = Connections(_store_stub)
        self._refreshed = asyncio.Event()

    @property
    def block_count(self) -> int:
        """Blocks of the source; a volume may have more, and these are zero."""
        return -(-self.source.size_bytes // BLOCK_SIZE)

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """Where the source is served now; nothing changes where nobody is known."""
        if addresses and set(addresses) != set(self._addresses):
            self._addresses = list(addresses)
            self._refreshed.set()

    async def close(self) -> None:
        await self._daemons.close()

    # ---- calls

    async def map_shard(self, shard: int) -> bytes:
        """Bit i: the source has content for block shard * SHARD_BLOCKS + i; empty where it has none at all.

        Of a part the shards are counted from its first block; two of the snapshot's may lie in one of them.
        """
        whole, skipped = divmod(self.source.first_block, SHARD_BLOCKS)
        whole += shard
        left = self.block_count - shard * SHARD_BLOCKS
        if not skipped and left >= SHARD_BLOCKS:
            return await self._map_whole_shard(whole)
        bits = int.from_bytes(await self._map_whole_shard(whole), "little") >> skipped
        if skipped and left > SHARD_BLOCKS - skipped:
            bits |= int.from_bytes(await self._map_whole_shard(whole + 1), "little") << SHARD_BLOCKS - skipped
        bits &= mask(min(left, SHARD_BLOCKS))
        return bits.to_bytes(_BITMAP_BYTES, "little") if bits else b""

    async def _map_whole_shard(self, shard: int) -> bytes:
        request = pb.MapShardRequest(snapshot=self.source.snapshot, root=self.source.root, shard=shard)
        response: pb.MapShardResponse = await self._call(
            lambda stub: stub.MapShard(request, timeout=self._call_timeout_s)
        )
        if len(response.mapped) not in (0, _BITMAP_BYTES):
            raise Corrupt(
                f"a bitmap of {len(response.mapped)} bytes for shard {shard}, expected {_BITMAP_BYTES} or none"
            )
        return response.mapped

    async def fetch(self, start: int, count: int, *, background: bool) -> Fetched:
        """Blocks [start, start + count), at most MAX_FETCH_BLOCKS; checked. Those behind the source are not mapped."""
        request = pb.FetchRequest(
            snapshot=self.source.snapshot,
            root=self.source.root,
            start=self.source.first_block + start,
            count=min(count, self.block_count - start),
            background=background,
        )

        async def call(stub: Any) -> Fetched:
            found = _fetched(request, await stub.Fetch(request, timeout=self._call_timeout_s))
            return replace(found, start=start)

        return await self._call(call)

    async def _call(self, call: Callable[[Any], Awaitable[Result]]) -> Result:
        """At one daemon after the other. Raises Corrupt where each that answers has it damaged."""
        failures: list[CairnError] = []
        for address in list(self._addresses):
            try:
                with cairn_errors(f"snapshotd at {address}"):
                    result = await call(self._daemons.to(address))
            except InvalidRequest:
                raise
            except CairnError as error:
                failures.append(error)
            else:
                self._prefer(address)
                self.trouble = ""
                return result
        failures = failures or [QuorumUnavailable("control knows of no daemon that serves the source")]
        failures.sort(key=lambda error: isinstance(error, Corrupt))  # one that was away may have it whole
        self.trouble = str(failures[0])
        raise failures[0]

    def _prefer(self, address: str) -> None:
        if self._addresses and self._addresses[0] != address and address in self._addresses:
            self._addresses.remove(address)
            self._addresses.insert(0, address)

    # ---- patience

    async def patiently(self, attempt: Callable[[], Awaitable[Result]], deadline: float) -> Result:
        """`attempt`, again and again until the loop's time `deadline`.

        Raises QuorumUnavailable then; Corrupt and InvalidRequest at once.
        """
        pause_s = _FIRST_PAUSE_S
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    try:
                        return await attempt()
                    except (Corrupt, InvalidRequest):
                        raise
                    except CairnError as error:
                        if loop.time() + pause_s >= deadline:
                            raise QuorumUnavailable(f"{self._name} cannot be had: {error}") from error
                    await self._pause(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except TimeoutError:
            raise QuorumUnavailable(f"{self._name} cannot be had: {self.trouble or 'no answer in time'}") from None

    async def _pause(self, pause_s: float) -> None:
        """Shorter where other addresses become known."""
        self._refreshed.clear()
        try:
            async with asyncio.timeout(pause_s):
                await self._refreshed.wait()
        except TimeoutError:
            return

    @property
    def _name(self) -> str:
        return f"the volume's source {self.source.snapshot}"


def _store_stub(channel: grpc.aio.Channel) -> Any:
    """Its Fetch gives bytes, for `_fetched`."""
    stub: Any = snapshot_pb2_grpc.SnapshotStoreStub(channel)
    stub.Fetch = channel.unary_unary(_FETCH, pb.FetchRequest.SerializeToString, response_deserializer=None)
    return stub


def _fetched(request: pb.FetchRequest, message: bytes) -> Fetched:
    """What a serialized FetchResponse brings, checked."""
    response, payload = cut_out(pb.FetchResponse, message, pb.FetchResponse.PAYLOAD_FIELD_NUMBER)
    mapped = int.from_bytes(response.mapped, "little")
    if mapped & ~mask(request.count) or mapped.bit_count() * BLOCK_SIZE != len(payload):
        raise Corrupt(f"{len(payload)} bytes for {mapped.bit_count()} blocks of {request.count} from {request.start}")
    if xxhash.xxh3_64_intdigest(payload) != response.checksum:
        raise Corrupt(f"blocks {request.start} to {request.start + request.count} fail their checksum on the way")
    return Fetched(request.start, mapped, payload)
