"""Several control processes on one etcd: this one stands by, is active for a while, and stands by again.

Its time as the active one begins as a start of control does, with nothing in memory, and ends with whatever makes
its word doubtful: its lease may be over, its place in etcd is gone, etcd does not answer or is full. Then all that
ran is cancelled, and it stands anew. What it sent meanwhile changes nothing: every change is fenced.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

import structlog

from blockstore.control.gate import Gate
from blockstore.control.leadership import Roster, candidacy
from blockstore.control.metastore.etcd import open_etcd
from blockstore.control.metastore.etcd_client import EtcdClient
from blockstore.control.metastore.interface import Metastore
from blockstore.errors import NoSpace, QuorumUnavailable
from blockstore.waiting import while_running

_log = structlog.get_logger(__name__)

#: Before it stands anew.
_PAUSE_S: Final = 0.5

Tenure = Callable[[Metastore], AbstractAsyncContextManager["asyncio.Task[None]"]]
"""Control at work on a store: the reconcile loop, which ends only by failing."""


class Succession:
    """This control among the others, as which it is known by `address`."""

    def __init__(
        self, client: EtcdClient, roster: Roster, gate: Gate, tenure: Tenure, *, address: str, lease_s: float
    ) -> None:
        self._client = client
        self._roster = roster
        self._gate = gate
        self._tenure = tenure
        self._address = address
        self._lease_s = lease_s
        self._trouble = ""

    async def run(self) -> None:
        """Until cancelled. Raises what trying again does not mend."""
        following = asyncio.ensure_future(self._roster.run())
        standing = asyncio.ensure_future(self._stand_again_and_again())
        try:
            await asyncio.wait([following, standing], return_when=asyncio.FIRST_COMPLETED)
            for each in (following, standing):
                if each.done():
                    each.result()
        finally:
            for each in (following, standing):
                each.cancel()
            await asyncio.gather(following, standing, return_exceptions=True)

    async def _stand_again_and_again(self) -> None:
        await self._gate.shut(self._why_not)
        while True:
            try:
                await self._stand()
            except (QuorumUnavailable, NoSpace) as error:
                if str(error) != self._trouble:
                    _log.warning("control stands by", address=self._address, why=str(error))
                self._trouble = str(error)
            await asyncio.sleep(_PAUSE_S)

    async def _stand(self) -> None:
        """Once: until it was active and is not any more. Raises QuorumUnavailable or NoSpace with the reason."""
        async with candidacy(self._client, self._roster, self._address, self._lease_s) as candidate:
            self._trouble = ""
            await candidate.elected()
            store = await open_etcd(self._client, candidate.fence)
            try:
                async with self._tenure(store) as reconciling:
                    _log.info("control is the active one", address=self._address)
                    await while_running(reconciling, candidate.lost())
            finally:
                await store.close()

    def _why_not(self) -> str:
        """Why this control does not answer."""
        active = next((each.address for each in self._roster.places() if each.active), "")
        if active and active != self._address and not self._trouble:
            return (
                f"control at {self._address} stands by, and the active one is at {active}: ask that one, or name both "
                f"(--control {active},{self._address})"
            )
        why = f" ({self._trouble})" if self._trouble else ""
        return f"control at {self._address} stands by, and none is active yet{why}: try again"
