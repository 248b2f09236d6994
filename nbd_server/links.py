"""Links: connections of a client that opens another one when the one it has breaks, and sends again. Pure.

A kernel that was given a new socket sends again what was not answered on the old one. So nothing that it said on
the old one may take effect after something that it says on the new one: a write that lies unread in the old
socket, or still in the network, would undo a newer write to the same block. A client that asks for the export
NAME@CLIENT opens a *link*, and from the instant in which a link is chosen, no request of an older link of that
client to that device is begun any more; what was begun before has its place in the order before all that follows.
(Names of volumes have no @.)

A link is no plain connection in one more way: that another attachment has fenced this one is told by closing it,
not by an error, which a file system would take for a broken disk. Its client asks where the volume is now.
"""

from typing import Final, NamedTuple

SEPARATOR: Final = "@"


class Asked(NamedTuple):
    """What a client asks for. client: empty where it opens no link."""

    export: str
    client: str


def parse_asked(name: str) -> Asked:
    """The export that a client means by `name`, and whose link it opens."""
    export, _, client = name.partition(SEPARATOR)
    return Asked(export, client)


def link_name(export: str, client: str) -> str:
    """What `client` asks for to open a link to `export`."""
    return f"{export}{SEPARATOR}{client}"
