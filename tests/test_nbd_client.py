"""The tests' NBD client against nbdkit: another's server, so that both may be trusted."""

import asyncio
import errno
import subprocess
from collections.abc import Iterator

import pytest

from tests.daemons import listens, wait_for
from tests.loopback import free_address
from tests.nbd_client import Disconnected, NbdClient, NbdError
from tests.programs import find_program, require_programs

SIZE = 1 << 20


@pytest.fixture
def server() -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The URI of an nbdkit with 1 MiB of memory, and its process."""
    require_programs("nbdkit")
    host, port = free_address().split(":")
    command = [str(find_program("nbdkit")), "--foreground", "--ipaddr", host, "--port", port, "memory", str(SIZE)]
    with subprocess.Popen(command) as process:
        wait_for("nbdkit to listen", lambda: listens(host, int(port), process.pid))
        yield f"nbd://{host}:{port}/any", process
        process.kill()


def test_what_is_written_is_read(server: tuple[str, object]) -> None:
    async def check() -> None:
        client = await NbdClient.connect(server[0])
        assert client.size_bytes == SIZE
        await asyncio.gather(*(client.write(at * 512, bytes([at]) * 512) for at in range(64)))
        await client.flush()
        found = await asyncio.gather(*(client.read(at * 512, 512) for at in range(64)))
        assert found == [bytes([at]) * 512 for at in range(64)]
        await client.trim(0, 512)
        await client.write_zeroes(512, 512)
        await client.write(1024, b"x" * 512, fua=True)
        assert await client.read(0, 1536) == bytes(1024) + b"x" * 512
        await client.close()

    asyncio.run(check())


def test_an_error_is_told_and_the_connection_goes_on(server: tuple[str, object]) -> None:
    async def check() -> None:
        client = await NbdClient.connect(server[0])
        with pytest.raises(NbdError) as refused:
            await client.read(SIZE, 512)
        assert refused.value.errno == errno.EINVAL
        assert await client.read(0, 512) == bytes(512)
        await client.close()

    asyncio.run(check())


def test_a_server_that_dies_disconnects_what_is_in_flight(server: tuple[str, "subprocess.Popen[bytes]"]) -> None:
    async def check() -> None:
        client = await NbdClient.connect(server[0])
        server[1].kill()
        with pytest.raises(Disconnected):
            await asyncio.gather(*(client.read(0, SIZE) for _ in range(256)))
        with pytest.raises(Disconnected):
            await client.flush()
        await client.close()
        server[1].wait()
        with pytest.raises(Disconnected):
            await NbdClient.connect(server[0])

    asyncio.run(check())
