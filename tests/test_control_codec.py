"""The catalog's records as bytes: back and forth, and what is not one is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.control.codec import decode, encode
from blockstore.control.records import (
    Attachment,
    AttachmentState,
    FrontEnd,
    Known,
    KnownPositions,
    Node,
    Segment,
    Tombstone,
    Volume,
)
from blockstore.domain import (
    Configuration,
    FrontEndId,
    Member,
    NodeId,
    ReplicaId,
    SegmentNumber,
    VolumeId,
    VolumeState,
)
from blockstore.errors import Corrupt
from blockstore.units import Epoch

MEMBER = Member(ReplicaId("rep-00000000000000001"), NodeId("node-00000000000000001"))
VOLUME = Volume(
    VolumeId("vol-00000000000000001"),
    "name",
    1 << 40,
    VolumeState.IN_USE,
    1_700_000_000_000,
    (Segment(SegmentNumber(0), 1 << 40, Configuration(2, (MEMBER,), (MEMBER, MEMBER))),),
    Epoch(7),
    Attachment(FrontEndId("fe-00000000000000001"), "i", Epoch(7), AttachmentState.ATTACHED, True, 5, True),
    {"k": "v", "é": "☃"},
    "why",
    ("warning",),
    "token",
)
RECORDS = [
    VOLUME,
    replace(VOLUME, attachment=None, tags={}),
    Node(MEMBER.node, "127.0.0.1:1", "zone", 1 << 50),
    FrontEnd(FrontEndId("fe-00000000000000001"), "i", "127.0.0.1:1", ("nbd://x", "nbd+unix://?socket=y")),
    Tombstone(MEMBER.replica, MEMBER.node, VOLUME.id, SegmentNumber(0)),
    KnownPositions(VOLUME.id, (Known(MEMBER.replica, (1 << 64) - 1, (1 << 64) - 1),)),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_it_comes_back_as_it_was(record: Any) -> None:
    assert decode(type(record), encode(record)) == record


def test_a_field_added_later_takes_its_default() -> None:
    stored = json.loads(encode(VOLUME))
    del stored["attachment"]["accept_loss"]
    back = decode(Volume, json.dumps(stored).encode())
    assert back.attachment is not None
    assert back.attachment.accept_loss is False


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(encode(VOLUME)), **fields}).encode()


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        changed(format_version=2),
        changed(not_known_here=1),
        changed(state="asleep"),
        changed(size_bytes="1"),
        changed(segments=7),
        changed(segments=[{"number": 0}]),
        changed(tags=[]),
        changed(attachment=3),
        changed(name=None),
    ],
)
def test_what_is_no_record_is_corrupt(stored: bytes) -> None:
    with pytest.raises(Corrupt):
        decode(Volume, stored)


@given(st.binary(max_size=200))
def test_bytes_are_a_record_or_corrupt(stored: bytes) -> None:
    with pytest.raises(Corrupt):
        decode(Volume, stored)


@given(st.dictionaries(st.text(), st.text()), st.text())
def test_any_text_survives(tags: dict[str, str], reason: str) -> None:
    record = replace(VOLUME, tags=tags, reason=reason)
    assert decode(Volume, encode(record)) == record
