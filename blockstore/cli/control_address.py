"""Which control a command talks to: the one it was told, else the cluster of the state directory."""

from pathlib import Path

from blockstore.cli.options import checked_addresses
from blockstore.cli.state_directory import StateDirectory
from blockstore.config import DEFAULT_CONTROL


def find_control(control: str | None, state: Path) -> str:
    """HOST:PORT of --control or CAIRN_CONTROL, or several with commas between them.

    Without these, of the cluster that was last up in `state`, else the default. Raises InvalidRequest.
    """
    if control:
        return checked_addresses(control)
    plan = StateDirectory(state).read_plan()
    return plan.control if plan else DEFAULT_CONTROL
