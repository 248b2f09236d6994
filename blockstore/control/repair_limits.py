"""What repair goes by: as somebody has set it on the running cluster, else as control was started."""

from collections.abc import Awaitable, Callable

from blockstore.config import ControlSettings
from blockstore.control.catalog import Catalog
from blockstore.control.moving import Limits

LimitsNow = Callable[[], Awaitable[Limits]]
"""The limits as they are at the moment."""


def repair_limits(catalog: Catalog, started: ControlSettings) -> LimitsNow:
    """Reads them anew each time: any of them may be changed at any moment."""

    async def now() -> Limits:
        chosen = await catalog.repair_choices()
        return Limits(
            started.replace_after_s if chosen.replace_after_s is None else chosen.replace_after_s,
            started.rebuild_rate_bytes if chosen.rebuild_rate_bytes is None else chosen.rebuild_rate_bytes,
            started.rebuilds if chosen.rebuilds is None else chosen.rebuilds,
            started.rebuilds_per_node if chosen.rebuilds_per_node is None else chosen.rebuilds_per_node,
        )

    return now
