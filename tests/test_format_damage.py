"""Every flipped byte, truncation, extension and exchange of stored objects is refused with Corrupt.

Exhaustively, over a small object of each kind. What is named by its content is tried twice: under its
name, where the hash tells, and under the name that the damaged bytes have, where only the encryption can.
"""

from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.errors import Corrupt
from snapshotd.compression import compress, expand
from snapshotd.crypto import Kind, name_of
from snapshotd.frame import compress_frame, decode_frame
from tests.format_objects import KEYS, OTHER_SNAPSHOT, SNAPSHOT, Sample, salt, samples, words

_SAMPLES = samples()
_KINDS = list(_SAMPLES)
_MASKS = (0x01, 0x80, 0xFF)


def _flipped(stored: bytes) -> Iterator[bytes]:
    for at, byte in enumerate(stored):
        for mask in _MASKS:
            yield stored[:at] + bytes([byte ^ mask]) + stored[at + 1 :]


def _cut(stored: bytes) -> Iterator[bytes]:
    yield from (stored[:end] for end in range(len(stored)))
    yield from (stored[start:] for start in range(1, len(stored)))


def _extended(stored: bytes) -> Iterator[bytes]:
    for more in (b"\0", b"x", stored[:1], stored[-1:], stored):
        yield stored + more
        yield more + stored


def _refused(sample: Sample, damaged: bytes) -> None:
    """Under its name; and where it has none of its own, under that of the damaged bytes."""
    for name in {sample.name, name_of(damaged) if sample.is_named_by_content else sample.name}:
        with pytest.raises(Corrupt):
            sample.read(name, damaged)


@pytest.mark.parametrize("kind", _KINDS)
def test_the_samples_are_whole(kind: str) -> None:
    sample = _SAMPLES[kind]
    assert sample.read(sample.name, sample.stored) is not None
    assert len(sample.stored) < 1000, "small enough to try everything"


@pytest.mark.parametrize("kind", _KINDS)
def test_every_flipped_byte_is_refused(kind: str) -> None:
    for damaged in _flipped(_SAMPLES[kind].stored):
        _refused(_SAMPLES[kind], damaged)


@pytest.mark.parametrize("kind", _KINDS)
def test_every_truncation_is_refused(kind: str) -> None:
    for damaged in _cut(_SAMPLES[kind].stored):
        _refused(_SAMPLES[kind], damaged)


@pytest.mark.parametrize("kind", _KINDS)
def test_extensions_are_refused(kind: str) -> None:
    for damaged in _extended(_SAMPLES[kind].stored):
        _refused(_SAMPLES[kind], damaged)


@pytest.mark.parametrize("kind", _KINDS)
def test_another_object_in_its_place_is_refused(kind: str) -> None:
    """Of its own kind, with the same content under another salt, and of all others."""
    sample = _SAMPLES[kind]
    others = {name: other.stored for name, other in _SAMPLES.items() if name != kind}
    if sample.is_named_by_content:
        others[kind] = samples(500)[kind].stored
    for stored in others.values():
        with pytest.raises(Corrupt):
            sample.read(sample.name, stored)


@pytest.mark.parametrize(("kind", "name"), [("root", OTHER_SNAPSHOT), ("quarantine", "6")])
def test_an_object_under_another_key_is_refused(kind: str, name: str) -> None:
    assert name != SNAPSHOT
    with pytest.raises(Corrupt):
        _SAMPLES[kind].read(name, _SAMPLES[kind].stored)


def test_a_frame_that_was_changed_cut_extended_or_exchanged_is_refused() -> None:
    """As a ranged read gets it, without the name of its object."""
    cipher, body = KEYS.frame_cipher(salt(1)), compress_frame([words(1), words(2)])
    stored = cipher.encrypt(3, body)
    assert len(decode_frame(KEYS, salt(1), 3, stored)) == 2
    others = [cipher.encrypt(2, body), KEYS.frame_cipher(salt(2)).encrypt(3, body)]
    for damaged in (*_flipped(stored), *_cut(stored), *_extended(stored), *others):
        with pytest.raises(Corrupt, match=r"^frame 3 of pack"):
            decode_frame(KEYS, salt(1), 3, damaged)


_CONTEXTS = {"root": SNAPSHOT.encode(), "quarantine": (5).to_bytes(8, "little")}
_SEALED = {
    "index": Kind.INDEX,
    "shard": Kind.SHARD,
    "patch": Kind.SHARD,
    "root": Kind.ROOT,
    "quarantine": Kind.QUARANTINE,
}


@pytest.mark.parametrize("kind", list(_SEALED))
@settings(max_examples=150)
@given(data=st.data())
def test_whatever_is_sealed_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    """What somebody with the keys may write: any content, or a good one with some bytes changed, cut out or put in."""
    sample, context = _SAMPLES[kind], _CONTEXTS.get(kind, b"")
    content = expand(KEYS.open(_SEALED[kind], context, sample.stored, kind), 10_000, kind)
    at, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 9))
    changed = content[:at] + data.draw(st.binary(max_size=9)) + content[at + length :]
    body = compress(data.draw(st.just(changed) | st.binary(max_size=200)))
    stored = KEYS.seal(_SEALED[kind], context, body, salt(1))
    with suppress(Corrupt):
        assert sample.read(name_of(stored) if sample.is_named_by_content else sample.name, stored) is not None
