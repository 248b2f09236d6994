"""The one error tree, and the one table that maps it to gRPC, NBD and exit codes.

Nobody matches on message text: a layer that translates looks its error's class up here. The gRPC
codes are names (this module imports none of the layers that use it). A message says what was
wrong, with the value, and what to do about it.
"""

import errno
from dataclasses import dataclass
from typing import ClassVar, Final


@dataclass(frozen=True, slots=True)
class Codes:
    """How one class of error is told to each kind of client.

    grpc: the name of a grpc.StatusCode. nbd_write, nbd_other: errno values of the NBD text, for
    commands that write and for the others. exit_code: of the `cairn` command.
    """

    grpc: str
    nbd_write: int
    nbd_other: int
    exit_code: int


class CairnError(Exception):
    """Anything that Cairn refuses or fails to do; the class itself is the INTERNAL case."""

    codes: ClassVar[Codes] = Codes("INTERNAL", errno.EIO, errno.EIO, 1)


class InvalidRequest(CairnError):
    """The request makes no sense, whatever the state is."""

    codes = Codes("INVALID_ARGUMENT", errno.EINVAL, errno.EINVAL, 2)


class OutOfRange(CairnError):
    """An address or length beyond the end."""

    codes = Codes("OUT_OF_RANGE", errno.ENOSPC, errno.EINVAL, 2)


class ReadOnly(CairnError):
    """A change to something that is read-only here."""

    codes = Codes("PERMISSION_DENIED", errno.EPERM, errno.EPERM, 3)


class NotFound(CairnError):
    """No such volume, replica, node or export."""

    codes = Codes("NOT_FOUND", errno.ENOENT, errno.ENOENT, 4)


class AlreadyExists(CairnError):
    """The name or id is taken."""

    codes = Codes("ALREADY_EXISTS", errno.EEXIST, errno.EEXIST, 5)


class Conflict(CairnError):
    """In use, or in a state that does not allow this."""

    codes = Codes("FAILED_PRECONDITION", errno.EBUSY, errno.EBUSY, 5)


class NoSpace(CairnError):
    """No room for it now; it may be tried again when there is."""

    codes = Codes("RESOURCE_EXHAUSTED", errno.ENOSPC, errno.ENOSPC, 6)


class Fenced(CairnError):
    """The sender's epoch is over: a newer attachment exists."""

    codes = Codes("ABORTED", errno.ESHUTDOWN, errno.ESHUTDOWN, 7)


class QuorumUnavailable(CairnError):
    """Too few members answer for anything to be promised."""

    codes = Codes("UNAVAILABLE", errno.EIO, errno.EIO, 8)


class Corrupt(CairnError):
    """Stored bytes fail their checksum, and no copy that passes was found."""

    codes = Codes("DATA_LOSS", errno.EIO, errno.EIO, 9)


#: Every class, by its gRPC code's name. ALREADY_EXISTS and FAILED_PRECONDITION stay apart.
BY_GRPC: Final[dict[str, type[CairnError]]] = {
    error.codes.grpc: error
    for error in (
        CairnError,
        InvalidRequest,
        OutOfRange,
        ReadOnly,
        NotFound,
        AlreadyExists,
        Conflict,
        NoSpace,
        Fenced,
        QuorumUnavailable,
        Corrupt,
    )
}
