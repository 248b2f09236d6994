"""A second reader of snapshots, written from docs/format.md alone: it imports nothing of Cairn.

It is plain on purpose, slow, and checks what the page says is checked; tests run it over what Cairn stores.
A bucket is a mapping of keys to bytes.
"""

import base64
import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Bucket = Mapping[str, bytes]
Place = tuple[bytes, int]  # (pack id, position)


def read_directory(directory: Path) -> Bucket:
    """The bucket of a local directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def unwrap_key(bucket: Bucket, keyring: Path) -> tuple[bytes, bytes]:
    """(domain, data key), with the keys of a keyring file."""
    file_keys = {key["id"]: base64.b64decode(key["key"]) for key in json.loads(keyring.read_text())["keys"]}
    stored = [json.loads(value) for key, value in bucket.items() if key.startswith("keys/")]
    told = next(key for key in stored if key["key"] in file_keys)
    blob, domain = base64.b64decode(told["wrapped"]), bytes.fromhex(told["domain"])
    bound = b"cairn key 1" + bytes.fromhex(told["repository"]) + domain
    data_key = AESGCM(file_keys[told["key"]]).decrypt(blob[1:13], blob[13:], bound)
    assert blob[:1] == b"F"
    assert derive(data_key, domain, "check")[:16].hex() == told["check"]
    return domain, data_key


def derive(data_key: bytes, salt: bytes, label: str) -> bytes:
    return HKDF(SHA256(), 32, salt, b"cairn/1/" + label.encode()).derive(data_key)


class Cursor:
    def __init__(self, content: bytes) -> None:
        self.rest = content

    def take(self, size: int) -> bytes:
        taken, self.rest = self.rest[:size], self.rest[size:]
        assert len(taken) == size
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        return self.take(self.number(2)).decode()

    def column(self, count: int, width: int) -> list[int]:
        planes = self.take(count * width)
        return [sum(planes[p * count + i] << 8 * p for p in range(width)) for i in range(count)]

    def list(self, count_size: int, read: Callable[[], Any]) -> list[Any]:
        return [read() for _ in range(self.number(count_size))]


def expand(body: bytes) -> Cursor:
    method, size = struct.unpack_from("<BI", body)
    content = body[5:] if method == 0 else zstandard.ZstdDecompressor().decompress(body[5:])
    assert method in (0, 1)
    assert len(content) == size
    return Cursor(content)


class PlainReader:
    def __init__(self, bucket: Bucket, domain: bytes, data_key: bytes) -> None:
        self.bucket, self.domain, self.data_key = bucket, domain, data_key
        indexes = [self.index(key) for key in bucket if key.startswith("index/")]
        void = {name for replaces, _ in indexes for name in replaces}
        self.frames = {
            (pack, number): (name, start, start + size)
            for _, entries in indexes
            for name, _, parts in entries
            if name not in void
            for pack, _, number, start, size, _ in parts
        }

    def unseal(self, letter: str, label: str, stored: bytes, context: bytes = b"") -> tuple[bytes, Cursor]:
        assert stored[:8] == b"cairn" + letter.encode() + b"\1\0"
        told = stored[24 : 25 + stored[24]]
        aead = AESGCM(derive(self.data_key, stored[8:24], label))
        body = aead.decrypt(bytes(12), stored[24 + len(told) :], stored[:8] + self.domain + told + context)
        return told[1:], expand(body)

    def named(self, folder: str, name: str) -> bytes:
        stored = self.bucket[f"{folder}/{name}"]
        assert hashlib.sha256(stored).hexdigest() == name[-64:]
        return stored

    def parts(self, at: Cursor) -> list[tuple[bytes, str, int, int, int, int]]:
        """(pack, snapshot, frame number, offset, size, blocks) of each frame of one object."""
        found, offset = [], 0
        for _ in range(at.number(2)):
            pack, snapshot, count = at.take(16), at.text(), at.number(2)
            columns = at.column(count, 2), at.column(count, 4), at.column(count, 1)
            for number, size, blocks in zip(*columns, strict=True):
                found.append((pack, snapshot, number, offset, size, blocks))
                offset += size
        return found

    def index(self, key: str) -> tuple[list[str], list[Any]]:
        _, at = self.unseal("I", "index", self.named(*key.split("/")))
        replaces = at.list(4, lambda: at.take(32).hex())
        return replaces, at.list(4, lambda: (at.take(32).hex(), at.number(4), self.parts(at)))

    def trailer(self, stored: bytes) -> list[tuple[Any, list[bytes]]]:
        """Of each frame of an object of packs/: what `parts` gives, and the hashes of its blocks."""
        size = int.from_bytes(stored[-12:-8], "little")
        _, at = self.unseal("T", "trailer", stored[-12 - size : -12])
        assert stored[-8:] == stored[-12 - size :][:8]
        return [(part, [at.take(16) for _ in range(part[-1])]) for part in self.parts(at)]

    def block_hash(self, block: bytes) -> bytes:
        return blake3(block, key=derive(self.data_key, self.domain, "dedupe")).digest()[:16]

    def root(self, snapshot: str) -> dict[str, Any]:
        key = next(key for key in self.bucket if re.split("[/.]", key)[:2] == ["snapshots", snapshot])
        name = key.partition(".")[2] or hashlib.sha256(self.bucket[key]).hexdigest()
        assert hashlib.sha256(self.bucket[key]).hexdigest() == name
        volume, at = self.unseal("R", "root", self.bucket[key], snapshot.encode())
        facts: dict[str, Any] = {"volume": volume.decode(), "size_bytes": at.number(8)}
        facts |= {name: at.text() for name in ("volume_name", "parent", "barrier")}
        facts["generation"] = at.number(4)
        facts |= zip(
            ("created_at_ms", "sealed_at_ms", "completed_at_ms"), struct.unpack("<3q", at.take(24)), strict=True
        )
        facts |= {"pause_us": at.number(8), "description": at.text()}
        facts["tags"] = dict(at.list(2, lambda: (at.text(), at.text())))
        facts["statistics"] = struct.unpack("<4Q", at.take(32))
        numbers = at.column(count := at.number(4), 4)
        return facts | {"shards": {number: at.take(32).hex() for number in numbers[:count]}}

    def shard(self, name: str) -> dict[int, Place]:
        """By block of the shard, the place of its content."""
        _, at = self.unseal("S", "shard", self.named("shards", name))
        places = self.shard(at.take(32).hex()) if at.number(1) else {}
        packs = [b"", *at.list(2, lambda: at.take(16))]
        runs = at.number(2)
        columns = at.column(runs, 2), at.column(runs, 2), at.column(runs, 2), at.column(runs, 4)
        block, behind = 0, [0] * len(packs)
        for gap, length, pack, step in zip(*columns, strict=True):
            block += gap
            first = (behind[pack] + step) % 2**32
            for i in range(length):
                places[block + i] = packs[pack], first + i
            behind[pack], block = first + length, block + length
        assert not at.rest
        return {block: (pack, position) for block, (pack, position) in places.items() if pack}

    def frame(self, pack: bytes, number: int) -> bytes:
        name, start, end = self.frames[pack, number]
        stored = self.named(f"packs/{name[:2]}", name)[start:end]
        bound = b"cairnF\1\0" + self.domain + pack + struct.pack("<I", number)
        key = derive(self.data_key, pack, "frame")
        return expand(AESGCM(key).decrypt(number.to_bytes(12, "little"), stored, bound)).rest

    def blocks(self, snapshot: str) -> Iterator[tuple[int, bytes]]:
        """(block number, content) of each block that is mapped; all others read as zeroes."""
        for shard, name in self.root(snapshot)["shards"].items():
            for block, (pack, position) in sorted(self.shard(name).items()):
                slot = position % 64 * 4096
                yield shard * 32768 + block, self.frame(pack, position // 64)[slot : slot + 4096]

    def quarantine(self, number: int) -> list[bytes]:
        stored = self.bucket[f"quarantine/{number}"]
        _, at = self.unseal("Q", "quarantine", stored, number.to_bytes(8, "little"))
        return at.list(4, lambda: at.take(16))
