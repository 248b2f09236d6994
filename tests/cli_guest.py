"""A guest that reads and writes by the NBD client of the CLI itself, one connection a call."""

import asyncio

from blockstore.cli.demo_client import NbdClient
from nbd_server.uri import parse_uri


def write(uri: str, offset: int, data: bytes) -> None:
    async def run() -> None:
        async with await NbdClient.connect(parse_uri(uri)) as client:
            await client.write(offset, data)

    asyncio.run(run())


def read(uri: str, offset: int, length: int) -> bytes:
    async def run() -> bytes:
        async with await NbdClient.connect(parse_uri(uri)) as client:
            return await client.read(offset, length)

    return asyncio.run(run())
