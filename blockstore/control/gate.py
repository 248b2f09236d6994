"""Where calls arrive: they go to the services of control while it is active, and are refused while it stands by.

A control that stands by, and becomes active, and loses that again keeps its address all along: what changes is who
answers. The services are made anew each time, with all that they know in memory, so nothing of an earlier time as
the active one is left. Health says SERVING of these services only while they are there: that is how a client with
several addresses finds the active one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, cast

import grpc

from blockstore.errors import QuorumUnavailable
from blockstore.grpc_endpoint import Endpoint, handlers_of
from blockstore.rpc import control_pb2, control_pb2_grpc, snapshot_pb2, snapshot_pb2_grpc

_CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
_SNAPSHOTS = snapshot_pb2.DESCRIPTOR.services_by_name["Snapshots"].full_name


class Gate:
    """The services Control and Snapshots of an endpoint; to gRPC, a GenericRpcHandler. Shut when it is made."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._why: Callable[[], str] = lambda: "control has just started, and does not answer yet"
        plain: Any = (control_pb2_grpc.ControlServicer, snapshot_pb2_grpc.SnapshotsServicer)
        calls = _handlers(*(kind() for kind in plain))
        self._shut = {method: self._refusing(handler) for method, handler in calls.items()}
        self._handlers: Mapping[str, Any] = self._shut
        self.opened = asyncio.Event()
        endpoint.server.add_generic_rpc_handlers((cast(Any, self),))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Of gRPC: who answers this call; None where it is another service's."""
        return self._handlers.get(handler_call_details.method)

    async def open(
        self, control: control_pb2_grpc.ControlServicer, snapshots: snapshot_pb2_grpc.SnapshotsServicer
    ) -> None:
        """From now on these answer."""
        self._handlers = _handlers(control, snapshots)
        self.opened.set()
        await self._tell(serving=True)

    async def shut(self, why: Callable[[], str] | None = None) -> None:
        """From now on calls are refused, with what `why` says then. Those under way go on."""
        self._why = why or self._why
        self._handlers = self._shut
        self.opened.clear()
        await self._tell(serving=False)

    async def _tell(self, serving: bool) -> None:
        for name in (_CONTROL, _SNAPSHOTS):
            await self._endpoint.set_serving(name, serving)

    def _refusing(self, handler: Any) -> Any:
        """One that takes the same call, and refuses it."""

        async def refuse(request: Any, context: Any) -> Any:
            raise QuorumUnavailable(self._why())

        async def refuse_stream(request: Any, context: Any) -> AsyncIterator[Any]:
            raise QuorumUnavailable(self._why())
            yield  # so that it is a generator, as gRPC asks of a call with many answers

        make, refusal = (
            (grpc.unary_stream_rpc_method_handler, refuse_stream)
            if handler.response_streaming
            else (grpc.unary_unary_rpc_method_handler, refuse)
        )
        return make(refusal, handler.request_deserializer, handler.response_serializer)


def _handlers(
    control: control_pb2_grpc.ControlServicer, snapshots: snapshot_pb2_grpc.SnapshotsServicer
) -> dict[str, Any]:
    """By the full names of the calls."""
    of_control = handlers_of(control_pb2_grpc.add_ControlServicer_to_server, control)
    of_snapshots = handlers_of(snapshot_pb2_grpc.add_SnapshotsServicer_to_server, snapshots)
    return {f"/{_CONTROL}/{name}": each for name, each in of_control.items()} | {
        f"/{_SNAPSHOTS}/{name}": each for name, each in of_snapshots.items()
    }
