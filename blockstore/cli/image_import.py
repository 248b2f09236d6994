"""Sends an image to snapshotd, which makes a snapshot of it.

A stream of requests is the one call that this command makes without an event loop: where the other side ends it
while a message is on its way, grpc.aio forgets why (it answers "Internal error from Core"), and an image is read
by blocking calls anyway. Invariant: where reading fails, the message that says `last` is never sent, and nothing
comes to be.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc

from blockstore.cli.image_input import ImageInput
from blockstore.cli.meters import Amount, Rate
from blockstore.errors import CairnError
from blockstore.grpc_endpoint import open_blocking_channel
from blockstore.grpc_errors import from_rpc_error
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.rpc.snapshot_pb2_grpc import SnapshotStoreStub

#: Ctrl-C is looked for so often.
_LOOK_S: Final = 0.2


def send_image(address: str, first: pb.ImportRequest, image: ImageInput, show: Callable[[Amount], None]) -> pb.Snapshot:
    """The snapshot that the snapshotd at `address` made. first: all but the data; show: is told how far it is.

    Raises what reading the image raises, and the CairnError that snapshotd answers.
    """
    requests = _Requests(first, image, show)
    with open_blocking_channel(address) as channel:
        call: Any = SnapshotStoreStub(channel).Import.future(iter(requests))
        requests.cancel_by(call.cancel)
        try:
            return _result(call)
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            raise requests.error or _told_by(error, address) from None
        finally:
            call.cancel()
            image.stop()


def _told_by(error: Exception, address: str) -> CairnError:
    """What snapshotd ended the call with."""
    if isinstance(error, grpc.RpcError):
        return from_rpc_error(error, f"snapshotd at {address}")
    return CairnError(f"the import to {address} was cancelled")


def _result(call: Any) -> pb.Snapshot:
    """What the call answers; a signal is heard meanwhile."""
    while True:
        try:
            found: pb.Snapshot = call.result(timeout=_LOOK_S)
            return found
        except grpc.FutureTimeoutError:
            continue


class _Requests:
    """The messages of one import, made in gRPC's thread. error: what reading the image ended with."""

    def __init__(self, first: pb.ImportRequest, image: ImageInput, show: Callable[[Amount], None]) -> None:
        self.error: Exception | None = None
        self._first = first
        self._image = image
        self._show = show
        self._cancel: Callable[[], Any] = lambda: None
        self._begun = threading.Event()

    def cancel_by(self, cancel: Callable[[], Any]) -> None:
        """What ends the call, now that there is one."""
        self._cancel = cancel
        self._begun.set()

    def __iter__(self) -> Iterator[pb.ImportRequest]:
        try:
            yield self._first
            yield from self._data()
        except Exception as error:
            self.error = error
            self._begun.wait()
            # Raising here would print a stack.
            self._cancel()

    def _data(self) -> Iterator[pb.ImportRequest]:
        done, total, rate = 0, self._image.data_bytes, Rate()
        for offset, data in self._image.chunks():
            yield pb.ImportRequest(offset=offset, data=data)
            done += len(data)
            self._show(Amount(done, max(done, total), rate=rate.after(done)))
        self._show(Amount(total, total, note="being stored"))
        yield pb.ImportRequest(last=True)
