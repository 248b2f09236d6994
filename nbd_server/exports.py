"""The exports of one server: which names it knows, and the device behind each.

Names come and go while the server runs. An export that is taken out is not found any more; ending
the connections that have it is the server's part.

Other exports are there only while a client has them: `OnDemand` opens one when its name is asked for, for that
client. They are in no list, as there may be very many.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from blockstore.errors import AlreadyExists, CairnError, InvalidRequest, NotFound
from blockstore.units import Generation
from nbd_server.device import Device
from nbd_server.wire import MAX_STRING_BYTES

#: Characters; a reply's text has 4,096 bytes at most.
_MAX_WHY: Final = 1000

SnapshotNames = Callable[[], Awaitable[Mapping[str, int]]]
"""Asks what a volume's snapshots are called: names and ids, with the generation that each is in the first segment."""


@dataclass(frozen=True, slots=True, eq=False)
class Export:
    """A device under a name. description: for people, may be empty. Raises InvalidRequest.

    aliases: other names of the same volume, by which rules on access may mean it.
    client: the only one whose links may use it (nbd_server/links.py); empty: anyone. shared: its connections are one
    to each other, so that a flush on any of them covers what all were told is written.
    """

    name: str
    device: Device
    description: str = ""
    read_only: bool = False
    client: str = ""
    aliases: tuple[str, ...] = ()
    shared: bool = True
    snapshot_names: SnapshotNames | None = None
    """Who knows the names of its snapshots; None: they go by their ids."""
    snapshots: dict[str, str] = field(default_factory=dict)
    """What was sealed for each, by its id and by its name, as they were looked up last."""

    def __post_init__(self) -> None:
        for text in (self.name, self.description):
            if len(text.encode()) > MAX_STRING_BYTES or "\0" in text:
                raise InvalidRequest(f"{text[:80]!r}: an export's texts have at most {MAX_STRING_BYTES} bytes, no NUL")

    @property
    def size_bytes(self) -> int:
        """As of now; it may grow."""
        return self.device.size_bytes

    async def look_up_snapshots(self) -> None:
        """Have `snapshots` say which there are. Raises what asking the volume does; control may be away."""
        kept = await self.device.snapshots()
        found = {sealed: sealed for sealed in kept}
        if self.snapshot_names is not None:
            by_generation = {generation: sealed for sealed, generation in kept.items()}
            for name, generation in (await self.snapshot_names()).items():
                if generation in by_generation:
                    found.setdefault(name, by_generation[Generation(generation)])
        self.snapshots.clear()
        self.snapshots.update(found)


class OnDemand(Protocol):
    """Exports that are opened when a client asks for them."""

    def knows(self, name: str) -> bool:
        """Whether it is a name of that kind; what it stands for may not exist."""

    async def open(self, name: str) -> Export:
        """For one client. Raises CairnError."""

    def close(self, export: Export) -> None:
        """That client is gone, and nothing of it is in flight."""


class Exports:
    """Exports by name, in the order in which they were added. on_demand: what else there is; None: nothing."""

    def __init__(self) -> None:
        self.on_demand: OnDemand | None = None
        self._by_name: dict[str, Export] = {}

    def add(self, export: Export) -> None:
        """From now on clients find `export`. Raises AlreadyExists where the name is taken."""
        if export.name in self._by_name:
            raise AlreadyExists(f"an export {export.name!r} exists: remove it first, or choose another name")
        self._by_name[export.name] = export

    def remove(self, name: str) -> Export:
        """From now on clients do not find it. Raises NotFound where there is none of that name."""
        export = self._by_name.pop(name, None)
        if export is None:
            raise NotFound(f"no export {name!r}")
        return export

    def find(self, name: str) -> Export | None:
        """The export of that name; "" also finds the only one there is (NBD, "Option types": the default export)."""
        export = self._by_name.get(name)
        if export is None and not name and len(self._by_name) == 1:
            return next(iter(self))
        return export

    def __iter__(self) -> Iterator[Export]:
        return iter(list(self._by_name.values()))

    def __len__(self) -> int:
        return len(self._by_name)


class ClientExports:
    """The exports as one client finds them: the server's, and the last one that was opened for it."""

    def __init__(self, exports: Exports) -> None:
        self._exports = exports
        self._opened: Export | None = None
        self._why: tuple[str, str] = "", ""
        """The name that could not be opened, and the reason."""

    def find(self, name: str) -> Export | None:
        """As Exports.find."""
        if self._opened is not None and self._opened.name == name:
            return self._opened
        return self._exports.find(name)

    def look_up(self, name: str, *, snapshots: bool = False) -> Awaitable[None] | None:
        """What to wait for before `find` is asked for that name, or for its snapshots; None: nothing."""
        on_demand, found = self._exports.on_demand, self.find(name)
        if found is not None:
            return found.look_up_snapshots() if snapshots else None
        if on_demand is None or not on_demand.knows(name):
            return None
        return self._open(on_demand, name)

    def why_not(self, name: str) -> str:
        """Why that name is not found, for people."""
        return self._why[1][:_MAX_WHY] if name and self._why[0] == name else f"no export {name[:256]!r} here"

    def close(self) -> None:
        """The client is gone, and nothing of it is in flight. The same again does nothing."""
        opened, self._opened = self._opened, None
        if opened is not None:
            assert self._exports.on_demand is not None
            self._exports.on_demand.close(opened)

    def __iter__(self) -> Iterator[Export]:
        return iter(self._exports)

    async def _open(self, on_demand: OnDemand, name: str) -> None:
        self.close()
        self._why = name, f"{name} was not opened in time"
        try:
            self._opened = await on_demand.open(name)
        except CairnError as error:
            self._why = name, str(error)
