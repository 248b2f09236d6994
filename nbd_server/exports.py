"""The exports of one server: which names it knows, and the device behind each.

Names come and go while the server runs. An export that is taken out is not found any more; ending
the connections that have it is the server's part.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field

from blockstore.errors import AlreadyExists, InvalidRequest, NotFound
from nbd_server.device import Device
from nbd_server.wire import MAX_STRING_BYTES

SnapshotNames = Callable[[], Awaitable[Mapping[str, str]]]
"""Asks for the ids of a volume's snapshots, by their names."""


@dataclass(frozen=True, slots=True, eq=False)
class Export:
    """A device under a name. description: for people, may be empty. Raises InvalidRequest.

    aliases: other names of the same volume, by which rules on access may mean it.
    client: the only one whose links may use it (nbd_server/links.py); empty: anyone.
    """

    name: str
    device: Device
    description: str = ""
    read_only: bool = False
    client: str = ""
    aliases: tuple[str, ...] = ()
    names: "SnapshotNames | None" = None
    """Who knows the names of its snapshots; None: they go by their ids."""
    snapshots: dict[str, str] = field(default_factory=dict)
    """Their ids, by id and by name, as they were looked up last."""

    def __post_init__(self) -> None:
        for text in (self.name, self.description):
            if len(text.encode()) > MAX_STRING_BYTES or "\0" in text:
                raise InvalidRequest(f"{text[:80]!r}: an export's texts have at most {MAX_STRING_BYTES} bytes, no NUL")

    @property
    def size_bytes(self) -> int:
        """As of now; it may grow."""
        return self.device.size_bytes

    async def look_up_snapshots(self) -> None:
        """Have `snapshots` say which there are. Raises what asking for them does."""
        kept = await self.device.snapshots()
        found = {snapshot: snapshot for snapshot in kept}
        if self.names is not None:
            found = {name: each for name, each in (await self.names()).items() if each in found} | found
        self.snapshots.clear()
        self.snapshots.update(found)


class Exports:
    """Exports by name, in the order in which they were added."""

    def __init__(self) -> None:
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

    def look_up(self, name: str, *, snapshots: bool = False) -> Awaitable[None] | None:
        """What to wait for before `find` is asked for that name, or for its snapshots; None: nothing."""
        export = self.find(name)
        return export.look_up_snapshots() if export is not None and snapshots else None

    def __iter__(self) -> Iterator[Export]:
        return iter(list(self._by_name.values()))

    def __len__(self) -> int:
        return len(self._by_name)
