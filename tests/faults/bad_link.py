"""A link that delays, loses and repeats packets, for kernels without netem: a process that carries each frame itself.

    link = BadLink(veth, tap, Conditions(0.02, 0.2, lost=0.05), seed=1)   # running, and the interface `tap` is there
    ...the bridge has `tap` instead of `veth`...
    link.end()                                                            # what became of the frames; `tap` is gone

The process reads what a machine sends at the host's end of its veth pair, by a packet socket, and hands it to a TAP
interface, and the other way round. Both speak of a frame with its virtio header, so that checksums which the sender
left to the hardware stay marked as such. Each frame is dealt with by itself, with a delay of its own: one that waits
longer is overtaken. The process ends with its input, so also with whoever started it.
"""

import contextlib
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Final

#: Frames on their way, both ways together; those beyond are lost, as in a router without room.
QUEUED_FRAMES: Final = 20_000
#: Of a frame with its header; segments are made before (Network.degrade), so that this is ample.
_FRAME_BYTES: Final = 1 << 17
#: Frames of one direction before the other one has its turn.
_TURN_FRAMES: Final = 64
_ALL_PROTOCOLS: Final = 0x0003
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000


@dataclass(frozen=True)
class Conditions:
    """What happens to each frame, on either way: it takes from `least_s` to `most_s`, is lost with the probability
    `lost`, and otherwise comes twice with the probability `repeated`.
    """

    least_s: float = 0.0
    most_s: float = 0.0
    lost: float = 0.0
    repeated: float = 0.0

    def __str__(self) -> str:
        said = [f"{self.least_s * 1000:.0f} to {self.most_s * 1000:.0f} ms"] if self.most_s else []
        said += [f"{self.lost:.0%} lost"] if self.lost else []
        said += [f"{self.repeated:.0%} twice"] if self.repeated else []
        return ", ".join(said) or "as they are"


class Queue:
    """The frames that are on their way; no clock of its own. fates: how many came, and were lost or repeated."""

    def __init__(self, conditions: Conditions, seed: int) -> None:
        self._conditions = conditions
        self._chance = random.Random(seed)
        self._frames: list[tuple[float, int, int, bytes]] = []
        self.fates: Counter[str] = Counter(came=0, lost=0, repeated=0)

    def put(self, now: float, target: int, frame: bytes) -> None:
        """One that is to go to the descriptor `target`."""
        self.fates["came"] += 1
        if self._chance.random() < self._conditions.lost or len(self._frames) >= QUEUED_FRAMES:
            self.fates["lost"] += 1
            return
        twice = self._chance.random() < self._conditions.repeated
        self.fates["repeated"] += twice
        for copy in range(1 + twice):
            due = now + self._chance.uniform(self._conditions.least_s, self._conditions.most_s)
            heapq.heappush(self._frames, (due, 2 * self.fates["came"] + copy, target, frame))

    def due(self, now: float) -> Iterator[tuple[int, bytes]]:
        """Target and frame of each that has arrived; of two at the same time, the one that came first."""
        while self._frames and self._frames[0][0] <= now:
            _, _, target, frame = heapq.heappop(self._frames)
            yield target, frame

    def wait_s(self, now: float) -> float | None:
        """Until the next one arrives; None without any."""
        return max(0.0, self._frames[0][0] - now) if self._frames else None


class BadLink:
    """The process; it is running, and `tap` there, when this returns."""

    def __init__(self, veth: str, tap: str, conditions: Conditions, seed: int) -> None:
        command = [sys.executable, "-I", __file__, veth, tap, str(seed), *map(str, astuple(conditions))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise OSError(f"the bad link of {veth} did not begin (status {self._process.wait()})")

    def end(self) -> dict[str, int]:
        """Frames that are still on their way are lost. What became of all: `Queue.fates`."""
        said, _ = self._process.communicate(timeout=60)
        fates: dict[str, int] = json.loads(said)
        return fates


def _open_tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    return tap


def _open_packets(interface: str) -> socket.socket:
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    packets.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    packets.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
    packets.bind((interface, _ALL_PROTOCOLS))
    return packets


def carry(one: int, other: int, until: int, queue: Queue) -> None:
    """Between two descriptors, until the third one can be read."""
    targets = {one: other, other: one}
    while True:
        readable, _, _ = select.select([*targets, until], [], [], queue.wait_s(time.monotonic()))
        if until in readable:
            return
        for source in readable:
            with contextlib.suppress(BlockingIOError):
                for _ in range(_TURN_FRAMES):
                    queue.put(time.monotonic(), targets[source], os.read(source, _FRAME_BYTES))
        for target, frame in queue.due(time.monotonic()):
            try:
                os.write(target, frame)
            except OSError:  # the interface is down, or has no room
                queue.fates["lost"] += 1


def main() -> None:
    veth, tap_name, seed, *conditions = sys.argv[1:]
    queue = Queue(Conditions(*map(float, conditions)), int(seed))
    packets, tap = _open_packets(veth), _open_tap(tap_name)
    print("ready", flush=True)
    carry(packets.fileno(), tap, sys.stdin.fileno(), queue)
    print(json.dumps(queue.fates))


if __name__ == "__main__":
    main()
