"""CairnError to gRPC status and back, the same for every process.

A server installs `ErrorInterceptor`: a CairnError that leaves a handler ends the call with the
code of its class (blockstore.errors) and its message; any other exception is logged with its
stack and ends the call as INTERNAL; cancelled work that a handler waited for ends it as UNAVAILABLE.
A client wraps its calls in `with cairn_errors("node ..."):`, or hands a caught grpc.RpcError to
`from_rpc_error`. Invariant: an error of the tree that crosses a call arrives as the same class.
The codes that gRPC itself makes have a class too: who cannot be reached, answers too late, or ends
the call early is UNAVAILABLE to whoever needs a quorum.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc
import structlog

from blockstore.errors import BY_GRPC, CairnError, QuorumUnavailable

if TYPE_CHECKING:
    # grpc's classes are generic for mypy only.
    _ServerInterceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _ServerInterceptor = grpc.aio.ServerInterceptor

_log = structlog.get_logger(__name__)

#: Codes that gRPC makes by itself when a peer is away, slow, or ends the call.
_BY_TRANSPORT: Final[dict[str, type[CairnError]]] = {
    "DEADLINE_EXCEEDED": QuorumUnavailable,
    "CANCELLED": QuorumUnavailable,
}


def status_of(error: CairnError) -> grpc.StatusCode:
    """The gRPC code that tells a client of `error`."""
    code: grpc.StatusCode = grpc.StatusCode[error.codes.grpc]
    return code


def from_status(code: grpc.StatusCode, message: str) -> CairnError:
    """The error that a server told by `code`; CairnError itself for a code outside the table."""
    kind = BY_GRPC.get(code.name) or _BY_TRANSPORT.get(code.name, CairnError)
    return kind(message or f"the call ended with {code.name}")


def from_rpc_error(error: grpc.RpcError, peer: str = "") -> CairnError:
    """The CairnError that `error` stands for, as its class and with its message.

    peer: who was called; named only where the transport failed, for a server's own message says
    enough.
    """
    code: grpc.StatusCode = error.code()
    message: str = error.details() or ""
    if code.name == "UNIMPLEMENTED":
        return CairnError(
            f"{peer or 'who was called'} is of an older release, which does not know this call ({message}): update it, "
            "control before nodes, these before snapshotd, and front-ends last"
        )
    if peer and code.name in {"UNAVAILABLE", *_BY_TRANSPORT}:
        message = f"{peer}: {message}"
    return from_status(code, message)


@contextmanager
def cairn_errors(peer: str = "") -> Iterator[None]:
    """Raises what a call inside raises as grpc.RpcError as the CairnError that it stands for.

    So does a call on a channel that has been closed: whoever closed it has no use for the answer.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, peer) from error
    except grpc.aio.UsageError as error:
        raise QuorumUnavailable(f"{peer or 'who was called'}: the connection is closed ({error})") from error


class ErrorInterceptor(_ServerInterceptor):
    """Ends a call whose handler raises with the error's code. Wraps coroutines and asynchronous generators."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        make: Callable[..., grpc.RpcMethodHandler[Any, Any]] = getattr(grpc, f"{kind}_rpc_method_handler")
        behavior = _guarded(getattr(handler, kind), handler_call_details.method)
        return make(behavior, handler.request_deserializer, handler.response_serializer)


def _guarded(behavior: Callable[..., Any], method: str) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(behavior):

        async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                async for response in behavior(request, context):
                    yield response
            except asyncio.CancelledError:
                await _abort(context, method, _cut_off(method))
            except Exception as error:
                await _abort(context, method, error)

        return stream
    if inspect.iscoroutinefunction(behavior):

        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                return await behavior(request, context)
            except asyncio.CancelledError:
                await _abort(context, method, _cut_off(method))
            except Exception as error:
                await _abort(context, method, error)

        return call
    return behavior


def _cut_off(method: str) -> CairnError:
    """For a handler that waited for work which was cancelled: gRPC itself would leave its caller without an answer.

    Raises CancelledError where the call itself was cancelled.
    """
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise asyncio.CancelledError
    return QuorumUnavailable(f"{method}: what the call waited for was cut off; call again")


async def _abort(context: grpc.aio.ServicerContext[Any, Any], method: str, error: Exception) -> NoReturn:
    """Ends the call with the error's code; an abort that is under way already goes on."""
    if isinstance(error, (grpc.aio.AbortError, grpc.RpcError)) and not isinstance(error, CairnError):
        if isinstance(error, grpc.aio.AbortError):
            raise error
        error = from_rpc_error(error)
    if not isinstance(error, CairnError):
        _log.error("a call failed in a way that nobody foresaw", method=method, exc_info=error)
        error = CairnError(f"{method} failed inside the server: {type(error).__name__}: {error}")
    await context.abort(status_of(error), str(error))
    raise AssertionError("abort raises")
