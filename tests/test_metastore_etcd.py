"""What only etcd can do to a metastore: lose answers, forget, fill up, go away, come back older, refuse a user."""

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blockstore.control.metastore import etcd_client, etcd_mirror, etcd_writer
from blockstore.control.metastore.etcd import EtcdMetastore
from blockstore.control.metastore.etcd_address import EtcdAddress
from blockstore.control.metastore.etcd_client import PAGE, EtcdClient, Unanswered
from blockstore.control.metastore.etcd_writer import Fence, NotActive
from blockstore.control.metastore.interface import ABSENT, MAX_VALUE_SIZE, Change, Compacted, Revision
from blockstore.errors import Corrupt, InvalidRequest, NoSpace, QuorumUnavailable
from blockstore.rpc import etcd_pb2 as pb
from tests.etcd_server import EtcdServer, running_etcd
from tests.metastores import opened, prefix_for
from tests.proxy import Proxy

LIMIT_S = 60


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """For tests that do nothing to etcd itself."""
    with running_etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EtcdServer]:
    with running_etcd(tmp_path) as server:
        yield server


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An etcd that is there is waited for, also where its disk or the whole machine stands still for some seconds."""
    for module in (etcd_client, etcd_mirror, etcd_writer):
        monkeypatch.setattr(module, "LIMIT_S", LIMIT_S - 10.0)


@contextmanager
def impatient() -> Iterator[None]:
    """Etcd is given up soon: for calls that fail in any case, as one that answers may take longer."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (etcd_client, etcd_mirror, etcd_writer):
            patch.setattr(module, "LIMIT_S", 1.0)
        patch.setattr(etcd_client, "ATTEMPT_S", 0.3)
        yield


At = Callable[[EtcdServer], EtcdAddress]


@pytest.fixture
def address(request: pytest.FixtureRequest) -> At:
    """Of a server, with a prefix that only this test has."""
    return lambda server: EtcdAddress(tuple(server.clients), prefix_for(request.node.name))


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await scenario()

    asyncio.run(limited())


async def take(changes: AsyncIterator[Change], count: int) -> list[Change]:
    return [await anext(changes) for _ in range(count)]


# ---- one look


class CountingClient(EtcdClient):
    """How often etcd was asked."""

    asked = 0

    async def range(self, request: pb.RangeRequest) -> pb.RangeResponse:
        self.asked += 1
        return await super().range(request)

    async def look(self, transaction: pb.TxnRequest) -> pb.TxnResponse:
        self.asked += 1
        return await super().look(transaction)


def test_a_block_of_reads_asks_etcd_once_and_shows_what_others_changed_before_it(
    shared: EtcdServer, address: At
) -> None:
    async def scenario() -> None:
        client = CountingClient(address(shared))
        async with opened(client) as store, opened(EtcdClient(address(shared))) as other:
            for number in range(1, 21):
                there = await other.transact({}, {f"k/{number}": b"theirs"})
                asked = client.asked
                with store.as_of_now(), store.as_of_now():
                    for _ in range(5):
                        assert len((await store.list("k/")).items) == number
                        found = await store.get(f"k/{number}")
                        assert found is not None
                        assert found.revision == there
                assert client.asked == asked + 1
                assert len((await store.list("k/")).items) == number
                assert client.asked == asked + 2
                with store.as_of_now():
                    found = await store.get(f"k/{number}")
                    assert found is not None
                    assert found.revision == there
                    assert len((await store.list("k/")).items) == number
                assert client.asked == asked + 3

    run(scenario)


def test_in_a_block_of_reads_a_lost_race_shows_who_won_it(shared: EtcdServer, address: At) -> None:
    """Else who tries again with what he is shown would lose for ever."""

    async def scenario() -> None:
        async with opened(EtcdClient(address(shared))) as store, opened(EtcdClient(address(shared))) as other:
            await store.transact({}, {"k": b"0"})
            with store.as_of_now():
                before = await store.get("k")
                assert before is not None
                theirs = await other.transact({"k": before.revision}, {"k": b"1"})
                assert await store.transact({"k": before.revision}, {"k": b"mine"}) is None
                found = await store.get("k")
                assert found is not None
                assert found.revision == theirs
                assert await store.transact({"k": found.revision}, {"k": b"mine"}) is not None

    run(scenario)


def test_a_block_of_reads_shows_what_other_tasks_change_here(shared: EtcdServer, address: At) -> None:
    async def scenario() -> None:
        async with opened(EtcdClient(address(shared))) as store:
            with store.as_of_now():
                for number in range(1, 21):
                    await asyncio.create_task(store.transact({}, {f"k/{number}": b""}))
                    assert len((await store.list("k/")).items) == number

    run(scenario)


def test_a_task_begun_in_a_block_of_reads_is_not_part_of_it(shared: EtcdServer, address: At) -> None:
    async def scenario() -> None:
        async with opened(EtcdClient(address(shared))) as store, opened(EtcdClient(address(shared))) as other:
            with store.as_of_now():
                assert not (await store.list("k/")).items
                await other.transact({}, {"k/1": b""})
                assert len((await asyncio.create_task(store.list("k/"))).items) == 1

    run(scenario)


# ---- answers that are lost


class LosingClient(EtcdClient):
    """Transactions reach etcd, or not, or late, as chance has it; and so do their answers."""

    def __init__(self, address: EtcdAddress, seed: int) -> None:
        super().__init__(address)
        self._chance = random.Random(seed)
        self.late: set[asyncio.Task[Any]] = set()

    async def transact(self, transaction: pb.TxnRequest) -> pb.TxnResponse:
        match self._chance.choice(("whole", "whole", "never sent", "answer lost", "late", "twice")):
            case "never sent":
                raise Unanswered("it never left")
            case "answer lost":
                await super().transact(transaction)
                raise Unanswered("its answer was lost")
            case "late":
                self.late.add(asyncio.ensure_future(self._later(transaction)))
                raise Unanswered("it is on its way")
            case "twice":
                await super().transact(transaction)
        return await super().transact(transaction)

    async def _later(self, transaction: pb.TxnRequest) -> None:
        await asyncio.sleep(self._chance.random() * 0.01)  # somewhere among what is done meanwhile
        await super().transact(transaction)


@pytest.mark.parametrize("seed", range(4))
def test_what_became_of_a_transaction_is_told_rightly_whatever_is_lost(
    shared: EtcdServer, address: At, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Each increment happens exactly once if it is told so, and not at all if it is refused."""
    monkeypatch.setattr(etcd_writer, "PAUSE_S", 0.0)

    async def scenario() -> None:
        client = LosingClient(address(shared), seed)
        async with opened(client) as store:
            made: list[Revision] = []
            for value in range(60):
                revision = made[-1] if made else ABSENT
                assert await store.transact({"n": Revision(revision + 7)}, {"n": b"never"}) is None
                told = await store.transact({"n": revision}, {"n": str(value).encode()})
                assert told is not None
                made.append(told)
            await asyncio.gather(*client.late)
            found = await store.get("n")
            assert found is not None
            assert (found.value, found.revision) == (b"59", made[-1])
            assert client.late, "nothing was late: this test shows nothing"

    run(scenario)


def test_an_outcome_that_stays_unknown_is_told_as_that(
    shared: EtcdServer, address: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        client = EtcdClient(address(shared))

        async def silent(transaction: pb.TxnRequest) -> pb.TxnResponse:
            raise Unanswered("silence")

        async with opened(client) as store:
            await store.transact({}, {"a": b"1"})
            with monkeypatch.context() as patch, impatient():
                patch.setattr(client, "transact", silent)
                with pytest.raises(QuorumUnavailable, match="whether the last change was made is not known"):
                    await store.transact({}, {"a": b"2"})
            assert await store.transact({}, {"a": b"3"})

    run(scenario)


def test_of_two_stores_on_one_etcd_each_sees_what_the_other_changed(
    shared: EtcdServer, address: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that control does that; but nothing of it may be lost. Only of an answer that is lost would they quarrel."""
    monkeypatch.setattr(etcd_client, "ATTEMPT_S", LIMIT_S)

    async def increment(store: EtcdMetastore) -> None:
        while True:
            now = await store.get("n")
            value, revision = (int(now.value), now.revision) if now else (0, ABSENT)
            if await store.transact({"n": revision}, {"n": str(value + 1).encode()}):
                return

    async def scenario() -> None:
        async with opened(EtcdClient(address(shared))) as one, opened(EtcdClient(address(shared))) as other:
            await asyncio.gather(*(increment(store) for store in (one, other) for _ in range(10)))
            assert [item.value for item in (await one.list("n")).items] == [b"20"]
            assert await one.list("n") == await other.list("n")

    run(scenario)


# ---- the fence


def test_without_its_key_a_store_reads_and_changes_nothing(shared: EtcdServer, address: At) -> None:
    async def scenario() -> None:
        at = address(shared)
        key = f"{at.prefix}/control/1"
        shared.ctl("put", key, "{}")
        client = EtcdClient(at)
        created = (await client.range(pb.RangeRequest(key=key.encode()))).kvs[0].create_revision
        async with opened(client, Fence(key.encode(), created)) as store:
            first = await store.transact({}, {"a": b"1"})
            shared.ctl("del", key)
            shared.ctl("put", key, "{}")  # made anew, it is another one's
            with pytest.raises(NotActive, match="not the active one any more"):
                await store.transact({}, {"a": b"2"})
            with pytest.raises(NotActive):
                await store.transact({}, {}, ["a"])
            found = await store.get("a")
            assert found is not None
            assert (found.value, found.revision) == (b"1", first)
            assert (await store.list("a")).items == (found,)

    run(scenario)


def test_a_fenced_store_whose_answer_was_lost_is_told_whether_it_happened(shared: EtcdServer, address: At) -> None:
    class Fencing(EtcdClient):
        """Loses an answer, and the fence right after it."""

        async def transact(self, transaction: pb.TxnRequest) -> pb.TxnResponse:
            answer = await super().transact(transaction)
            if len(transaction.success) > 1:
                shared.ctl("del", f"{self.address.prefix}/control/1")
                raise Unanswered("lost")
            return answer

    async def scenario() -> None:
        at = address(shared)
        key = f"{at.prefix}/control/1"
        shared.ctl("put", key, "{}")
        client = Fencing(at)
        created = (await client.range(pb.RangeRequest(key=key.encode()))).kvs[0].create_revision
        async with opened(client, Fence(key.encode(), created)) as store:
            revision = await store.transact({}, {"a": b"1"})
            found = await store.get("a")
            assert found is not None
            assert found.revision == revision

    run(scenario)


# ---- reading


def test_a_large_prefix_is_read_in_pages_of_one_revision(shared: EtcdServer, address: At) -> None:
    """What is changed between two pages is in none of them, and comes by the watch."""

    class Changing(EtcdClient):
        pages = 0

        async def range(self, request: pb.RangeRequest) -> pb.RangeResponse:
            answer = await super().range(request)
            if request.limit and answer.more:
                self.pages += 1
                shared.ctl("put", f"{self.address.prefix}/catalog/k/{2 * PAGE + 10:04}", "changed")
            return answer

    async def scenario() -> None:
        async with opened(EtcdClient(address(shared))) as store:
            for start in range(0, 3 * PAGE, PAGE):
                await store.transact({}, {f"k/{number:04}": b"first" for number in range(start, start + PAGE)})
        client = Changing(address(shared))
        async with opened(client) as store:
            assert client.pages >= 3
            before = await store.list("k/")
            assert len(before.items) == 3 * PAGE
            assert await store.transact({}, {"x": b""})
            assert (await store.list("k/")).items[2 * PAGE + 10].value == b"changed"

    run(scenario)


def test_a_watch_goes_on_where_it_was_when_etcd_comes_back(own: EtcdServer, address: At) -> None:
    async def scenario() -> None:
        async with opened(EtcdClient(address(own))) as store:
            base = (await store.list("")).revision
            changes = store.watch("k", base)
            made = [await store.transact({}, {"k1": b""})]
            assert [each.revision for each in await take(changes, 1)] == made
            own.kill()
            own.start()
            for number in range(2, 6):
                made.append(await store.transact({}, {f"k{number}": b""}))
            assert [each.revision for each in await take(changes, 4)] == made[1:]
            assert [each.key for each in (await store.list("k")).items] == ["k1", "k2", "k3", "k4", "k5"]

    run(scenario)


def test_what_was_compacted_while_etcd_was_away_is_told_and_lists_are_right(own: EtcdServer, address: At) -> None:
    async def scenario() -> None:
        proxy = Proxy()
        proxy.start(own.clients[0])
        try:
            through = EtcdAddress((proxy.address,), address(own).prefix)
            async with opened(EtcdClient(through)) as store, opened(EtcdClient(address(own))) as other:
                await store.transact({}, {"k/gone": b"", "k/kept": b"1"})
                before = await store.list("k/")
                watching = asyncio.ensure_future(take(store.watch("k/", before.revision), 1))
                await asyncio.to_thread(proxy.cut)
                await other.transact({}, {"k/kept": b"2", "k/new": b""}, ["k/gone"])
                await asyncio.to_thread(own.compact)
                await asyncio.to_thread(proxy.restore)
                with pytest.raises(Compacted):
                    await watching
                after = await store.list("k/")
                assert [(each.key, each.value) for each in after.items] == [("k/kept", b"2"), ("k/new", b"")]
                last = await store.transact({}, {"k/new": b"3"})
                assert [each.revision for each in await take(store.watch("k/", after.revision), 1)] == [last]
        finally:
            proxy.close()

    run(scenario)


def test_a_list_does_not_wait_for_a_watch_that_has_fallen_silent(
    own: EtcdServer, address: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watch whose connection delivers nothing any more is given up for another one."""
    monkeypatch.setattr(etcd_mirror, "_SILENCE_S", 0.3)

    class Deaf(EtcdClient):
        watches = 0

        async def watch(self, start: bytes, end: bytes, revision: int) -> AsyncIterator[pb.WatchResponse]:
            self.watches += 1
            if self.watches == 1:
                await asyncio.Event().wait()
            async for response in super().watch(start, end, revision):
                yield response

    async def scenario() -> None:
        client = Deaf(address(own))
        async with opened(client) as store:
            await store.transact({}, {"a": b"1"})
            assert [each.value for each in (await store.list("a")).items] == [b"1"]
            assert client.watches >= 2

    run(scenario)


# ---- an etcd that does not do what it should


def test_one_that_is_away_says_so_with_an_advice(own: EtcdServer, address: At) -> None:
    async def scenario() -> None:
        async with opened(EtcdClient(address(own))) as store:
            await store.transact({}, {"a": b"1"})
            own.kill()
            for call in (store.get("a"), store.list(""), store.transact({}, {"a": b"2"})):
                with impatient(), pytest.raises(QuorumUnavailable, match="etcdctl endpoint status"):
                    await call
            own.start()
            found = await store.get("a")
            assert found is not None

    run(scenario)


def test_one_of_three_members_may_die(tmp_path: Path, address: At) -> None:
    async def scenario(server: EtcdServer) -> None:
        async with opened(EtcdClient(address(server))) as store:
            changes, made = store.watch("k", (await store.list("")).revision), []
            for number, member in enumerate(server.members):
                made.append(await store.transact({}, {f"k{number}": b""}))
                member.kill()
                for again in "ab":
                    made.append(await store.transact({}, {f"k{number}{again}": b""}))
                assert len((await store.list("k")).items) == len(made)
                await asyncio.to_thread(server.start)
            assert [each.revision for each in await take(changes, len(made))] == made

    with running_etcd(tmp_path, members=3) as server:
        run(lambda: scenario(server))


def test_a_full_one_is_no_space_and_goes_on_when_there_is_room(tmp_path: Path, address: At) -> None:
    async def scenario(server: EtcdServer) -> None:
        async with opened(EtcdClient(address(server))) as store:
            told: dict[str, Revision] = {}

            async def fill() -> None:
                for number in range(200):
                    key = f"k{number % 4}"
                    revision = await store.transact({}, {key: bytes(MAX_VALUE_SIZE)})
                    assert revision is not None
                    told[key] = revision

            with pytest.raises(NoSpace, match="alarm disarm"):
                await fill()
            assert {each.key: each.revision for each in (await store.list("k")).items} == told
            with pytest.raises(NoSpace):
                await store.transact({}, {"more": b""})
            await asyncio.to_thread(server.compact_and_disarm)
            assert await store.transact({}, {"more": b""})

    with running_etcd(tmp_path, more=("--quota-backend-bytes", str(16 << 20))) as server:
        run(lambda: scenario(server))


def test_an_old_copy_of_its_data_is_corrupt(own: EtcdServer, tmp_path: Path, address: At) -> None:
    async def scenario() -> None:
        async with opened(EtcdClient(address(own))) as store:
            await store.transact({}, {"a": b"1"})
            data = own.members[0].directory / "data"
            own.kill()
            shutil.copytree(data, tmp_path / "copy")
            own.start()
            for _ in range(5):
                await store.transact({}, {"a": b"2"})
            own.kill()
            shutil.rmtree(data)
            shutil.copytree(tmp_path / "copy", data)
            own.start()
            with pytest.raises(Corrupt, match="an old copy"):
                await store.get("a")
            with pytest.raises(Corrupt):
                await store.transact({}, {"a": b"3"})

    run(scenario)


def test_members_of_two_etcds_are_corrupt(own: EtcdServer, shared: EtcdServer, address: At) -> None:
    async def scenario() -> None:
        client = EtcdClient(EtcdAddress((own.clients[0], shared.clients[0]), address(own).prefix))
        async with opened(client) as store:
            await store.transact({}, {"a": b"1"})
            own.kill()
            with pytest.raises(Corrupt, match="two etcd clusters"):
                await store.get("a")

    run(scenario)


def test_another_format_is_refused(shared: EtcdServer, address: At) -> None:
    async def scenario() -> None:
        at = address(shared)
        shared.ctl("put", f"{at.prefix}/format", "2")
        with pytest.raises(Corrupt, match="format"):
            async with opened(EtcdClient(at)):
                pass

    run(scenario)


# ---- users


def test_users_are_told_from_each_other(own: EtcdServer, address: At) -> None:
    at = address(own)
    for command in (
        ("user", "add", "root:secret"),
        ("user", "grant-role", "root", "root"),
        ("role", "add", "cairn"),
        ("role", "grant-permission", "cairn", "--prefix=true", "readwrite", at.prefix + "/"),
        ("user", "add", "cairn:stone"),
        ("user", "grant-role", "cairn", "cairn"),
        ("auth", "enable"),
    ):
        own.ctl(*command)

    def as_user(user: str = "", password: str = "", prefix: str = at.prefix) -> EtcdClient:
        return EtcdClient(EtcdAddress(at.members, prefix, user=user, password=password))

    async def scenario() -> None:
        for client in (as_user(), as_user("cairn", "wrong"), as_user("cairn", "stone", "/other")):
            with pytest.raises(InvalidRequest, match="--metastore-user"):
                async with opened(client):
                    pass
        client = as_user("cairn", "stone")
        async with opened(client) as store:
            await store.transact({}, {"a": b"1"})
            # Every token that was given before is void then.
            await asyncio.to_thread(own.ctl, "--user", "root:secret", "user", "add", "more:more")
            assert await store.transact({}, {"a": b"2"})
            assert [each.value for each in (await store.list("a")).items] == [b"2"]

    run(scenario)
