"""What a client and the server have agreed on for the transmission phase. Pure."""

from dataclasses import dataclass
from enum import IntEnum


class Style(IntEnum):
    """How requests and replies look (NBD, "Transmission"). Each can all that the one before it can."""

    SIMPLE = 0
    """Compact requests; a reply is one message."""
    STRUCTURED = 1
    """Compact requests; a reply is chunks, where it carries more than success (NBD_OPT_STRUCTURED_REPLY)."""
    EXTENDED = 2
    """Requests and chunks with headers of 32 bytes and lengths of 64 bits (NBD_OPT_EXTENDED_HEADERS)."""


@dataclass(frozen=True, slots=True)
class Context:
    """A metadata context that was selected (NBD, "Metadata querying").

    number: its ID on the wire. snapshot: the id of the one whose changes it tells; empty where it tells none.
    """

    number: int
    name: str
    snapshot: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """contexts: in the order of their numbers."""

    style: Style = Style.SIMPLE
    contexts: tuple[Context, ...] = ()
