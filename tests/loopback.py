"""Addresses of the loopback that no other process is given.

Every port of 127.0.0.1 may be taken at any moment, by another test's server or by the local end of a connection; a test
that listens somewhere twice, or later, does so at a host of its own.
"""

import random
import socket

from blockstore.config import join_address


def own_host() -> str:
    """An address of the loopback that nothing else uses."""
    return f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}.{random.randrange(2, 255)}"


def free_address(host: str = "") -> str:
    """HOST:PORT that stays free until it is listened at, also when that is later or happens twice.

    host: one of `own_host`, where several addresses are to have the same.
    """
    host = host or own_host()
    with socket.socket() as probe:
        probe.bind((host, 0))
        return join_address(host, probe.getsockname()[1])
