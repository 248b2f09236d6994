"""Damage in the bucket of a real S3 server: `verify` names it, who needs it is refused as Corrupt, and nobody else.

A cluster of processes with snapshots that share nothing. Each test does one kind of damage to an object of every kind,
each of another snapshot, has a snapshotd look that has read nothing yet, and puts the objects back. What each damage
looks like from within is in tests/test_chain_verify.py.
"""

import asyncio
import dataclasses
import errno
import json
import os
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from blockstore.cli.daemons import CAIRN
from blockstore.config import FrontEndSettings
from blockstore.rpc import control_pb2
from blockstore.units import MIB
from snapshotd.object_store import ObjectStore
from snapshotd.stores import open_store
from tests.cluster import SNAPSHOTD, Cluster
from tests.conftest import forget_s3
from tests.daemons import wait_for
from tests.nbd_client import NbdClient, NbdError
from tests.s3_server import S3Server

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(300)]

SIZE: Final = 8 * MIB
WRITTEN: Final = 2 * MIB
KINDS: Final = ("packs", "index", "shards", "snapshots")
_EXIT_CORRUPT: Final = 9
_CLI_LIMIT_S: Final = 100.0

Objects = dict[str, bytes | None]
"""What each object holds, None where it is gone."""


@dataclass(frozen=True)
class Stored:
    """A completed snapshot: what it holds, and by kind the object that it alone needs."""

    id: str
    content: bytes
    keys: Mapping[str, str]


@dataclass(frozen=True)
class Bucket:
    """damageable: one for each kind; sound: another, which no test touches."""

    cluster: Cluster
    server: S3Server
    prefix: str
    damageable: list[Stored]
    sound: Stored

    @contextmanager
    def changed(self, damage: "Damage", keys: list[str]) -> Iterator[None]:
        """Until the block ends; snapshotd is started anew, so that it has no copy."""
        before = self.on_store(lambda store: read(store, keys))
        self.on_store(lambda store: put(store, damage(before)))
        restart(self.cluster)
        try:
            yield
        finally:
            self.on_store(lambda store: put(store, before))

    def on_store(self, work: Callable[[ObjectStore], Awaitable[Any]]) -> Any:
        """What it returns, done with a client of its own."""
        return on_store(self.server, self.prefix, work)


Damage = Callable[[Objects], Objects]


def flip(objects: Objects) -> Objects:
    """A bit in the middle of each."""

    def flipped(content: bytes) -> bytes:
        at = len(content) // 2
        return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]

    return {key: flipped(content or b"") for key, content in objects.items()}


def truncate(objects: Objects) -> Objects:
    return {key: (content or b"")[: len(content or b"") // 2] for key, content in objects.items()}


def remove(objects: Objects) -> Objects:
    return dict.fromkeys(objects)


def swap(objects: Objects) -> Objects:
    """Of two."""
    return dict(zip(objects, reversed(objects.values()), strict=True))


def on_store(server: S3Server, prefix: str, work: Callable[[ObjectStore], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        store = await open_store(server.settings(prefix))
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


async def read(store: ObjectStore, keys: list[str]) -> Objects:
    return {key: await store.get(key) for key in keys}


async def put(store: ObjectStore, objects: Objects) -> None:
    for key, content in objects.items():
        await (store.delete(key) if content is None else store.put(key, content))


def restart(cluster: Cluster) -> None:
    daemon = cluster.snapshotds[0]
    daemon.kill()
    cluster.start(daemon)
    cluster.wait_snapshotd()


def cairn(cluster: Cluster, *arguments: str | Path) -> tuple[int, Any, str]:
    """(exit code, the document that it prints or None, what it says on stderr)."""
    environment = os.environ | {"CAIRN_CONTROL": cluster.control_address}
    argv = [*CAIRN, *arguments, "--output", "json"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=_CLI_LIMIT_S)
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


async def read_all(uri: str) -> bytes:
    client = await NbdClient.connect(uri)
    try:
        return b"".join([await client.read(offset, MIB) for offset in range(0, SIZE, MIB)])
    finally:
        await client.close()


async def write_all(uri: str, data: bytes) -> None:
    client = await NbdClient.connect(uri)
    for offset in range(0, len(data), MIB):
        await client.write(offset, data[offset : offset + MIB])
    await client.close()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        forget_s3(patch)
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        url = s3_server.settings().url
        settings = dataclasses.replace(SNAPSHOTD, store=url, s3_endpoint=s3_server.endpoint, s3_region=s3_server.region)
        prefix = url.removeprefix(f"s3://{s3_server.bucket}/")
        with Cluster(tmp_path_factory.mktemp("damage"), snapshotds=1, snapshotd_settings=settings) as cluster:
            *damageable, sound = [stored(cluster, s3_server, prefix, seed) for seed in range(len(KINDS) + 1)]
            yield Bucket(cluster, s3_server, prefix, damageable, sound)


def stored(cluster: Cluster, server: S3Server, prefix: str, seed: int) -> Stored:
    """A snapshot of a new volume whose content nobody else has."""
    before: set[str] = on_store(server, prefix, list_keys)
    volume = cluster.create(SIZE)
    data = Random(seed).randbytes(WRITTEN)
    asyncio.run(write_all(cluster.attach(volume), data))
    (snapshot,) = cluster.snapshot(volume)
    cluster.detach(volume)
    added = on_store(server, prefix, list_keys) - before
    keys = {kind: next(key for key in added if key.startswith(f"{kind}/")) for kind in KINDS}
    return Stored(snapshot, data.ljust(SIZE, b"\0"), keys)


async def list_keys(store: ObjectStore) -> set[str]:
    return {info.key async for info in store.list()}


def restored(cluster: Cluster, snapshot: str) -> tuple[str, str]:
    """A new volume made from it, attached: its id and URI."""
    volume = str(cluster.call("CreateVolume", control_pb2.CreateVolumeRequest(snapshot=snapshot)).id)
    wait_for("it to be available", lambda: cluster.volume(volume).state == control_pb2.VOLUME_STATE_AVAILABLE)
    return volume, cluster.attach(volume)


def dropped(cluster: Cluster, volume: str) -> None:
    cluster.detach(volume)
    cluster.call("DeleteVolume", control_pb2.DeleteVolumeRequest(volume=volume))


@pytest.mark.parametrize("damage", [flip, truncate, remove], ids=lambda each: each.__name__)
def test_an_object_of_each_kind_is_damaged(bucket: Bucket, tmp_path: Path, damage: Damage) -> None:
    victims = dict(zip(KINDS, bucket.damageable, strict=True))
    with bucket.changed(damage, [victim.keys[kind] for kind, victim in victims.items()]):
        named = problems(bucket.cluster)
        for kind, victim in victims.items():
            # Without its index object nobody knows that the pack is there.
            key = victim.keys["packs" if (kind, damage) == ("index", remove) else kind]
            assert named.pop(key, None) == {victim.id}, f"{kind} of {victim.id}; also {named}"
            assert_refused(bucket.cluster, victim.id, tmp_path)
        assert not named, "more was found than was damaged"
        assert_sound(bucket, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_two_objects_of_a_kind_are_swapped(bucket: Bucket, tmp_path: Path, kind: str) -> None:
    """Each is a whole and well sealed object of this repository, only not the one that was stored there."""
    victims = bucket.damageable[:2]
    keys = [victim.keys[kind] for victim in victims]
    with bucket.changed(swap, keys):
        named = problems(bucket.cluster)
        assert sorted(named) == sorted(keys)
        assert set().union(*named.values()) == {victim.id for victim in victims}
        for victim in victims:
            assert_refused(bucket.cluster, victim.id, tmp_path)
        assert_sound(bucket, tmp_path)


def problems(cluster: Cluster) -> dict[str, set[str]]:
    """What `cairn snapshot verify` finds: by object, the snapshots that need it."""
    code, found, said = cairn(cluster, "snapshot", "verify")
    assert code == _EXIT_CORRUPT, said
    return {each["object"]: set(each["snapshots"]) for each in found["problems"]}


def assert_refused(cluster: Cluster, snapshot: str, directory: Path) -> None:
    """It is not exported, and a volume made from it shows none of that: Corrupt, and not a wait for the store."""
    path = directory / "damaged"
    code, _, said = cairn(cluster, "snapshot", "export", snapshot, path)
    assert code == _EXIT_CORRUPT, said
    assert not path.exists()
    volume, uri = restored(cluster, snapshot)
    began = time.monotonic()
    with pytest.raises(NbdError) as raised:
        asyncio.run(read_all(uri))
    assert raised.value.errno == errno.EIO
    assert time.monotonic() - began < FrontEndSettings().retry_limit_s / 2
    dropped(cluster, volume)


def assert_sound(bucket: Bucket, directory: Path) -> None:
    """The one that nobody touched is exported and restored as if nothing had happened."""
    path = directory / "sound"
    code, _, said = cairn(bucket.cluster, "snapshot", "export", bucket.sound.id, path)
    assert code == 0, said
    assert path.read_bytes() == bucket.sound.content
    volume, uri = restored(bucket.cluster, bucket.sound.id)
    assert asyncio.run(read_all(uri)) == bucket.sound.content
    dropped(bucket.cluster, volume)
