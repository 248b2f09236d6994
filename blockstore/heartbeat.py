"""How a node or a front-end keeps itself known to control.

Control is not on the I/O path: while it is away the loop goes on trying, and says so once. Where
control has forgotten the process (NotFound), it registers anew. Any other error that means "stop"
(Fenced: somebody else goes by this id) ends the loop.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from blockstore.errors import CairnError, Fenced, NotFound

_log = structlog.get_logger(__name__)


async def beat(
    interval_s: float,
    register: Callable[[], Awaitable[None]],
    report: Callable[[], Awaitable[bool]],
) -> None:
    """Register, then report every `interval_s` seconds, until cancelled. Raises Fenced.

    report: whether it took its time, as a call that control answers when there is news: the next one follows at once.
    """
    known = False
    reachable: bool | None = None
    """None before the first try: what is so from the start is said, too."""
    while True:
        waited = False
        try:
            if not known:
                await register()
                known = True
            waited = await report()
            if not reachable:
                _log.info("control knows us")
                reachable = True
        except Fenced:
            raise
        except NotFound:
            known = False
        except CairnError as error:
            if reachable is not False:
                _log.warning("control is out of reach; trying on", error=str(error))
            reachable = False
        if not waited:
            await asyncio.sleep(interval_s)
