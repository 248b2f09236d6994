"""Keys, hashes, sealed objects; and over much encoding: no key encrypts two messages under one nonce."""

from collections import Counter

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from blockstore.errors import Corrupt
from snapshotd import crypto
from snapshotd.crypto import DomainKeys, Kind, check_name, clear_of, name_of
from tests.format_objects import KEYS, noise, salt, samples

_KINDS = [Kind.TRAILER, Kind.INDEX, Kind.SHARD, Kind.ROOT, Kind.QUARANTINE]
_OTHER_KEY = DomainKeys(KEYS.domain, bytes(32))
_OTHER_DOMAIN = DomainKeys(bytes(16), bytes(range(100, 132)))


def test_keys_are_the_ones_that_were_once_written() -> None:
    """Known answers: another derivation would make every stored object unreadable."""
    assert KEYS.check_value.hex() == "f1a32c30fff3bd00c673bf29caa6863a"
    assert KEYS.block_hash(bytes(4096)).hex() == "1c6b81422d74382f56d70780c8fe545f"
    assert KEYS.frame_cipher(salt(1)).encrypt(3, b"body").hex() == "11bc984049f084194cd5514bc1d836db767d225b"


def test_hashes_depend_on_key_and_domain_and_are_not_the_plain_ones() -> None:
    block = noise(1)
    hashes = {keys.block_hash(block) for keys in (KEYS, _OTHER_KEY, _OTHER_DOMAIN)}
    assert len(hashes | {blake3(block).digest(16)}) == 4
    assert KEYS.block_hash(memoryview(block)) == KEYS.block_hash(block)


def test_check_values_tell_keys_apart() -> None:
    assert len({keys.check_value for keys in (KEYS, _OTHER_KEY, _OTHER_DOMAIN)}) == 3
    assert DomainKeys(KEYS.domain, bytes(range(100, 132))).check_value == KEYS.check_value


def test_no_secret_shows_in_messages() -> None:
    assert bytes(range(100, 132)).hex() not in repr(KEYS)
    assert "data_key" not in repr(KEYS)


@pytest.mark.parametrize(("domain", "key"), [(15, 32), (16, 31), (16, 0)])
def test_keys_of_a_wrong_size_are_refused(domain: int, key: int) -> None:
    with pytest.raises(ValueError, match="16, 32"):
        DomainKeys(bytes(domain), bytes(key))


def test_a_salt_of_a_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="15 bytes: 16"):
        KEYS.seal(Kind.ROOT, b"", b"", bytes(15))
    with pytest.raises(ValueError, match="15 bytes: 16"):
        KEYS.frame_cipher(bytes(15))


@given(st.sampled_from(_KINDS), st.binary(max_size=40), st.binary(max_size=300), st.binary(max_size=255))
def test_what_is_sealed_comes_back(kind: Kind, context: bytes, plaintext: bytes, clear: bytes) -> None:
    stored = KEYS.seal(kind, context, plaintext, salt(1), clear)
    assert KEYS.open(kind, context, stored, "this") == plaintext
    assert clear_of(stored) == clear
    assert len(stored) == 8 + 16 + 1 + len(clear) + len(plaintext) + 16


@pytest.mark.parametrize("kind", _KINDS)
def test_it_opens_only_as_what_it_is(kind: Kind) -> None:
    stored = KEYS.seal(kind, b"context", b"plaintext", salt(1))
    for other in set(_KINDS) - {kind}:
        with pytest.raises(Corrupt, match=f"this is no {other.word}"):
            KEYS.open(other, b"context", stored, "this")
        relabelled = other.header + stored[8:]
        with pytest.raises(Corrupt, match="fails its authentication"):
            KEYS.open(other, b"context", relabelled, "this")
    for keys, context in ((_OTHER_KEY, b"context"), (_OTHER_DOMAIN, b"context"), (KEYS, b"contexu"), (KEYS, b"")):
        with pytest.raises(Corrupt, match="this fails its authentication"):
            keys.open(kind, context, stored, "this")


def test_what_is_clear_cannot_pass_for_context() -> None:
    """The two lie next to each other in the additional data: their border is authenticated too."""
    stored = KEYS.seal(Kind.ROOT, b"ab", b"", salt(1), b"c")
    moved = stored[:24] + b"\x02ca" + stored[26:]
    with pytest.raises(Corrupt, match="authentication"):
        KEYS.open(Kind.ROOT, b"b", moved, "this")


def test_an_unknown_version_is_told_as_such() -> None:
    stored = KEYS.seal(Kind.INDEX, b"", b"", salt(1))
    with pytest.raises(Corrupt, match="version 513 of its format, and this Cairn reads 1: use a newer Cairn"):
        KEYS.open(Kind.INDEX, b"", stored[:6] + b"\x01\x02" + stored[8:], "this")


@given(st.binary(max_size=80))
def test_anything_else_is_corrupt(stored: bytes) -> None:
    for kind in _KINDS:
        with pytest.raises(Corrupt):
            KEYS.open(kind, b"", stored, "this")
        with pytest.raises(Corrupt):
            KEYS.open(kind, b"", kind.header + stored, "this")


def test_a_name_is_the_hash_of_the_bytes() -> None:
    name = name_of(b"stored")
    check_name(name, b"stored", "this")
    with pytest.raises(Corrupt, match="this does not match its name"):
        check_name(name, b"storee", "this")


def test_no_nonce_is_used_twice_under_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """All encryptions of many objects of all kinds are looked at where they happen, by key and nonce."""
    used: Counter[tuple[bytes, bytes]] = Counter()

    class Watched:
        def __init__(self, key: bytes) -> None:
            self._key, self._aead = key, AESGCM(key)

        def encrypt(self, nonce: bytes, data: bytes, bound: bytes) -> bytes:
            used[self._key, nonce] += 1
            return self._aead.encrypt(nonce, data, bound)

    monkeypatch.setattr(crypto, "AESGCM", Watched)
    for first_salt in range(0, 2000, 10):
        samples(first_salt)
    # Each sample has two frames and a trailer in its pack, and five sealed objects.
    assert len(used) == 200 * 8
    assert set(used.values()) == {1}
