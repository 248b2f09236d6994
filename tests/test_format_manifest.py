"""Shards against a dict of blocks: whole, as patches up to the full depth, and what they cost."""

import random
import tracemalloc
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.errors import Corrupt
from snapshotd import bitmap
from snapshotd.compression import compress, expand
from snapshotd.crypto import Kind, name_of
from snapshotd.fields import column
from snapshotd.manifest import (
    MAX_DEPTH,
    SHARD_BLOCKS,
    BlockRef,
    Shard,
    ShardObject,
    build_shard,
    decode_shard,
    encode_patch,
    encode_shard,
    should_patch,
)
from tests.format_objects import KEYS, salt

Model = dict[int, BlockRef]


def ref(pack: int, position: int) -> BlockRef:
    return BlockRef(salt(pack), position // 64, position % 64)


def shard_of(model: Mapping[int, BlockRef]) -> Shard:
    shard = Shard()
    shard.apply(model)
    return shard


_REFS = st.builds(ref, st.integers(0, 5), st.integers(0, 64 * 4096 - 1))
_BLOCKS = st.integers(0, SHARD_BLOCKS - 1)


@st.composite
def _stretches(draw: st.DrawFn) -> Model:
    """Sequences of blocks whose positions follow one another, as shipping makes them, over and beside each other."""
    model: Model = {}
    for _ in range(draw(st.integers(0, 6))):
        start, length = draw(st.integers(0, SHARD_BLOCKS - 300)), draw(st.integers(1, 300))
        pack, position = draw(st.integers(0, 3)), draw(st.integers(0, 64 * 4096 - 300))
        model.update({start + step: ref(pack, position + step) for step in range(length)})
    return model


@settings(max_examples=60)
@given(_stretches() | st.dictionaries(_BLOCKS, _REFS, max_size=60))
def test_a_shard_comes_back(model: Model) -> None:
    name, stored = encode_shard(KEYS, shard_of(model), salt(1))
    assert name == name_of(stored)
    shard = build_shard([decode_shard(KEYS, name, stored)])
    assert dict(shard.items()) == model
    assert list(shard.items()) == sorted(model.items())
    assert len(shard) == len(model)
    assert list(bitmap.numbers(shard.mapped())) == sorted(model)
    assert len(shard.mapped()) == SHARD_BLOCKS // 8
    frames = {(pack, frame) for pack, frames in shard.frames().items() for frame in frames}
    assert frames == {(found.pack, found.frame) for found in model.values()}


@settings(max_examples=30)
@given(
    _stretches(),
    st.lists(
        st.dictionaries(_BLOCKS, st.none() | _REFS, max_size=30) | _stretches().map(dict),
        min_size=1,
        max_size=MAX_DEPTH,
    ),
    st.data(),
)
def test_patches_are_changes_one_after_the_other(
    model: Model, patches: list[dict[int, BlockRef | None]], data: st.DataObject
) -> None:
    name, stored = encode_shard(KEYS, shard_of(model), salt(0))
    chain = [decode_shard(KEYS, name, stored)]
    for depth, changes in enumerate(patches, 1):
        for removed in data.draw(st.sets(st.sampled_from(sorted(model)), max_size=9)) if model else ():
            changes[removed] = None
        name, stored = encode_patch(KEYS, name, depth, changes, salt(depth))
        chain.append(decode_shard(KEYS, name, stored))
        model |= {block: found for block, found in changes.items() if found}
        model = {block: found for block, found in model.items() if changes.get(block, found)}
        assert (chain[-1].base, chain[-1].depth) == (chain[-2].name, depth)
        assert build_shard(chain) == shard_of(model)


@given(_stretches(), st.integers(0, 300), st.integers(0, 300))
def test_parts_are_the_mapped_blocks_by_frame(model: Model, start: int, count: int) -> None:
    parts = shard_of(model).parts(start, count)
    named = {
        part.start + i: BlockRef(part.pack, part.frame, part.slot + i) for part in parts for i in range(part.length)
    }
    assert named == {block: each for block, each in model.items() if start <= block < start + count}
    assert all(part.slot + part.length <= 64 for part in parts)
    assert [part.start for part in parts] == sorted(named.keys() & {part.start for part in parts})


def test_blocks_one_after_the_other_are_a_part_for_each_frame() -> None:
    parts = shard_of({block: ref(1, 60 + block) for block in range(70)}).parts(0, 70)
    assert [(part.start, part.length, part.frame, part.slot) for part in parts] == [
        (0, 4, 0, 60),
        (4, 64, 1, 0),
        (68, 2, 2, 0),
    ]


def test_a_shard_in_memory_is_a_mapping() -> None:
    shard = shard_of({5: ref(1, 10), 6: ref(1, 11), 9: ref(2, 0)})
    other = shard.copy()
    shard.remove(5)
    shard[7] = ref(3, 1)
    assert shard.refs(4, 6) == [None, None, ref(1, 11), ref(3, 1), None, ref(2, 0)]
    assert (shard[5], shard[6], len(shard), len(other)) == (None, ref(1, 11), 3, 3)
    assert dict(other.items()) == {5: ref(1, 10), 6: ref(1, 11), 9: ref(2, 0)}
    assert shard != other
    shard.remove(0, SHARD_BLOCKS)
    assert (len(shard), shard.mapped(), shard.frames()) == (0, bytes(4096), {})
    assert shard == Shard()


@pytest.mark.parametrize("wrong", [BlockRef(bytes(15), 0, 0), BlockRef(salt(1), 4096, 0), BlockRef(salt(1), 0, 64)])
def test_what_names_no_block_is_refused(wrong: BlockRef) -> None:
    with pytest.raises(ValueError, match="names no block"):
        Shard()[0] = wrong
    with pytest.raises(ValueError, match="names no block"):
        encode_patch(KEYS, "ab" * 32, 1, {0: wrong}, salt(1))


def test_blocks_outside_are_refused() -> None:
    shard = Shard()
    for start, count in ((-1, 1), (SHARD_BLOCKS, 1), (0, SHARD_BLOCKS + 1), (5, -1)):
        with pytest.raises(ValueError, match="not within a shard"):
            shard.remove(start, count)
        with pytest.raises(ValueError, match="not within a shard"):
            shard.refs(start, count)
    for block in (-1, SHARD_BLOCKS):
        with pytest.raises(ValueError, match="not within a shard"):
            shard[block]
        with pytest.raises(ValueError, match="not within a shard"):
            shard[block] = ref(1, 1)
        with pytest.raises(ValueError, match="not within a shard"):
            shard.apply({block: None})
        with pytest.raises(ValueError, match="not within a shard"):
            encode_patch(KEYS, "ab" * 32, 1, {block: ref(1, 1)}, salt(1))


@pytest.mark.parametrize("depth", [0, MAX_DEPTH + 1])
def test_a_patch_too_deep_is_not_written(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth {depth}: 1 to 8"):
        encode_patch(KEYS, "ab" * 32, depth, {}, salt(1))


def test_a_chain_holds_together_or_is_refused() -> None:
    name, stored = encode_shard(KEYS, shard_of({1: ref(1, 1)}), salt(1))
    chain = [decode_shard(KEYS, name, stored)]
    for depth in (1, 2, 3):
        name, stored = encode_patch(KEYS, name, depth, {depth: ref(2, depth)}, salt(depth + 1))
        chain.append(decode_shard(KEYS, name, stored))
    build_shard(chain)
    other = decode_shard(KEYS, *encode_patch(KEYS, chain[0].name, 2, {}, salt(9)))
    broken: list[list[ShardObject]] = [
        chain[1:],
        [*chain[:2], chain[3]],
        [chain[0], chain[2], chain[1]],
        [chain[0], chain[0]],
        [chain[0], other],
    ]
    for wrong in broken:
        with pytest.raises(Corrupt, match="is a patch on"):
            build_shard(wrong)


def _sealed(content: bytes) -> tuple[str, bytes]:
    stored = KEYS.seal(Kind.SHARD, b"", compress(content), salt(1))
    return name_of(stored), stored


def _content(runs: list[tuple[int, int, int, int]], packs: int = 1, head: bytes = b"\0") -> bytes:
    """runs: gap, length, pack, step."""
    columns = [column([run[field] for run in runs], width) for field, width in ((0, 2), (1, 2), (2, 2), (3, 4))]  # type: ignore[arg-type]
    table = packs.to_bytes(2, "little") + b"".join(map(salt, range(packs)))
    return head + table + len(runs).to_bytes(2, "little") + b"".join(columns)


_PATCH = b"\1" + bytes(32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends at byte 0"),
        (b"\x09" + bytes(100), "count of 9, above the limit of 8"),
        (_content([(0, 1, 1, 0)]) + b"x", "1 bytes too many"),
        (_content([(0, 1, 1, 0)])[:-1], "ends at byte"),
        (b"\0\x01\x80" + bytes(100), "count of 32769"),
        (b"\0\0\0\x01\x80" + bytes(100), "count of 32769"),
        (_content([(0, 0, 1, 0)]), "run of 0 blocks"),
        (_content([(SHARD_BLOCKS, 1, 1, 0)]), "from block 32768 on"),
        (_content([(0, SHARD_BLOCKS + 1, 1, 0)]), "run of 32769 blocks"),
        (_content([(0, SHARD_BLOCKS, 1, 0), (0, 1, 1, 0)]), "from block 32768 on"),
        (_content([(0, 1, 2, 0)]), "in pack 2 of 1"),
        (_content([(0, 1, 0, 0)]), "in pack 0 of 1"),
        (_content([(0, 1, 0, 1)], head=_PATCH), "in pack 0 of 1"),
        (_content([(0, 1, 1, 64 * 4096)]), "at position 262144"),
        (_content([(0, 2, 1, 64 * 4096 - 1)]), "at position 262143"),
        (_content([(0, 1, 1, 2**32 - 1)]), "at position 4294967295"),
    ],
)
def test_content_that_cannot_be_is_refused(content: bytes, message: str) -> None:
    """As only somebody with the keys could write it."""
    with pytest.raises(Corrupt, match=f"^shard .*{message}"):
        decode_shard(KEYS, *_sealed(content))


def test_content_made_by_hand_is_taken_where_it_is_right() -> None:
    """The page's columns and steps: a run on, a step back in the same pack, and removed blocks of a patch."""
    whole = decode_shard(KEYS, *_sealed(_content([(1, 2, 1, 70), (0, 1, 2, 5), (3, 1, 1, 2**32 - 8)], packs=2)))
    expected = {1: ref(0, 70), 2: ref(0, 71), 3: ref(1, 5), 7: ref(0, 64)}
    assert dict(build_shard([whole]).items()) == expected
    head = b"\1" + bytes.fromhex(whole.name)
    patch = decode_shard(KEYS, *_sealed(_content([(2, 3, 0, 0), (0, 1, 1, 9)], head=head)))
    assert dict(build_shard([whole, patch]).items()) == {1: ref(0, 70), 5: ref(0, 9), 7: ref(0, 64)}


def _content_size(stored: bytes) -> int:
    return len(expand(KEYS.open(Kind.SHARD, b"", stored, "this"), 1 << 20, "this"))


def test_a_sequential_shard_costs_nearly_nothing() -> None:
    """128 MiB that was shipped in one go, into packs of 9,000 blocks."""
    _, stored = encode_shard(KEYS, shard_of({b: ref(b // 9000, b % 9000) for b in range(SHARD_BLOCKS)}), salt(1))
    assert len(stored) < 200


def test_a_shard_of_random_references_costs_about_10_bytes_a_block() -> None:
    chance = random.Random(1)
    model = {b: ref(chance.randrange(100), chance.randrange(9000)) for b in range(SHARD_BLOCKS)}
    _, stored = encode_shard(KEYS, shard_of(model), salt(1))
    assert _content_size(stored) < 10.1 * SHARD_BLOCKS
    assert len(stored) < 4 * SHARD_BLOCKS


def test_an_increment_of_random_blocks_costs_under_two_bytes_a_block() -> None:
    """1% of 128 MiB: 328 blocks, whose contents went into one pack one after the other."""
    chance = random.Random(1)
    changed = sorted(chance.sample(range(SHARD_BLOCKS), 328))
    _, stored = encode_patch(KEYS, "ab" * 32, 1, {block: ref(1, at) for at, block in enumerate(changed)}, salt(1))
    assert len(stored) < 2 * 328


def test_the_largest_shard_can_be_written_and_read() -> None:
    """Each block alone, and each in another pack: 26 bytes a block."""
    model = {b: BlockRef(b.to_bytes(16, "big"), 4095, b % 64) for b in range(SHARD_BLOCKS)}
    changes: dict[int, BlockRef | None] = {**model}
    name, stored = encode_patch(KEYS, "ab" * 32, MAX_DEPTH, changes, salt(1))
    assert _content_size(stored) == 1 + 32 + 4 + 26 * SHARD_BLOCKS
    assert len(decode_shard(KEYS, name, stored).runs) == SHARD_BLOCKS


def test_a_shard_takes_little_memory() -> None:
    model = {b: ref(b % 3, b) for b in range(SHARD_BLOCKS)}
    tracemalloc.start()
    try:
        shard = shard_of(model)
        assert tracemalloc.get_traced_memory()[0] < 300_000
        assert len(shard) == SHARD_BLOCKS
    finally:
        tracemalloc.stop()


def test_patches_are_for_small_changes_on_chains_that_are_not_too_deep() -> None:
    assert should_patch(0, 100, 201)
    assert should_patch(MAX_DEPTH - 1, 100, 201)
    assert not should_patch(MAX_DEPTH, 100, 201)
    assert not should_patch(0, 100, 200)
