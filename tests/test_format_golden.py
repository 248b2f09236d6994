"""Bytes that were once stored: they are read as ever, by Cairn and by the plain reader, and written the same.

Whoever changes one of them changes the stored format: that takes a new version, and code that reads both.
Another release of zstd may compress otherwise, so what is written is compared before its compression.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import astuple, fields

import pytest

from snapshotd.compression import expand
from snapshotd.crypto import Kind
from snapshotd.frame import decode_frame
from snapshotd.index import Index, decode_index, encode_index
from snapshotd.manifest import BlockRef, build_shard, decode_shard, encode_patch, encode_shard
from snapshotd.pack import ObjectWriter, check_object
from snapshotd.quarantine import decode_quarantine, encode_quarantine
from snapshotd.root import decode_root, encode_root
from tests.format_objects import KEYS, ROOT, SNAPSHOT, VOLUME, salt, small_shard, words
from tests.plain_reader import PlainReader

_DATA_KEY = bytes(range(100, 132))
_BODIES = tuple(
    map(
        bytes.fromhex,
        (
            "010010000028b52ffd60000f050100c0626c6f636b2030206f66207468697320766f6c756d652c200100947ffd3906",
            "010020000028b52ffd60001f4d0100c8626c6f636b2031206f66207468697320766f6c756d652c20320400df073e807aeb8758a0fcebcf31",
        ),
    )
)
_GOLDEN = {
    "pack": bytes.fromhex(
        "5f08fcb2ade6dd85f2299ee00930fb1138ad19e2a2cffa47f3f72eea6e7f48b0b6b1119430cfb5c48f55ce9850b8b8a5"
        "a892653ec91d092a84b4e7c6b0ed0b0ac41a4817811f5c5c510aa6fe985933f9b51b9013bf3f85f827218341d3e29701"
        "9a3b49fe5457eaf8fa1d4a6b307eba850e892571b5216e981df90e742a2466ef59c6eb989ef5ba636169726e54010096"
        "1c41e60bf3f48edbcb60932aaa3cae00608f493c40f530d0bc9e7d0371d19b43bad8808e4ed583cc03bcb66fd07b6c2e"
        "6f81f092660ed3180f14ab97846182bd3b352b74659d57b9ddb5c6746334dd9927fe37e04f3d5dcbcfb074754929b524"
        "9a258a2a54bdd147cfd20e35019ca020e115a89e74dafab98f2a79025925aa5b2bffc5d1ffbc40a7264d64c499337398"
        "000000636169726e540100"
    ),
    "index": bytes.fromhex(
        "636169726e49010021db48508c6cdac9ccce763e604212640013a6f27860562719a265c023e18645a9faa44827acee89"
        "3fa00740dfd2b26ebcd367e20817ab16ce95502cd07916d1e2fd35d93d0dd38db1e6abc0785be42a8c9b39af2751448a"
        "954941fe4cce991da16bcf5ff445ad57a267b92686906e657a3f09f02b08a2a7f61f7cba603dc4171783017b9d5c8a18"
        "ab7d03c2099418d953563096be2d7077af72c428"
    ),
    "shard": bytes.fromhex(
        "636169726e53010082ab38ac88d2df835a8e693fcc1f135e005d8d33522567fc706f8def3a9e39dab6ffabb8a5668bc5"
        "85c075e792cbddfbe39f8396c209049cbdb3b0850b924fa40ec0024a5f9a7a3e5cd73e907a1cdd7c925cd28e337c96c3"
        "20caba7ad6e90b"
    ),
    "patch": bytes.fromhex(
        "636169726e530100f1894e612b3152b9010291724cd34b550089cc026784107565ccb73dba5b016a0a26605269c6d332"
        "c9f6feb5d9b5c2868758b514b34c0ebade7f26c49985ee8fda38103733ecb8f238087b2d4761239dd3443fa975e5db19"
        "4270cf4affb69c9051d948e4b528ad501dbc0928047083"
    ),
    "root": bytes.fromhex(
        "636169726e5201007b0311ead45c68b2475927ef4bae395815766f6c2d30303131323233333434353536363737388160"
        "9c1a9670f0397d35df5233825110c8e3ba608606b18641cfd760d82e7f6e12b39e5adc98d68fa60bb143726c84d1d240"
        "ebf7e51235ef06f72915024c2941b2e3792d69f664880b150830d8170042aae34aae88d46057259a89c723d7edd5529d"
        "cd31da86b8deabf7dafae62acfda0105a937cf2768180e2b2d530beaa13b2466fc6387967937f4c9a730b0b20887006e"
        "638ff4e02e63bf1749f0453f3689ac5b9addb61780d3a6895268085819a1e159128887ad0f6a741c05ec503d5aeb68d9"
        "d8f4355e88626940804e7010d2"
    ),
    "quarantine": bytes.fromhex(
        "636169726e51010013162ba4dba8a7149556c34fb9ffb06800fa871d7b80e1634184725c2941ae6f233fe8fa72830ed6"
        "f9053d8545dfde4a1130b2200c56d4a535e38de3359d8ed971ba5d8485f6d93cb79a"
    ),
}
_NAMES = {kind: hashlib.sha256(stored).hexdigest() for kind, stored in _GOLDEN.items()}
_CHANGES = {3: BlockRef(salt(3), 4, 5), 101: None, 102: None}


def _written() -> dict[str, bytes]:
    """What this release makes of the same contents and salts."""
    writer, cipher = ObjectWriter(KEYS, salt(21)), KEYS.frame_cipher(salt(21))
    for number, blocks in enumerate(([words(0)], [words(1), words(2)])):
        hashes = list(map(KEYS.block_hash, blocks))
        writer.copy(salt(21), SNAPSHOT, number, cipher.encrypt(number, _BODIES[number]), hashes)
    _, buffers, entry = writer.finish()
    return {
        "pack": b"".join(buffers),
        "index": encode_index(KEYS, Index((entry,), ("ef" * 32,)), salt(22))[1],
        "shard": encode_shard(KEYS, small_shard(), salt(23))[1],
        "patch": encode_patch(KEYS, _NAMES["shard"], 1, _CHANGES, salt(24))[1],
        "root": encode_root(KEYS, ROOT, salt(25))[0],
        "quarantine": encode_quarantine(KEYS, 5, [salt(2), salt(1)], salt(26)),
    }


_SEALED = {
    "index": (Kind.INDEX, b""),
    "shard": (Kind.SHARD, b""),
    "patch": (Kind.SHARD, b""),
    "root": (Kind.ROOT, SNAPSHOT.encode()),
    "quarantine": (Kind.QUARANTINE, (5).to_bytes(8, "little")),
}


def _laid_open(kind: str, stored: bytes) -> tuple[bytes, bytes]:
    """(header, salt and what is in clear; the content) of a sealed object."""
    plain = KEYS.open(*_SEALED[kind], stored, kind)
    return stored[: 25 + stored[24]], expand(plain, 10_000, kind)


@pytest.mark.parametrize("kind", list(_SEALED))
def test_what_is_written_is_what_was_written(kind: str) -> None:
    assert _laid_open(kind, _written()[kind]) == _laid_open(kind, _GOLDEN[kind])


def test_packs_are_written_as_they_were_written() -> None:
    assert _written()["pack"].hex() == _GOLDEN["pack"].hex()


def test_what_was_written_is_read() -> None:
    trailer = check_object(KEYS, _NAMES["pack"], _GOLDEN["pack"])
    assert trailer.hashes == (((KEYS.block_hash(words(0)),), (KEYS.block_hash(words(1)), KEYS.block_hash(words(2)))),)
    (entry,) = decode_index(KEYS, _NAMES["index"], _GOLDEN["index"]).entries
    assert (entry.object, entry.size, entry.parts) == (_NAMES["pack"], len(_GOLDEN["pack"]), trailer.parts)
    frame = trailer.parts[0].find(1)
    assert frame is not None
    ranged = _GOLDEN["pack"][frame.offset : frame.offset + frame.length]
    assert decode_frame(KEYS, salt(21), 1, ranged) == [words(1), words(2)]
    expected = small_shard()
    chain = [decode_shard(KEYS, _NAMES["shard"], _GOLDEN["shard"])]
    assert build_shard(chain) == expected
    chain.append(decode_shard(KEYS, _NAMES["patch"], _GOLDEN["patch"]))
    expected.apply(_CHANGES)
    assert build_shard(chain) == expected
    assert decode_root(KEYS, SNAPSHOT, _GOLDEN["root"], hashlib.sha256(_GOLDEN["root"]).digest()) == ROOT
    assert decode_quarantine(KEYS, 5, _GOLDEN["quarantine"]) == {salt(1), salt(2)}


def _plain_reader() -> PlainReader:
    """Over a bucket of the golden objects."""
    folders = {"index": "index/", "shard": "shards/", "patch": "shards/", "pack": f"packs/{_NAMES['pack'][:2]}/"}
    bucket = {folder + _NAMES[kind]: _GOLDEN[kind] for kind, folder in folders.items()}
    bucket |= {f"snapshots/{SNAPSHOT}": _GOLDEN["root"], "quarantine/5": _GOLDEN["quarantine"]}
    return PlainReader(bucket, KEYS.domain, _DATA_KEY)


def test_the_plain_reader_reads_frames_by_the_index() -> None:
    reader = _plain_reader()
    assert reader.frames.keys() == {(salt(21), 0), (salt(21), 1)}
    assert reader.frame(salt(21), 0) == words(0)
    assert reader.frame(salt(21), 1) == words(1) + words(2)


def test_the_plain_reader_reads_the_trailer() -> None:
    reader = _plain_reader()
    (first, first_hashes), (second, second_hashes) = reader.trailer(_GOLDEN["pack"])
    assert (first[:3], second[:3]) == ((salt(21), SNAPSHOT, 0), (salt(21), SNAPSHOT, 1))
    assert first_hashes == [reader.block_hash(words(0))] == [KEYS.block_hash(words(0))]
    assert second_hashes == [KEYS.block_hash(words(1)), KEYS.block_hash(words(2))]


def test_the_plain_reader_reads_shards_and_patches() -> None:
    shard = small_shard()
    assert _plain_reader().shard(_NAMES["shard"]) == _places(shard.items())
    shard.apply(_CHANGES)
    assert _plain_reader().shard(_NAMES["patch"]) == _places(shard.items())


def _places(items: Iterable[tuple[int, BlockRef]]) -> dict[int, tuple[bytes, int]]:
    return {block: (ref.pack, ref.frame * 64 + ref.slot) for block, ref in items}


def test_the_plain_reader_reads_root_and_quarantine() -> None:
    reader = _plain_reader()
    root = reader.root(SNAPSHOT)
    assert root.pop("volume") == VOLUME
    assert root.pop("statistics") == astuple(ROOT.statistics)
    assert root == {name: getattr(ROOT, name) for name in root}
    assert len(root) == len(fields(ROOT)) - 3, "all but snapshot, volume, statistics"
    assert set(reader.quarantine(5)) == {salt(1), salt(2)}
