"""A cluster whose guests, in QEMU's user network, attach its volumes by themselves: they find it at `guest.HOST`."""

import dataclasses
from typing import Final

from tests.cluster import FRONT_END, Cluster
from tests.linux_host.guest import HOST

#: A front-end's settings: control tells guests this address of it.
FRONT_END_FOR_GUESTS: Final = dataclasses.replace(FRONT_END, nbd_advertise=f"{HOST}:0")


class ReachedByGuests(Cluster):
    """In QEMU's network there is this machine's 127.0.0.1, and no other address of its loopback."""

    def _listen(self, name: str) -> str:
        return "127.0.0.1:0"
