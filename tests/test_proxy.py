"""The proxy that network tests stand on: it forwards, holds and cuts."""

import socket
import threading
from collections.abc import Iterator

import pytest

from blockstore.config import join_address, split_address
from tests.loopback import free_address
from tests.proxy import Proxy

QUIET_S = 0.2
LIMIT_S = 60


@pytest.fixture
def echo() -> Iterator[str]:
    """The address of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            with connection:
                while chunk := connection.recv(1024):
                    connection.sendall(chunk)

        thread = threading.Thread(target=serve)
        thread.start()
        yield join_address(*server.getsockname()[:2])
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def proxy(echo: str) -> Iterator[Proxy]:
    started = Proxy()
    started.start(echo)
    yield started
    started.close()


def dial(proxy: Proxy) -> socket.socket:
    return socket.create_connection(split_address(proxy.address), timeout=LIMIT_S)


def exchange(connection: socket.socket, text: bytes) -> bytes:
    connection.sendall(text)
    return connection.recv(1024)


def test_bytes_pass_both_ways(proxy: Proxy) -> None:
    with dial(proxy) as connection:
        assert exchange(connection, b"one") == b"one"


def test_what_is_held_arrives_after_restore(proxy: Proxy) -> None:
    with dial(proxy) as connection:
        assert exchange(connection, b"one") == b"one"
        proxy.hold()
        connection.settimeout(QUIET_S)
        with pytest.raises(TimeoutError):
            exchange(connection, b"two")
        proxy.restore()
        connection.settimeout(LIMIT_S)
        assert connection.recv(1024) == b"two"


def test_a_connection_made_while_held_waits(proxy: Proxy) -> None:
    proxy.hold()
    with dial(proxy) as connection:
        connection.settimeout(QUIET_S)
        with pytest.raises(TimeoutError):
            exchange(connection, b"one")
        proxy.restore()
        connection.settimeout(LIMIT_S)
        assert connection.recv(1024) == b"one"


def test_a_cut_ends_connections_and_refuses_new_ones(proxy: Proxy) -> None:
    with dial(proxy) as connection:
        assert exchange(connection, b"one") == b"one"
        proxy.cut()
        with pytest.raises(ConnectionError):
            raise_on_end(connection)
    with dial(proxy) as connection, pytest.raises(ConnectionError):
        raise_on_end(connection)
    proxy.restore()
    with dial(proxy) as connection:
        assert exchange(connection, b"two") == b"two"


def raise_on_end(connection: socket.socket) -> None:
    if not connection.recv(1):
        raise ConnectionError("ended")


def test_a_server_that_is_gone_is_a_connection_that_ends() -> None:
    proxy = Proxy()
    proxy.start(free_address())
    with dial(proxy) as connection, pytest.raises(ConnectionError):
        raise_on_end(connection)
    proxy.close()
