"""Keyrings: what one key wraps no other opens, and a file or a blob that is not right is told as what it is."""

import json
import multiprocessing
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.errors import Corrupt, InvalidRequest, NotFound
from snapshotd.keyring import FileKeyring, Keyring, Wrapped, WrongKey
from snapshotd.passphrase_keyring import Cost, PassphraseKeyring, read_passphrases
from snapshotd.store_settings import StoreSettings
from snapshotd.stores import open_keyring

DATA_KEY = bytes(range(32))
CONTEXT = b"cairn key 1" + bytes(32)
CHEAP = Cost(log2_n=10, r=8, p=1)


@pytest.fixture(params=["file", "passphrase"])
def keyring(request: pytest.FixtureRequest, tmp_path: Path) -> Keyring:
    if request.param == "file":
        return FileKeyring(tmp_path / "keyring", create=True)
    return PassphraseKeyring(["correct horse"], cost=CHEAP)


def test_what_is_wrapped_opens(keyring: Keyring) -> None:
    wrapped = keyring.wrap(DATA_KEY, CONTEXT)
    assert keyring.unwrap(wrapped, CONTEXT) == DATA_KEY
    assert keyring.is_current(wrapped, CONTEXT)
    assert keyring.wrap(DATA_KEY, CONTEXT) != wrapped
    assert DATA_KEY not in wrapped.blob


def test_it_opens_in_no_other_place(keyring: Keyring) -> None:
    with pytest.raises(WrongKey):
        keyring.unwrap(keyring.wrap(DATA_KEY, CONTEXT), CONTEXT + b"x")


@pytest.mark.parametrize("byte", range(0, 81, 4))
def test_a_changed_blob_does_not_open(keyring: Keyring, byte: int) -> None:
    wrapped = keyring.wrap(DATA_KEY, CONTEXT)
    blob = bytearray(wrapped.blob)
    blob[byte % len(blob)] ^= 0x40
    with pytest.raises(WrongKey):
        keyring.unwrap(replace(wrapped, blob=bytes(blob)), CONTEXT)


@pytest.mark.parametrize("length", [0, 1, 19, 60, -1])
def test_a_cut_blob_does_not_open(keyring: Keyring, length: int) -> None:
    wrapped = keyring.wrap(DATA_KEY, CONTEXT)
    with pytest.raises(WrongKey):
        keyring.unwrap(replace(wrapped, blob=wrapped.blob[:length]), CONTEXT)


@given(st.binary(max_size=120))
def test_any_bytes_are_refused_by_a_passphrase(blob: bytes) -> None:
    with pytest.raises(WrongKey):
        PassphraseKeyring(["x"], cost=CHEAP).unwrap(Wrapped("passphrase", blob), CONTEXT)


def test_one_kind_does_not_open_the_others(tmp_path: Path) -> None:
    file, passphrase = FileKeyring(tmp_path / "k", create=True), PassphraseKeyring(["x"], cost=CHEAP)
    with pytest.raises(WrongKey, match="wrapped by a passphrase, but by key-"):
        passphrase.unwrap(file.wrap(DATA_KEY, CONTEXT), CONTEXT)
    with pytest.raises(WrongKey, match="the key passphrase, and the keyring"):
        file.unwrap(passphrase.wrap(DATA_KEY, CONTEXT), CONTEXT)


# The file


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keyring"
    ring = FileKeyring(path, create=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ring.add_key()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["keyring"]


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keyring"
    ring = FileKeyring(path, create=True)
    path.chmod(0o640)
    for opened in (lambda: FileKeyring(path), ring.add_key, lambda: ring.wrap(DATA_KEY, CONTEXT)):
        with pytest.raises(InvalidRequest, match=r"mode 640.*chmod 600"):
            opened()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="restore it from its backup"):
        FileKeyring(tmp_path / "keyring")


def test_a_place_where_no_keyring_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidRequest, match=r"cannot write the keyring .*/file/keyring"):
        FileKeyring(tmp_path / "file" / "keyring", create=True)


def test_making_a_file_keeps_one_that_is_there(tmp_path: Path) -> None:
    first = FileKeyring(tmp_path / "keyring", create=True).key_ids
    assert FileKeyring(tmp_path / "keyring", create=True).key_ids == first


def test_a_new_key_is_current_and_the_old_ones_stay(tmp_path: Path) -> None:
    ring = FileKeyring(tmp_path / "keyring", create=True)
    old = ring.wrap(DATA_KEY, CONTEXT)
    ring.add_key()
    assert not ring.is_current(old, CONTEXT)
    new = ring.wrap(DATA_KEY, CONTEXT)
    assert new.key_id != old.key_id
    again = FileKeyring(tmp_path / "keyring")
    assert again.unwrap(old, CONTEXT) == again.unwrap(new, CONTEXT) == DATA_KEY
    assert again.key_ids == (old.key_id, new.key_id)


def test_a_retired_key_opens_nothing(tmp_path: Path) -> None:
    ring = FileKeyring(tmp_path / "keyring", create=True)
    old = ring.wrap(DATA_KEY, CONTEXT)
    with pytest.raises(InvalidRequest, match="is the current key"):
        ring.retire(old.key_id)
    ring.add_key()
    ring.retire(old.key_id)
    with pytest.raises(WrongKey, match=f"wrapped by the key {old.key_id}.*has only {ring.key_ids[0]}"):
        ring.unwrap(old, CONTEXT)
    with pytest.raises(NotFound):
        ring.retire(old.key_id)


def test_every_changed_byte_of_the_file_is_found(tmp_path: Path) -> None:
    """It is read as it was (white space may change), or refused; never as another key."""
    path = tmp_path / "keyring"
    ring = FileKeyring(path, create=True)
    wrapped, text = ring.wrap(DATA_KEY, CONTEXT), path.read_bytes()
    refused = []
    for place in range(len(text)):
        path.write_bytes(text[:place] + bytes([text[place] ^ 0x01]) + text[place + 1 :])
        try:
            assert ring.unwrap(wrapped, CONTEXT) == DATA_KEY
        except (Corrupt, InvalidRequest) as error:
            refused.append(error)
    assert len(refused) > len(text) / 2
    assert not any(isinstance(error, WrongKey) for error in refused)
    assert all(str(path) in str(error) for error in refused)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '"x"', '{"format":"cairn keyring","version":1,"keys":[]}'])
def test_what_is_no_keyring(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keyring"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(Corrupt, match="damaged: restore it from its backup"):
        FileKeyring(path)


def test_a_file_of_a_later_release(tmp_path: Path) -> None:
    path = tmp_path / "keyring"
    FileKeyring(path, create=True)
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(InvalidRequest, match="version 2, and this release reads 1"):
        FileKeyring(path)


def _add_keys(path: Path, count: int, start: Any) -> None:
    ring = FileKeyring(path)
    start.wait(100)
    for _ in range(count):
        ring.add_key()


def test_no_key_is_lost_where_several_processes_add_some(tmp_path: Path) -> None:
    path = tmp_path / "keyring"
    first = FileKeyring(path, create=True).key_ids
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    adding = [context.Process(target=_add_keys, args=(path, 40, start)) for _ in range(3)]
    for process in adding:
        process.start()
    for process in adding:
        process.join(100)
        assert process.exitcode == 0
    assert len(FileKeyring(path).key_ids) == 121
    assert FileKeyring(path).key_ids[:1] == first


# Passphrases


def test_a_wrong_passphrase_is_told_as_such() -> None:
    wrapped = PassphraseKeyring(["right"], cost=CHEAP).wrap(DATA_KEY, CONTEXT)
    wrong = PassphraseKeyring(["wrong"], cost=CHEAP, source="/etc/cairn/passphrase")
    with pytest.raises(WrongKey, match="the passphrase from /etc/cairn/passphrase does not open") as caught:
        wrong.unwrap(wrapped, CONTEXT)
    assert "wrong" not in str(caught.value)
    assert not wrong.is_current(wrapped, CONTEXT)


def test_the_passphrase_before_opens_and_is_not_current() -> None:
    old = PassphraseKeyring(["old"], cost=CHEAP).wrap(DATA_KEY, CONTEXT)
    both = PassphraseKeyring(["new", "old"], cost=CHEAP)
    assert both.unwrap(old, CONTEXT) == DATA_KEY
    assert not both.is_current(old, CONTEXT)
    assert PassphraseKeyring(["new"], cost=CHEAP).unwrap(both.wrap(DATA_KEY, CONTEXT), CONTEXT) == DATA_KEY


def test_only_a_person_brings_a_new_passphrase() -> None:
    with pytest.raises(InvalidRequest, match="write the new one in the line above"):
        PassphraseKeyring(["x"], cost=CHEAP).add_key()


def test_the_default_cost_is_what_is_recommended() -> None:
    wrapped = PassphraseKeyring(["x"]).wrap(DATA_KEY, CONTEXT)
    assert wrapped.blob[:4] == bytes([ord("P"), 17, 8, 1])
    assert PassphraseKeyring(["x"]).unwrap(wrapped, CONTEXT) == DATA_KEY


@pytest.mark.parametrize(
    "cost", [Cost(24, 32, 1), Cost(20, 8, 1), Cost(63, 1, 1), Cost(9, 8, 1), Cost(14, 0, 1), Cost(14, 8, 255)]
)
def test_a_cost_that_would_take_the_machine_is_not_tried(cost: Cost) -> None:
    """Of 4 GiB, of 1 GiB; and such as nobody would write."""
    blob = bytearray(PassphraseKeyring(["x"], cost=CHEAP).wrap(DATA_KEY, CONTEXT).blob)
    blob[1:4] = cost.log2_n, cost.r, cost.p
    with pytest.raises(WrongKey, match="it is not tried"):
        PassphraseKeyring(["x"], cost=CHEAP).unwrap(Wrapped("passphrase", bytes(blob)), CONTEXT)
    with pytest.raises(InvalidRequest, match="outside the bounds"):
        PassphraseKeyring(["x"], cost=cost)


def test_the_file_of_passphrases(tmp_path: Path) -> None:
    path = tmp_path / "passphrase"
    path.write_text("the new one\n\nthe old ö one\n")
    path.chmod(0o600)
    ring = read_passphrases(path, cost=CHEAP)
    for passphrase in ("the new one", "the old ö one"):
        wrapped = PassphraseKeyring([passphrase], cost=CHEAP).wrap(DATA_KEY, CONTEXT)
        assert ring.unwrap(wrapped, CONTEXT) == DATA_KEY
    assert ring.is_current(ring.wrap(DATA_KEY, CONTEXT), CONTEXT)
    path.chmod(0o644)
    with pytest.raises(InvalidRequest, match="chmod 600"):
        read_passphrases(path)
    with pytest.raises(NotFound):
        read_passphrases(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\n"])
def test_a_file_without_a_passphrase(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "passphrase"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InvalidRequest, match="passphrase"):
        read_passphrases(path)


def test_which_keyring_the_settings_mean(tmp_path: Path) -> None:
    path = tmp_path / "passphrase"
    path.write_text("x\n")
    path.chmod(0o600)
    assert isinstance(open_keyring(StoreSettings("memory://", passphrase_file=path)), PassphraseKeyring)
    ring = StoreSettings("memory://", keyring=tmp_path / "keyring")
    with pytest.raises(NotFound):
        open_keyring(ring)
    assert isinstance(open_keyring(ring, create=True), FileKeyring)
    with pytest.raises(InvalidRequest, match="always encrypted"):
        open_keyring(StoreSettings("memory://"))
    with pytest.raises(InvalidRequest, match="choose one"):
        StoreSettings("memory://", keyring=path, passphrase_file=path)
