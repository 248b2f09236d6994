"""gRPC's reflection, so that grpcurl and the like can look in; its library is imported when somebody does.

It brings the descriptors of descriptors, a tenth of what a process takes to start, for a call that most never get.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import grpc

if TYPE_CHECKING:
    Handler = grpc.GenericRpcHandler[Any, Any]
else:
    Handler = grpc.GenericRpcHandler

_SERVICE: Final = "grpc.reflection.v1alpha.ServerReflection"

HandlersOf = Callable[[Callable[[Any, Any], None], Any], dict[str, Any]]


class ReflectionLater(Handler):
    """names: of the services that are shown. handlers_of: the handlers of generated code, by the calls' names."""

    def __init__(self, names: Iterable[str], handlers_of: HandlersOf) -> None:
        self._names = (*names, _SERVICE)
        self._handlers_of = handlers_of
        self._handlers: dict[str, Any] = {}

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call to reflection; None for any other call."""
        service, _, call = handler_call_details.method.removeprefix("/").rpartition("/")
        if service != _SERVICE:
            return None
        if not self._handlers:
            self._handlers = self._import()
        return self._handlers.get(call)

    def _import(self) -> dict[str, Any]:
        # See the module.
        from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc  # noqa: PLC0415

        servicer = reflection.aio.ReflectionServicer(self._names)  # type: ignore[attr-defined]  # missing in the stubs
        return self._handlers_of(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, servicer)
