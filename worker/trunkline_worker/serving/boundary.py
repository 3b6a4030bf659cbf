"""The one place where errors leave the cluster, and where callers are told apart.

A handler raises ``WireError`` for what a caller may know. Everything else becomes INTERNAL with a request id; the
traceback goes to the log. No handler touches status codes or details.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from trunkline_wire.errors import (
    REQUEST_ID_METADATA,
    RETRY_DELAY_METADATA,
    STATUS_BY_CODE,
    ErrorCode,
    WireError,
    format_details,
)

from trunkline_worker.serving.auth import Authorise, Principal
from trunkline_worker.serving.draining import Draining

logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Call:
    """What a handler knows about the call it serves.

    Attributes:
        request_id: By which caller and log name it.
        principal: Who is calling.
        deadline: A reading of ``time.monotonic``.
        draining: Tells that the server is about to end.
        connection: The connection that the call came on, as gRPC names it.
    """

    request_id: str
    principal: Principal
    deadline: float | None
    draining: Draining
    connection: str = ""

    @property
    def tenant(self) -> str:
        """Return whose data the caller sees."""
        return self.principal.tenant

    @property
    def caller(self) -> str:
        """Return who shares with others what there is of room and time: see ``Engine.predict``."""
        return f"{self.principal.tenant}/{self.connection}"

    def until(self, stated_s: float = 0.0) -> float | None:
        """Return the deadline of a message that states so many seconds, as a reading of ``time.monotonic``."""
        if stated_s == 0:
            return self.deadline
        stated = time.monotonic() + stated_s
        return stated if self.deadline is None else min(stated, self.deadline)

    def left_s(self, deadline: float | None) -> float | None:
        """Return the time left until a deadline, in seconds.

        Raises:
            WireError: DEADLINE_EXCEEDED where no time is left.
        """
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise WireError(ErrorCode.DEADLINE_EXCEEDED, "the deadline has passed")
        return left

    def remaining_s(self, stated_s: float = 0.0) -> float | None:
        """Return the time left in seconds: the sooner of gRPC's deadline and the one stated in the message.

        Raises:
            WireError: DEADLINE_EXCEEDED where no time is left.
        """
        if stated_s < 0:
            raise WireError(ErrorCode.DEADLINE_EXCEEDED, "the deadline had passed when the call was sent")
        return self.left_s(self.until(stated_s))


_current: contextvars.ContextVar[Call] = contextvars.ContextVar("trunkline_call")


def current_call() -> Call:
    """Return the call that the running handler serves."""
    return _current.get()


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps every handler: caller, request id, errors."""

    def __init__(self, authorise: Authorise, draining: Draining) -> None:
        """Keep what is needed for every call.

        Args:
            authorise: Tells callers apart and turns them away.
            draining: Tells handlers that the server is about to end.
        """
        self._authorise = authorise
        self._draining = draining
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Return the handler, wrapped. A method has one, which is kept."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        if handler.request_streaming and not handler.response_streaming:
            raise NotImplementedError(f"{method}: client streaming without a stream of replies is not served")
        if handler.response_streaming:
            inner = handler.unary_stream or handler.stream_stream

            async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
                metadata = dict(context.invocation_metadata() or ())
                request_id = _request_id(metadata)
                try:
                    self._enter(method, metadata, request_id, context)
                    replies = inner(request, context)
                    if not hasattr(replies, "__aiter__"):  # reflection and health write through the context
                        await replies
                        return
                    async with contextlib.aclosing(replies):
                        async for reply in replies:
                            yield reply
                except BaseException as error:
                    public = _public_end(error, method, request_id)
                    if public is None:
                        raise
                    await _abort(context, public, request_id)

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream, handler.request_deserializer, handler.response_serializer)

        unary_inner = handler.unary_unary

        async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
            metadata = dict(context.invocation_metadata() or ())
            request_id = _request_id(metadata)
            try:
                self._enter(method, metadata, request_id, context)
                reply = unary_inner(request, context)
                return await reply if asyncio.iscoroutine(reply) else reply
            except BaseException as error:
                public = _public_end(error, method, request_id)
                if public is None:
                    raise
                await _abort(context, public, request_id)

        return grpc.unary_unary_rpc_method_handler(unary, handler.request_deserializer, handler.response_serializer)

    def _enter(
        self, method: str, metadata: Mapping[str, str | bytes], request_id: str, context: grpc.aio.ServicerContext
    ) -> None:
        principal = self._authorise(method, metadata)
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        _current.set(Call(request_id, principal, deadline, self._draining, context.peer()))


def _public_end(error: BaseException, method: str, request_id: str) -> WireError | None:
    """Return what a caller sees of the error that ended a call, and log the rest. None: it is none of theirs."""
    if isinstance(error, WireError):
        logger.info("%s refused: %s (request %s)", method, error, request_id)
        return error
    if isinstance(error, (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit, KeyboardInterrupt, SystemExit)):
        return None
    logger.error("%s failed (request %s)", method, request_id, exc_info=error)
    return INTERNAL_ERROR


INTERNAL_ERROR = WireError(ErrorCode.INTERNAL, "something went wrong in the cluster; its log names this request")
"""What a caller sees of an error that is nobody's business."""


def public_error(error: BaseException, what: str, request_id: str) -> WireError:
    """Return what a caller may see of an error inside a stream, and log the rest."""
    if isinstance(error, WireError):
        return error
    logger.error("%s failed (request %s)", what, request_id, exc_info=error)
    return INTERNAL_ERROR


async def _abort(context: grpc.aio.ServicerContext, error: WireError, request_id: str) -> None:
    trailing = [(REQUEST_ID_METADATA, request_id)]
    if error.retry_delay_s > 0:
        trailing.append((RETRY_DELAY_METADATA, str(max(1, round(error.retry_delay_s * 1000)))))
    status = getattr(grpc.StatusCode, STATUS_BY_CODE[error.code])
    await context.abort(status, format_details(error, request_id), tuple(trailing))


def _request_id(metadata: Mapping[str, str | bytes]) -> str:
    given = metadata.get(REQUEST_ID_METADATA, "")
    if isinstance(given, str) and _ID.fullmatch(given):
        return given
    return secrets.token_hex(8)
