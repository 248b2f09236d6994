"""A network of machines that are Linux network namespaces, joined by a bridge, whose packets can be dropped.

    with Network(["control", "node-0"]) as network:
        network.address("node-0")                  # its IPv4 address; this process is `HOST`, on the same bridge
        [*network.prefix("node-0"), "cairn", ...]   # a command that runs there
        network.drop("node-0", "control")          # nothing arrives, one way
        network.heal()

A machine drops what it sends to another by holding a wrong hardware address for it: the bridge carries the packets, and
nobody takes them. The sender is not told, as with a cable that lost them. Where packets are to be late, or a share of
them lost, a process carries each of them between the machine's cable and the bridge (bad_link.py). It takes root.
Whatever happens, namespaces end with the block, or, where this process was killed, with the next network that anybody
makes.
"""

import contextlib
import itertools
import os
import random
import re
import subprocess
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Final

from tests.faults.bad_link import BadLink, Conditions
from tests.programs import find_program, require_found, require_programs

HOST: Final = "host"
_NOBODY: Final = "02:00:00:00:00:01"
#: Of a packet that an interface takes at once, as it is before anybody changes it.
_ALL_SEGMENTS: Final = "65535"
_NAME: Final = re.compile(r"cairn-(\d+)-\S+")
_numbers: Final = itertools.count(1)


class Network:
    """machines: their names."""

    def __init__(self, machines: Sequence[str]) -> None:
        self._tag = f"{os.getpid()}-{next(_numbers)}"
        self._bridge = _interface("cb", self._tag)
        subnet = f"10.{random.randrange(64, 255)}.{random.randrange(1, 255)}"
        self._addresses = {name: f"{subnet}.{number}" for number, name in enumerate([HOST, *machines], 1)}
        self._dropped: set[tuple[str, str]] = set()
        self._unplugged: set[str] = set()
        self._degraded: dict[str, BadLink] = {}

    def __enter__(self) -> "Network":
        require_programs("ip")
        if os.geteuid():
            require_found(["root, to make network namespaces"])
        _remove_left_over()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for link in self._degraded.values():
            link.end()
        self._remove()

    @property
    def machines(self) -> list[str]:
        return [name for name in self._addresses if name != HOST]

    def address(self, machine: str) -> str:
        return self._addresses[machine]

    def prefix(self, machine: str) -> list[str]:
        """What to put before a command, so that it runs on that machine (by exec: its pid is the command's)."""
        return [str(find_program("ip")), "netns", "exec", self._namespace(machine)]

    # ---- faults

    def drop(self, sender: str, receiver: str) -> None:
        """Nothing that `sender` sends to `receiver` arrives from here on."""
        self._dropped.add((sender, receiver))
        self._in(sender, "neigh", "replace", self.address(receiver), "lladdr", _NOBODY, "nud", "permanent", "dev")

    def cut(self, one: Iterable[str], other: Iterable[str]) -> None:
        """No packet passes between the two groups, either way."""
        for left, right in itertools.product(one, list(other)):
            self.drop(left, right)
            self.drop(right, left)

    def unplug(self, machine: str) -> None:
        """Pull its cable: it reaches nobody, this process included."""
        self._unplugged.add(machine)
        _ip("link", "set", self._veth(machine), "down")

    def degrade(self, machine: str, conditions: Conditions, seed: int) -> None:
        """All that it sends and gets passes a link of these conditions from here on; in the place of an earlier one.

        Its TCP makes packets of at most one segment meanwhile: with the 64 KiB that a veth pair carries at once, one
        that is lost would be forty.
        """
        if machine in self._degraded:
            self._repair(machine)
        veth, tap = self._veth(machine), self._tap(machine)
        self._in(machine, "link", "set", "gso_max_segs", "1", "dev")
        self._degraded[machine] = BadLink(veth, tap, conditions, seed)
        # Off the bridge, this end is the host's own: it must not answer for the host's addresses.
        _ip("link", "set", veth, "nomaster", "arp", "off")
        _ip("link", "set", tap, "master", self._bridge, "up")

    def heal(self) -> None:
        """All packets arrive again."""
        for sender, receiver in list(self._dropped):
            self.restore(sender, receiver)
        for machine in self._unplugged:
            _ip("link", "set", self._veth(machine), "up")
        self._unplugged.clear()
        for machine in list(self._degraded):
            self._repair(machine)

    def restore(self, sender: str, receiver: str) -> None:
        """The end of `drop`."""
        self._dropped.discard((sender, receiver))
        self._in(sender, "neigh", "del", self.address(receiver), "dev")

    # ---- inside

    def _repair(self, machine: str) -> dict[str, int]:
        """The end of `degrade`: what became of the packets, as bad_link.py counts them."""
        fates = self._degraded.pop(machine).end()
        _ip("link", "set", self._veth(machine), "master", self._bridge, "arp", "on")
        self._in(machine, "link", "set", "gso_max_segs", _ALL_SEGMENTS, "dev")
        return fates

    def _in(self, machine: str, *arguments: str) -> None:
        """`ip` there, with the name of its interface behind the arguments."""
        if machine == HOST:
            _ip(*arguments, self._bridge)
        else:
            _ip("-n", self._namespace(machine), *arguments, "eth0")

    def _namespace(self, machine: str) -> str:
        return f"cairn-{self._tag}-{machine}"

    def _veth(self, machine: str) -> str:
        return _interface(f"c{list(self._addresses).index(machine)}v", self._tag)

    def _tap(self, machine: str) -> str:
        return _interface(f"c{list(self._addresses).index(machine)}t", self._tag)

    def _make(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.address(HOST)}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for machine in self.machines:
            namespace, veth = self._namespace(machine), self._veth(machine)
            _ip("netns", "add", namespace)
            _ip("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", veth, "master", self._bridge, "up")
            _ip("-n", namespace, "addr", "add", f"{self.address(machine)}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")

    def _remove(self) -> None:
        for machine in self.machines:
            with contextlib.suppress(subprocess.CalledProcessError):  # it may not have been made
                _ip("netns", "del", self._namespace(machine))
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._bridge)


def _interface(kind: str, tag: str) -> str:
    """A name of at most 15 characters, which is what the kernel takes."""
    return f"{kind}{tag}"[:15]


def _ip(*arguments: str) -> str:
    command = [str(find_program("ip")), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def _remove_left_over() -> None:
    """What processes made that were killed since."""
    for line in _ip("netns", "list").splitlines():
        found = _NAME.match(line)
        if found and not os.path.exists(f"/proc/{found[1]}"):
            with contextlib.suppress(subprocess.CalledProcessError):  # somebody else was quicker
                _ip("netns", "del", found[0].split()[0])
    for line in _ip("-o", "link", "show", "type", "bridge").splitlines():
        made = re.search(r"\bcb(\d+)-\d+", line)
        if made and not os.path.exists(f"/proc/{made[1]}"):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("link", "del", made[0])
