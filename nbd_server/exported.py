"""What clients are told of an export: size, flags, block sizes, names. Pure.

Everything that is said here is so: a flag stands for what the server does with every request of this export (NBD,
"Transmission flags").
"""

from collections.abc import Awaitable, Iterator, Mapping
from typing import Final, Protocol, TypeVar

from blockstore.units import BLOCK_SIZE, MIB
from nbd_server import wire
from nbd_server.terms import Style, Terms
from nbd_server.wire import Info, TransmissionFlag

#: Any byte range is served; whole blocks are served without reading first.
MINIMUM_BLOCK_SIZE: Final = 1
PREFERRED_BLOCK_SIZE: Final = BLOCK_SIZE
#: NBD, "Block size constraints": what clients assume by default.
MAXIMUM_BLOCK_SIZE: Final = 32 * MIB


class Exported(Protocol):
    """What the handshake tells of an export."""

    @property
    def name(self) -> str:
        """Its canonical name; at most MAX_STRING_BYTES in UTF-8."""

    @property
    def description(self) -> str:
        """For people; may be empty."""

    @property
    def size_bytes(self) -> int:
        """As of now; it may grow."""

    @property
    def read_only(self) -> bool:
        """Whether changes are refused."""

    @property
    def client(self) -> str:
        """The only one whose links may use it (nbd_server/links.py); empty: anyone."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names of what it exports: rules on access may mean any of them."""

    @property
    def shared(self) -> bool:
        """Whether all connections to it see one content, and a flush on any of them covers all."""

    @property
    def snapshots(self) -> Mapping[str, str]:
        """The snapshots that changes can be told since, by id and by name, as they were looked up last."""


E = TypeVar("E", bound=Exported)
E_co = TypeVar("E_co", bound=Exported, covariant=True)


class Catalogue(Protocol[E_co]):
    """Where the handshake looks exports up."""

    def find(self, name: str) -> E_co | None:
        """The export of that name; "" asks for the default one."""

    def why_not(self, name: str) -> str:
        """Why `find` knows no such export, for people."""

    def look_up(self, name: str, *, snapshots: bool = False) -> Awaitable[None] | None:
        """None where `find` knows all there is to know of that name; else what to wait for before it is asked.

        snapshots: its snapshots are asked for as well. Cancelled where the client goes away.
        """

    def __iter__(self) -> Iterator[E_co]:
        """All exports, in the order in which LIST tells them."""


def transmission_flags(export: Exported, terms: Terms, *, read_only: bool = False) -> int:
    """What the export can do on these terms (NBD, "Transmission flags"). read_only: to this client.

    CAN_MULTI_CONN is true of volumes: a write is acknowledged only when a quorum of replicas has it on disk, and
    one front-end orders the requests of all connections. So a flush, or FUA, on any connection covers
    what was acknowledged on every other, and each connection reads what another was told is written. Of a
    clone that each connection has for itself it is not.
    SEND_CACHE: blocks of a snapshot that have not come yet are fetched. SEND_FAST_ZERO: zeroes of whole blocks take
    a record without a payload; where a request would take more than that, it is refused with ENOTSUP.
    """
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
    flags |= TransmissionFlag.SEND_CACHE
    if export.shared:
        flags |= TransmissionFlag.CAN_MULTI_CONN
    if terms.style >= Style.STRUCTURED:
        flags |= TransmissionFlag.SEND_DF
    if terms.style is Style.EXTENDED and terms.contexts:
        flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    if export.read_only or read_only:
        return flags | TransmissionFlag.READ_ONLY
    flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES
    return flags | TransmissionFlag.SEND_FAST_ZERO


def information(export: Exported, item: int) -> bytes | None:
    """What a client asked to know beyond EXPORT, or None where there is nothing to say (NBD, "Option reply types")."""
    if item == Info.NAME:
        return wire.serialize_info_text(Info.NAME, export.name)
    if item == Info.DESCRIPTION and export.description:
        return wire.serialize_info_text(Info.DESCRIPTION, export.description)
    if item == Info.BLOCK_SIZE:
        return wire.serialize_info_block_size(MINIMUM_BLOCK_SIZE, PREFERRED_BLOCK_SIZE, MAXIMUM_BLOCK_SIZE)
    return None
