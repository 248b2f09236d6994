"""Which control a command talks to: the one it was told, else the cluster of the state directory."""

from pathlib import Path

from blockstore.cli.options import checked_address
from blockstore.cli.state_directory import StateDirectory
from blockstore.config import DEFAULT_CONTROL


def find_control(control: str | None, state: Path) -> str:
    """HOST:PORT of --control or CAIRN_CONTROL, else of the cluster that was last up in `state`, else the default.

    Raises InvalidRequest.
    """
    if control:
        return checked_address(control)
    plan = StateDirectory(state).read_plan()
    return plan.control if plan else DEFAULT_CONTROL
