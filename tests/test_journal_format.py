"""The journal's bytes: they come back as they went, and nothing else passes for them."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.errors import Corrupt
from blockstore.log import decode_entry, encode_entry
from blockstore.storage.journal import JournalEntry
from blockstore.storage.journal_format import (
    MAX_GROUP_ENTRIES,
    PAGE,
    Draft,
    FileHeader,
    FileKind,
    GroupHeader,
    StoredEntry,
    checksum,
    decode_file_header,
    decode_group_header,
    encode_file_header,
    group_header_size,
    stored_entries,
)
from tests.journal_cases import ReplicaLog, replica

NUMBER = st.integers(0, (1 << 64) - 1)
HEADERS = st.builds(FileHeader, st.sampled_from(FileKind), *[NUMBER] * 9)


@given(header=HEADERS)
def test_a_file_header_comes_back_from_either_copy(header: FileHeader) -> None:
    encoded = encode_file_header(header)
    assert len(encoded) == 2 * PAGE
    assert decode_file_header(encoded[:PAGE]) == decode_file_header(encoded[PAGE:]) == header


def test_a_copy_of_a_file_header_fits_a_sector() -> None:
    """So that a crash leaves it old or new."""
    encoded = encode_file_header(FileHeader(FileKind.LOG, *[(1 << 64) - 1] * 9))
    assert not any(encoded[512:PAGE])


@given(header=HEADERS, at=st.integers(0, 87), flip=st.integers(1, 255))
def test_a_file_header_with_a_wrong_byte_is_none(header: FileHeader, at: int, flip: int) -> None:
    page = bytearray(encode_file_header(header)[:PAGE])
    page[at] ^= flip
    assert decode_file_header(bytes(page)) is None


def test_a_file_of_a_version_to_come_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for a bad header, it would be overwritten."""
    with monkeypatch.context() as patched:
        patched.setattr("blockstore.storage.journal_format._VERSION", 2)
        later = encode_file_header(FileHeader(FileKind.LOG, *[1] * 9))
    with pytest.raises(Corrupt, match="version 2"):
        decode_file_header(later[:PAGE])


def draft_of(entries: list[JournalEntry], number: int = 7) -> Draft:
    draft = Draft(number, 100, None)
    for entry in entries:
        draft.add(entry.replica, entry.entry, entry.position, encode_entry(entry.entry), 42)
    return draft


STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "seal", "cut", "fill"]), st.integers(0, 3)), min_size=1, max_size=20
)


def lived(steps: list[tuple[str, int]]) -> list[JournalEntry]:
    logs = {number: ReplicaLog(replica(number)) for number in range(4)}
    entries: list[JournalEntry] = []
    for what, which in steps:
        log = logs[which]
        if what == "write":
            entries.append(log.write(blocks=which))
        elif what == "seal":
            entries.append(log.seal())
        elif what == "cut" and log.records:
            entries += log.replace_tail(1)
        else:
            entries.append(log.fill())
    return entries


@settings(deadline=None)
@given(steps=STEPS, salt=NUMBER)
def test_a_group_comes_back(steps: list[tuple[str, int]], salt: int) -> None:
    entries = lived(steps)
    draft = draft_of(entries)
    encoded = b"".join(draft.encode(salt))
    assert len(encoded) == draft.size_bytes
    assert len(encoded) % PAGE == 0
    header, body = parsed(encoded, salt)
    assert (header.number, header.first_entry, header.previous) == (7, 100, None)
    assert header.last_entry == 99 + len(entries)
    found = [(stored.number, stored.replica, decode_entry(stored.kind, stored.payload.tobytes())) for stored in body]
    assert found == [(100 + i, entry.replica, entry.entry) for i, entry in enumerate(entries)]
    for item in header.items:
        mine = [(100 + i, entry) for i, entry in enumerate(entries) if entry.replica == item.replica]
        assert item.number == mine[-1][0]
        assert item.before == 42
        assert all(item.position >= entry.position for _, entry in mine)


def parsed(encoded: bytes, salt: int) -> tuple[GroupHeader, list[StoredEntry]]:
    size = group_header_size(encoded)
    assert size is not None
    header = decode_group_header(encoded[:size], salt)
    assert header is not None
    body = encoded[size : size + header.body_size]
    assert checksum((body,), salt) == header.body_checksum
    return header, list(stored_entries(header, body))


@settings(deadline=None)
@given(steps=STEPS, salt=NUMBER, other=NUMBER, data=st.data())
def test_a_header_with_a_wrong_byte_or_salt_is_none(
    steps: list[tuple[str, int]], salt: int, other: int, data: st.DataObject
) -> None:
    encoded = b"".join(draft_of(lived(steps)).encode(salt))
    size = group_header_size(encoded)
    assert size is not None
    if other != salt:
        assert decode_group_header(encoded[:size], other) is None
    at = data.draw(st.integers(0, size - 1))
    encoded = encoded[:at] + bytes([encoded[at] ^ data.draw(st.integers(1, 255))]) + encoded[at + 1 :]
    claimed = group_header_size(encoded)
    if claimed is not None and claimed <= len(encoded):
        assert decode_group_header(encoded[:claimed], salt) is None


@given(garbage=st.binary(max_size=200))
def test_garbage_is_no_group_and_no_header(garbage: bytes) -> None:
    for start in (b"", b"CJgr\x01\x00", b"CJfi\x01\x00"):
        size = group_header_size(start + garbage)
        assert size is None or size < MAX_GROUP_ENTRIES * 200
        assert decode_file_header((start + garbage).ljust(PAGE, b"\0")) is None


def test_what_a_replica_s_log_gains_is_the_stretch_after_the_last_cut() -> None:
    log = ReplicaLog(replica(1))
    entries = [log.write() for _ in range(3)]
    assert gains(entries) == (1, 3, False)
    assert gains([*entries, *log.replace_tail(1)]) == (1, 3, False)
    assert gains([log.seal()]) == (0, 0, False)
    tail = [log.write(), log.write()]
    assert gains([*tail, *log.replace_tail(4)]) == (2, 2, False)
    assert gains([log.write(), log.fill()]) == (0, 0, True)
    assert gains([log.write(), log.fill(), log.write(), log.write()]) == (9, 10, True)


def gains(entries: list[JournalEntry]) -> tuple[int, int, bool]:
    (item,) = draft_of(entries).items
    return item.first, item.last, item.restarts


def test_a_draft_says_how_large_it_may_become() -> None:
    draft = Draft(1, 1, None)
    for log in (ReplicaLog(replica(1)), ReplicaLog(replica(2)), ReplicaLog(replica(1))):
        encoded = [(entry, encode_entry(entry.entry)) for entry in (log.write(blocks=2), log.write())]
        expected = draft.size_with(sum(len(payload) for _, (_, payload) in encoded), len(encoded))
        for entry, payload in encoded:
            draft.add(log.replica, entry.entry, entry.position, payload, 0)
        assert expected - PAGE <= draft.size_bytes <= expected
        assert draft.size_bytes == len(b"".join(draft.encode(int.from_bytes(os.urandom(8), "big"))))
