"""Every call names a replica, its volume and segment, and the sender's epoch: a node answers for no other one.

An address may be taken over by another node; what is meant for a replica that was there before must never reach the one
that is there now.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockstore.domain import make_id
from blockstore.errors import CairnError, Fenced, NotFound
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB
from tests.stack import LIMIT_S, SEGMENT, VOLUME, Stack, in_loop, running_stack
from tests.test_node_generations import Caller, calling

SIZE = 32 * MIB
METHODS = {each.name: each for each in pb.DESCRIPTOR.services_by_name["Replica"].methods}
#: They name no replica, or one that is not there yet; what Delete does is below.
OTHERS = {"ListReplicas", "Create", "Delete"}
OF_AN_EPOCH = ["FetchLog", "FetchDelta"]


def others_of(target: pb.Target) -> list[pb.Target]:
    """Targets that are wrong in one respect."""
    found = []
    for field, value in (
        ("volume", make_id("vol", b"other-vol")),
        ("segment", 1),
        ("replica", make_id("rep", b"o" * 9)),
    ):
        wrong = pb.Target(epoch=9)
        wrong.MergeFrom(target)
        setattr(wrong, field, value)
        found.append(wrong)
    return found


async def ask(node: Caller, method: str, target: pb.Target) -> list[Any]:
    """All that it answers to an otherwise empty request. Raises CairnError."""
    described = METHODS[method]
    request = getattr(pb, described.input_type.name)(target=target)
    call = getattr(node.stub, method)
    with cairn_errors("the node"):
        asked = (
            call(iter_of(request), timeout=LIMIT_S) if described.client_streaming else call(request, timeout=LIMIT_S)
        )
        return [each async for each in asked] if described.server_streaming else [await asked]


async def iter_of(request: Any) -> AsyncIterator[Any]:
    yield request


def test_whatever_is_asked_of_another_replica_is_refused_and_does_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack, calling(stack, 1) as node:
            volume = await stack.open(SIZE)
            await volume.write(1, b"x" * BLOCK_SIZE)
            await stack.until_all_whole(volume)
            before = end_of(stack)
            for method in METHODS.keys() - OTHERS:
                for wrong in others_of(node.target):
                    with pytest.raises(NotFound):
                        await ask(node, method, wrong)
            for wrong in others_of(node.target):
                assert not any(each.deleted for each in await deleted(node, wrong))
            assert end_of(stack) == before
            assert await volume.read(1, 1) == b"x" * BLOCK_SIZE

    in_loop(test)


async def deleted(node: Caller, target: pb.Target) -> list[Any]:
    try:
        return await ask(node, "Delete", target)
    except CairnError:
        return []


def end_of(stack: Stack) -> tuple[Any, ...]:
    """Of the replica's log, with its epoch: a seal would have changed it."""
    hosted = stack.hosted(1)
    return hosted.follower.epoch, hosted.follower.end, hosted.address


def test_whoever_comes_with_an_older_epoch_is_told_that_it_is_over(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack, calling(stack, 1) as node:
            await (await stack.open(SIZE)).write(1, b"x" * BLOCK_SIZE)
            volume = await stack.open(SIZE)
            await volume.write(1, b"y" * BLOCK_SIZE)
            await stack.until_all_whole(volume)  # a quorum of the others is enough to serve: this one knows of it now
            old = pb.Target(volume=VOLUME, segment=SEGMENT, replica=node.target.replica, epoch=1, configuration=1)
            for method in OF_AN_EPOCH:
                with pytest.raises(Fenced):
                    await ask(node, method, old)
            (sealed,) = await ask(node, "SealEpoch", old)
            assert (sealed.epoch, sealed.HasField("end")) == (2, False)
            (told,) = await ask(node, "Replicate", old)
            assert told.fenced_by == 2
            request = pb.ReadRequest(target=old, ranges=[pb.ReadRange(request=1, start=1, count=1)])
            (answer,) = [each async for each in node.stub.Read(iter_of(request), timeout=LIMIT_S)]
            assert int.from_bytes(answer.results[12:16], "little") == grpc.StatusCode.ABORTED.value[0]
            assert answer.payload == b""

    in_loop(test)
