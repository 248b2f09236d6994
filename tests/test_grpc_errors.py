"""Every error of the tree crosses a real call as its class."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from blockstore.errors import BY_GRPC, CairnError, Conflict, QuorumUnavailable
from blockstore.grpc_errors import ErrorInterceptor, cairn_errors, from_status

ERRORS = sorted(BY_GRPC.values(), key=lambda error: error.__name__)


class _Service(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Raises what it is told to: as one answer, and after the first of a stream of answers."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.began, self.cancelled = asyncio.Event(), asyncio.Event()

    async def unary(self, request: bytes, context: Any) -> bytes:
        raise self.error

    async def stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        raise self.error

    async def slow(self, request: bytes, context: Any) -> bytes:
        self.began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return b""

    def service(self, details: Any) -> Any:
        return {
            "/t/unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "/t/stream": grpc.unary_stream_rpc_method_handler(self.stream),
            "/t/slow": grpc.unary_unary_rpc_method_handler(self.slow),
        }.get(details.method)


async def _call(raised: BaseException, method: str, timeout_s: float = 60) -> None:
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    server.add_generic_rpc_handlers((_Service(raised),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with cairn_errors("the peer"):
                if method == "/t/stream":
                    async for answer in channel.unary_stream(method)(b"", timeout=timeout_s):  # type: ignore[call-arg]
                        assert answer == b"first"
                else:
                    await channel.unary_unary(method)(b"", timeout=timeout_s)  # type: ignore[call-arg]
    finally:
        await server.stop(0)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("method", ["/t/unary", "/t/stream"])
def test_an_error_arrives_as_its_class_with_its_message(kind: type[CairnError], method: str) -> None:
    with pytest.raises(CairnError, match=r"7 is no good") as caught:
        asyncio.run(_call(kind("7 is no good"), method))
    assert type(caught.value) is kind


@pytest.mark.parametrize("method", ["/t/unary", "/t/stream"])
def test_an_unforeseen_exception_is_internal(method: str) -> None:
    with pytest.raises(CairnError, match=r"ZeroDivisionError: by zero") as caught:
        asyncio.run(_call(ZeroDivisionError("by zero"), method))
    assert type(caught.value) is CairnError


@pytest.mark.parametrize("method", ["/t/unary", "/t/stream"])
def test_work_that_is_cut_off_is_answered(method: str) -> None:
    with pytest.raises(QuorumUnavailable, match=r"cut off; call again"):
        asyncio.run(_call(asyncio.CancelledError(), method))


def test_a_call_that_its_caller_cancels_ends_as_that(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is there to be told anything."""
    caplog.set_level(logging.DEBUG, "grpc")

    async def run() -> None:
        service = _Service(Conflict("not raised"))
        server = grpc.aio.server(interceptors=[ErrorInterceptor()])
        server.add_generic_rpc_handlers((service,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/t/slow")(b"", timeout=60)  # type: ignore[call-arg]
            async with asyncio.timeout(60):
                await service.began.wait()
                call.cancel()
                await service.cancelled.wait()
        await server.stop(0)

    asyncio.run(run())
    assert "RPC cancelled for servicer method [/t/slow]" in caplog.text


def test_too_late_is_unavailable_and_names_the_peer() -> None:
    with pytest.raises(QuorumUnavailable, match=r"the peer: "):
        asyncio.run(_call(Conflict("not raised"), "/t/slow", timeout_s=0.05))


def test_an_unknown_method_says_who_is_to_be_updated() -> None:
    with pytest.raises(CairnError, match=r"the peer is of an older release.*update it, control before nodes") as caught:
        asyncio.run(_call(Conflict("not raised"), "/t/absent"))
    assert type(caught.value) is CairnError


def test_a_call_on_a_channel_that_was_closed_is_unavailable() -> None:
    async def call() -> None:
        channel = grpc.aio.insecure_channel("127.0.0.1:1")
        await channel.close(None)
        with cairn_errors("the peer"):
            await channel.unary_unary("/t/unary")(b"", timeout=5)  # type: ignore[call-arg]

    with pytest.raises(QuorumUnavailable, match=r"the peer: the connection is closed"):
        asyncio.run(call())


def test_every_code_has_a_class() -> None:
    for code in grpc.StatusCode:
        assert isinstance(from_status(code, ""), BY_GRPC.get(code.name, CairnError))
