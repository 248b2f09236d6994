"""A cluster whose guests, in QEMU's user network, attach its volumes by themselves: they find it at `guest.HOST`."""

import dataclasses
from pathlib import Path
from typing import Final

from blockstore.config import FrontEndSettings
from tests.cluster import FRONT_END, Cluster
from tests.linux_host.guest import HOST

#: A front-end's settings: control tells guests this address of it.
FRONT_END_FOR_GUESTS: Final = dataclasses.replace(FRONT_END, nbd_advertise=f"{HOST}:0")


class ReachedByGuests(Cluster):
    """In QEMU's network there is this machine's 127.0.0.1, and no other address of its loopback."""

    def __init__(
        self, directory: Path, *, front_ends: int = 1, front_end_settings: FrontEndSettings = FRONT_END_FOR_GUESTS
    ) -> None:
        super().__init__(directory, front_ends=front_ends, front_end_settings=front_end_settings)

    def _listen(self, name: str) -> str:
        return "127.0.0.1:0"
