"""What the shell offers for ids of volumes, snapshots and nodes, and names of volumes: those that control knows."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from blockstore.cli.client import ControlClient, connected
from blockstore.cli.control_address import find_control
from blockstore.cli.options import default_state_directory
from blockstore.cli.settings import CONTROL_VARIABLE, STATE_VARIABLE
from blockstore.errors import CairnError
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import snapshot_pb2

#: Somebody waits with a finger on the tab key.
_PATIENCE_S: Final = 1.0

Words = list[tuple[str, str]]
"""Each word that may stand there, with what it means."""


def complete_volume(incomplete: str) -> Words:
    """Ids and names of volumes that begin with `incomplete`."""
    return _beginning(incomplete, _volumes)


def complete_snapshot(incomplete: str) -> Words:
    """Ids of snapshots that begin with `incomplete`."""
    return _beginning(incomplete, _snapshots)


def complete_node(incomplete: str) -> Words:
    """Ids of nodes that begin with `incomplete`."""
    return _beginning(incomplete, _nodes)


async def _volumes(client: ControlClient) -> Words:
    answer = await client.whole(client.stub.ListVolumes, pb.ListVolumesRequest(), _PATIENCE_S)
    ids = [(each.id, each.name) for each in answer.volumes]
    return ids + [(name, number) for number, name in ids if name]


async def _snapshots(client: ControlClient) -> Words:
    request = snapshot_pb2.ListSnapshotsRequest()
    answer = await client.whole(client.snapshots.ListSnapshots, request, _PATIENCE_S)
    return [(each.id, " ".join(filter(None, [each.volume_name, each.description]))) for each in answer.snapshots]


async def _nodes(client: ControlClient) -> Words:
    answer = await client.whole(client.stub.ListNodes, pb.ListNodesRequest(), _PATIENCE_S)
    return [(each.id, each.zone) for each in answer.nodes]


def _beginning(incomplete: str, words: Callable[[ControlClient], Awaitable[Words]]) -> Words:
    state = Path(os.environ.get(STATE_VARIABLE) or default_state_directory())

    async def ask() -> Words:
        address = find_control(os.environ.get(CONTROL_VARIABLE), state)
        async with connected(address, _PATIENCE_S) as client:
            return await words(client)

    try:
        return [word for word in asyncio.run(ask()) if word[0].startswith(incomplete)]
    except CairnError:
        # The shell takes stderr for part of the line being typed: without control there is nothing to offer.
        return []
