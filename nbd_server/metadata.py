"""Metadata contexts: which there are, which queries find them, and what a descriptor's flags mean in each. Pure.

| context | flags of a descriptor |
|---|---|
| base:allocation | HOLE and ZERO (1 + 2) for what no layer has, or a layer says is zeroes; else 0 |
| qemu:allocation-depth | a number: 0 where no layer has it, 1 written since the newest kept snapshot, and so on |
| cairn:hydrated | 1 where no snapshot is needed to read it, 0 where it is still to be fetched |
| cairn:dirty:SNAPSHOT | 1 where it may have changed since that snapshot (its id, or its name), 0 where surely not |

A query finds what has its very name. In LIST_META_CONTEXT also `base:`, `qemu:` and `cairn:` find what begins so, and
`cairn:dirty:` the snapshots by their ids (NBD, "Metadata querying"); none of these selects anything.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from blockstore.volume.block_status import Changed, Shown
from nbd_server.terms import Context
from nbd_server.wire import MAX_STRING_BYTES, Malformed

ALLOCATION: Final = "base:allocation"
DEPTH: Final = "qemu:allocation-depth"
HYDRATED: Final = "cairn:hydrated"
DIRTY: Final = "cairn:dirty:"

#: NBD, "`base:allocation` metadata context".
STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1

#: Of one connection: what one BLOCK_STATUS may ask of replicas.
MAX_CONTEXTS: Final = 16

_PLAIN: Final = (ALLOCATION, DEPTH, HYDRATED)


class Extent(NamedTuple):
    """Bytes that are alike in one context."""

    length: int
    flags: int


_FLAGS: Final[Mapping[str, Callable[[Shown], int]]] = {
    ALLOCATION: lambda run: 0 if run.data else STATE_HOLE | STATE_ZERO,
    DEPTH: lambda run: run.depth,
    HYDRATED: lambda run: int(run.here),
}


def shown_flags(context: str, run: Shown) -> int:
    """The flags of blocks in a context that says what they are."""
    return _FLAGS[context](run)


def changed_flags(run: Changed) -> int:
    """The flags of blocks in a context of changes."""
    return int(run.changed)


def snapshot_of(context: str) -> str:
    """Whose changes a context tells, as it was asked for; empty of the other contexts."""
    return context.removeprefix(DIRTY) if context.startswith(DIRTY) else ""


def listed(queries: Iterable[str], snapshots: Mapping[str, str]) -> list[str]:
    """What LIST_META_CONTEXT tells. snapshots: the ids by what clients may call them: ids and names.

    No query stands for all. Raises Malformed where one lacks a namespace.
    """
    asked = list(queries)
    every = [*_PLAIN, *(DIRTY + name for name in snapshots if snapshots[name] == name)]
    if not asked:
        return every
    found: dict[str, None] = {}
    for query in asked:
        _check(query)
        if query.endswith(":"):
            found.update(dict.fromkeys(name for name in every if name.startswith(query)))
        else:
            found.update(dict.fromkeys(_exactly(query, snapshots)))
    return list(found)


def selected(queries: Iterable[str], snapshots: Mapping[str, str]) -> list[Context]:
    """What SET_META_CONTEXT selects, each once; what is unknown is passed over. Raises Malformed."""
    names: dict[str, None] = {}
    for query in queries:
        _check(query)
        names.update(dict.fromkeys(_exactly(query, snapshots)))
    return [Context(number, name, snapshots.get(snapshot_of(name), "")) for number, name in enumerate(names, 1)]


def wants_snapshots(queries: Iterable[str]) -> bool:
    """Whether the answer rests on which snapshots there are."""
    asked = list(queries)
    return not asked or any(query.startswith(DIRTY) or query == "cairn:" for query in asked)


def _exactly(query: str, snapshots: Mapping[str, str]) -> list[str]:
    snapshot = snapshot_of(query)
    return [query] if query in _PLAIN or snapshot in snapshots else []


def _check(query: str) -> None:
    """NBD, "Metadata querying": a namespace, a colon, and a leaf-name, which may be empty in a query."""
    namespace, colon, _ = query.partition(":")
    if not colon or not namespace or len(query.encode()) > MAX_STRING_BYTES:
        raise Malformed(f"the query {query[:80]!r} has no namespace and colon")
