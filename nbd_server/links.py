"""Links: connections of a client that opens others when those it has break, and sends again. Pure.

A kernel that was given a new socket sends again what was not answered on the old one. So nothing that it said on
the old one may take effect after something that it says on the new one: a write that lies unread in the old
socket, or still in the network, would undo a newer write to the same block. A client that asks for the export
NAME@CLIENT opens a *link*, and from the instant in which a link is chosen, no request of an older link of that
client to that device is begun any more; what was begun before has its place in the order before all that follows.
(Names of volumes and of clients have no @.)

NAME@CLIENT@SET opens a link of a *set*: links of one set are beside each other, and the first one of a new set ends
all others of the client to the device. Inside a set it is the kernel itself that sends again, over another link that
was open before (Linux, drivers/block/nbd.c: find_fallback, nbd_xmit_timeout), and nothing tells that it has given the
first one up. But it sends a request again with the hardware queue that it had, whose number stands in the cookie
(nbd_cmd_handle, blk_mq_unique_tag), and while a queue's own link lives, all of the queue goes there (nbd_handle_cmd).
Hence the rule of `LinkSet`: *a queue has one link, for good*: the first one of which a request of that queue is begun.
One that comes by any other link is not begun, and the whole set ends; its client makes a new one.

Why no byte is lost. Let W be a write, W' a later copy of it, and V a newer write of the same block: the guest sends V
when a copy was answered. W must not be begun after V. If W' came in a newer set, all links of W's had ended when W'
was begun. If it came in the same set, then by the queue's one link, or it would not have been begun: W in the same link
lay before W' (a socket keeps the order), and W in any other is never begun, because the queue has its link already. A
first copy that nobody has read yet is refused like any other: what has been seen of a link before does not matter, nor
do timing and which link the kernel prefers. And a queue does not get another link when its own has gone, because that
one's successor might go, too, and a link between the two might hold an older copy.

It rests on a request's keeping its queue, which Linux does: what was sent once is put back into the hardware queue that
it had, and merged into no other request (block/blk-mq.c, blk_mq_requeue_work; RQF_STARTED). A cookie is a count of how
often the request's place was sent, in 32 bits, then queue and tag, of 16 bits each; Linux 6.12 writes it as a
big-endian number, and 6.1 in the byte order of the machine. Counts begin at 1 and are seldom a multiple of 256, but
queues and tags are small numbers: so the first request of a set tells the order by making sense in one alone. Where it
makes sense in both, or in none, or a later one not in the order that was found, the set ends as well.

A link is no plain connection in one more way: that another attachment has fenced this one is told by closing it,
not by an error, which a file system would take for a broken disk. Its client asks where the volume is now.
"""

from typing import Final, Generic, Literal, NamedTuple, TypeVar

SEPARATOR: Final = "@"
#: Of the hardware queues of a device, which are no more than its sockets; it bounds what a set remembers, too.
_MOST_QUEUES: Final = 64
#: Of the requests in one: the driver has 128.
_MOST_TAGS: Final = 1024

ByteOrder = Literal["big", "little"]
_BYTE_ORDERS: Final[tuple[ByteOrder, ...]] = ("big", "little")
L = TypeVar("L")


class Asked(NamedTuple):
    """What a client asks for. client: empty where it opens no link. link_set: empty for a link that is alone."""

    export: str
    client: str = ""
    link_set: str = ""


def parse_asked(name: str) -> Asked:
    """The export that a client means by `name`, and whose link, of which set, it opens."""
    return Asked(*name.split(SEPARATOR, 2))


def link_name(export: str, client: str, link_set: str = "") -> str:
    """What `client` asks for to open a link to `export`."""
    return SEPARATOR.join((export, client, link_set) if link_set else (export, client))


class LinkSet(Generic[L]):
    """Links that are beside each other. name: the set's, empty for one link alone, which has no other beside it."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self.ended = False
        """Whether it takes no more links, and begins nothing any more."""
        self._link_of: dict[int, L] = {}
        """By hardware queue."""
        self._byte_order: ByteOrder | None = None
        """Of cookies, once one is known."""

    def takes(self, name: str) -> bool:
        """Whether a link of the set of that name belongs here."""
        return bool(name) and name == self.name and not self.ended

    def may_begin(self, link: L, cookie: int) -> bool:
        """Whether a request that came by `link` may be begun now; where it may not, the set has ended with it."""
        if self.name and not self.ended:
            queue = self._queue_of(cookie)
            self.ended = queue is None or self._link_of.setdefault(queue, link) is not link
        return not self.ended

    def _queue_of(self, cookie: int) -> int | None:
        """None where it cannot be told: the client's next set will begin with another cookie."""
        if self._byte_order is None:
            fitting = [order for order in _BYTE_ORDERS if _queue_of(cookie, order) is not None]
            if len(fitting) != 1:
                return None
            self._byte_order = fitting[0]
        return _queue_of(cookie, self._byte_order)


def _queue_of(cookie: int, byte_order: ByteOrder) -> int | None:
    """None where a cookie of that byte order would name a queue or a tag that no device has."""
    number = cookie if byte_order == "big" else int.from_bytes(cookie.to_bytes(8, "big"), "little")
    queue, tag = number >> 16 & 0xFFFF, number & 0xFFFF
    return queue if queue < _MOST_QUEUES and tag < _MOST_TAGS else None
