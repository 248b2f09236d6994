"""What the tests of control share: a scenario on a cluster and a control, and waiting until somebody counts as down."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.control_cluster import Cluster, Control, cluster_at, until
from tests.patient_time import run_patiently

Scenario = Callable[[Cluster, Control], Awaitable[None]]


def run(
    directory: Path, scenario: Scenario, *, nodes: int = 3, front_ends: int = 1, daemons: int = 0, **settings: Any
) -> None:
    """`scenario` with so many processes around a control with these settings (ControlSettings)."""

    async def all_of_it() -> None:
        async with (
            cluster_at(directory, nodes, front_ends, daemons) as cluster,
            cluster.control(**settings) as control,
        ):
            await scenario(cluster, control)

    run_patiently(all_of_it())


async def until_down(control: Control, process: str) -> None:
    """Waits until the lease of that node or front-end has ended."""

    async def is_down() -> bool:
        status = await control.status()
        up = {each.id: each.up for each in status.nodes} | {each.id: each.up for each in status.front_ends}
        return not up[process]

    await until(is_down, f"the lease of {process} ends")
