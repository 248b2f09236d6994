"""How a node or a front-end keeps itself known to control.

Control is not on the I/O path: while it is away the loop goes on trying, and says so once. Where
control has forgotten the process (NotFound), it registers anew. Any other error that means "stop"
(Fenced: somebody else goes by this id) ends the loop.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from blockstore.errors import CairnError, Fenced, NotFound

_log = structlog.get_logger(__name__)
#: A process that control does not know is of no use: it tries again soon, and less and less so up to its interval.
_FIRST_PAUSE_S: Final = 0.05


async def beat(
    interval_s: float,
    register: Callable[[], Awaitable[None]],
    report: Callable[[], Awaitable[float]],
) -> None:
    """Register as soon as control can be reached, then report again and again, until cancelled. Raises Fenced.

    report: returns after how many seconds the next one is due. interval_s: the same where control is out of reach.
    """
    known = False
    pause_s = _FIRST_PAUSE_S
    reachable: bool | None = None
    """None before the first try: what is so from the start is said, too."""
    while True:
        next_s = interval_s
        try:
            if not known:
                await register()
                known = True
            next_s = await report()
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
        if known:
            pause_s = _FIRST_PAUSE_S
            await asyncio.sleep(next_s)
        else:
            await asyncio.sleep(min(pause_s, interval_s))
            pause_s *= 2
