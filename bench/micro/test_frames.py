"""Hashing, encoding and decoding of blocks on their way to object storage and back; 1 MiB each, on one core.

The blocks compress to about 45%, as those of a system's files do.
"""

import random
from collections.abc import Callable, Sequence

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from blockstore.units import BLOCK_SIZE, MIB
from snapshotd.crypto import DomainKeys
from snapshotd.frame import FRAME_BLOCKS, compress_frame, decode_frame
from snapshotd.manifest import SHARD_BLOCKS, BlockRef, Shard, build_shard, decode_shard, encode_patch, encode_shard

_KEYS = DomainKeys(bytes(16), bytes(32))
_PACK = bytes(16)
_COUNT = MIB // BLOCK_SIZE


def _blocks(seed: int = 1) -> list[bytes]:
    chance = random.Random(seed)
    words = [chance.randbytes(chance.randrange(3, 11)) for _ in range(2000)]
    content = b"".join(chance.choice(words) if chance.random() < 0.9 else chance.randbytes(6) for _ in range(MIB // 4))
    return [content[at : at + BLOCK_SIZE] for at in range(0, MIB, BLOCK_SIZE)]


def _frames(blocks: Sequence[bytes]) -> list[Sequence[bytes]]:
    return [blocks[at : at + FRAME_BLOCKS] for at in range(0, len(blocks), FRAME_BLOCKS)]


@pytest.mark.benchmark(group="hash 1 MiB of blocks")
def test_hash(benchmark: BenchmarkFixture) -> None:
    blocks = _blocks()
    assert len(benchmark(lambda: [_KEYS.block_hash(block) for block in blocks])) == _COUNT


@pytest.mark.benchmark(group="compress and encrypt 1 MiB in frames")
def test_encode(benchmark: BenchmarkFixture) -> None:
    frames, cipher = _frames(_blocks()), _KEYS.frame_cipher(_PACK)
    stored = benchmark(lambda: [cipher.encrypt(at, compress_frame(blocks)) for at, blocks in enumerate(frames)])
    assert 0.3 < sum(map(len, stored)) / MIB < 0.6


@pytest.mark.benchmark(group="decrypt and decompress 1 MiB in frames")
def test_decode(benchmark: BenchmarkFixture) -> None:
    frames, cipher = _frames(_blocks()), _KEYS.frame_cipher(_PACK)
    stored = [cipher.encrypt(at, compress_frame(blocks)) for at, blocks in enumerate(frames)]
    decoded = benchmark(lambda: [decode_frame(_KEYS, _PACK, at, frame) for at, frame in enumerate(stored)])
    assert decoded == frames


def _sequential() -> Shard:
    shard = Shard()
    for block in range(SHARD_BLOCKS):
        shard[block] = BlockRef(bytes([block // 9000]) * 16, block % 9000 // 64, block % 64)
    return shard


def _random() -> Shard:
    chance, shard = random.Random(1), Shard()
    for block in range(SHARD_BLOCKS):
        shard[block] = BlockRef(bytes([chance.randrange(100)]) * 16, chance.randrange(140), chance.randrange(64))
    return shard


@pytest.mark.parametrize("make", [_sequential, _random])
@pytest.mark.benchmark(group="encode a shard of 128 MiB")
def test_encode_shard(benchmark: BenchmarkFixture, make: Callable[[], Shard]) -> None:
    shard = make()
    name, _ = benchmark(encode_shard, _KEYS, shard, bytes(16))
    assert len(name) == 64


@pytest.mark.parametrize("make", [_sequential, _random])
@pytest.mark.benchmark(group="read a shard of 128 MiB")
def test_read_shard(benchmark: BenchmarkFixture, make: Callable[[], Shard]) -> None:
    shard = make()
    name, stored = encode_shard(_KEYS, shard, bytes(16))
    assert benchmark(lambda: build_shard([decode_shard(_KEYS, name, stored)])) == shard


@pytest.mark.benchmark(group="encode a patch of 1% of 128 MiB")
def test_encode_patch(benchmark: BenchmarkFixture) -> None:
    blocks = sorted(random.Random(1).sample(range(SHARD_BLOCKS), 328))
    changes = {block: BlockRef(_PACK, at // 64, at % 64) for at, block in enumerate(blocks)}
    name, _ = benchmark(encode_patch, _KEYS, "ab" * 32, 1, changes, bytes(16))
    assert len(name) == 64
