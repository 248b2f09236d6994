"""The outage of `cairn demo`: a node killed, started again by the supervisor, caught up."""

import os
import signal
import time
from collections.abc import Callable
from typing import Final

from blockstore.cli.client import ControlClient, wait_until
from blockstore.cli.state_directory import StateDirectory
from blockstore.errors import NotFound, QuorumUnavailable
from blockstore.rpc import control_pb2 as pb

VICTIM: Final = "node-2"
IN_FLIGHT: Final = 8
"""Records that a replica may lack for a moment while writing goes on."""
TELL_S: Final = 2.0


def kill_node(directory: StateDirectory) -> int:
    """End the process of VICTIM as a power cut would; its pid. Raises NotFound where it does not run."""
    pid = directory.read_processes().get(VICTIM)
    if pid is None:
        raise NotFound(f"{VICTIM} does not run: see {directory.log(VICTIM)}")
    os.kill(pid, signal.SIGKILL)
    return pid


async def until_started_again(directory: StateDirectory, old_pid: int, limit_s: float) -> int:
    """The pid of VICTIM's next process. Raises QuorumUnavailable after `limit_s` seconds."""

    async def started() -> int | None:
        pid = directory.read_processes().get(VICTIM)
        return pid if pid != old_pid else None

    return await wait_until(
        started, limit_s, lambda: QuorumUnavailable(f"{VICTIM} was not started again within {limit_s:.0f} s")
    )


async def until_caught_up(
    client: ControlClient, volume_id: str, limit_s: float, say: Callable[[str], None], *, in_flight: int = 0
) -> None:
    """Wait until all replicas of the volume are up and lack no more than `in_flight` records each.

    Only what was reported after this call counts: what control heard before may be out of date.
    say: told now and then what is still missing. Raises QuorumUnavailable after `limit_s` seconds.
    """
    called_ms = time.time() * 1000
    missing = "nothing was heard since"
    told_at = float("-inf")

    async def caught_up() -> bool | None:
        nonlocal missing, told_at
        status = await client.status()
        heard_ms = [node.last_heartbeat_ms for node in status.nodes]
        heard_ms += [front_end.last_heartbeat_ms for front_end in status.front_ends]
        if min(heard_ms) <= called_ms:
            return None
        health = next((each for each in status.volumes if each.volume.id == volume_id), None)
        replicas = health.replicas if health is not None and health.serving == "serving" else ()
        behind = [each for each in replicas if each.state != "up" or each.lag_records > in_flight]
        missing = "; ".join(_describe(each) for each in behind) or "not served"
        if behind and time.monotonic() > told_at + TELL_S:
            told_at = time.monotonic()
            say(missing)
        return True if replicas and not behind else None

    await wait_until(caught_up, limit_s, lambda: QuorumUnavailable(f"not caught up after {limit_s:.0f} s: {missing}"))


def _describe(replica: pb.ReplicaHealth) -> str:
    copied = f", {replica.extents_done} of {replica.extents_total} extents copied" if replica.extents_total else ""
    return f"replica in {replica.zone} is {replica.state}, lacks {replica.lag_records:,} records{copied}"
