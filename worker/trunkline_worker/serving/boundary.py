"""The one place where errors leave the cluster, and where callers are told apart.

A handler raises ``WireError`` for what a caller may know. Everything else becomes INTERNAL with a request id; the
traceback goes to the log. No handler touches status codes or details.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import secrets
import string
import time
from collections.abc import AsyncIterator, Awaitable, Callable
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

from trunkline_worker.serving.auth import Principal, Tokens, authorise

logger = logging.getLogger(__name__)

_ID_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-_")


@dataclass(frozen=True)
class Call:
    """What a handler knows about the call it serves. ``deadline`` is a reading of ``time.monotonic``."""

    request_id: str
    principal: Principal
    deadline: float | None

    @property
    def tenant(self) -> str:
        """Return whose data the caller sees."""
        return self.principal.tenant

    def remaining_s(self, stated_s: float = 0.0) -> float | None:
        """Return the time left in seconds: the sooner of gRPC's deadline and the one stated in the message.

        Raises:
            WireError: DEADLINE_EXCEEDED where no time is left.
        """
        if stated_s < 0:
            raise WireError(ErrorCode.DEADLINE_EXCEEDED, "the deadline had passed when the call was sent")
        remaining = None if self.deadline is None else self.deadline - time.monotonic()
        if stated_s > 0:
            remaining = stated_s if remaining is None else min(remaining, stated_s)
        if remaining is not None and remaining <= 0:
            raise WireError(ErrorCode.DEADLINE_EXCEEDED, "the deadline has passed")
        return remaining


_current: contextvars.ContextVar[Call] = contextvars.ContextVar("trunkline_call")


def current_call() -> Call:
    """Return the call that the running handler serves."""
    return _current.get()


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps every handler: caller, request id, errors."""

    def __init__(self, tokens: Tokens | None) -> None:
        """Keep the tokens; None means that the operator runs without."""
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Return the handler, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        metadata = {
            key: value for key, value in handler_call_details.invocation_metadata or () if isinstance(value, str)
        }

        if handler.request_streaming and not handler.response_streaming:
            raise NotImplementedError(f"{method}: client streaming without a stream of replies is not served")
        if handler.response_streaming:
            inner = handler.unary_stream or handler.stream_stream

            async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
                async with self._guard(method, metadata, context):
                    replies = inner(request, context)
                    if not hasattr(replies, "__aiter__"):  # reflection and health write through the context
                        await replies
                        return
                    async with contextlib.aclosing(replies):
                        async for reply in replies:
                            yield reply

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream, handler.request_deserializer, handler.response_serializer)

        unary_inner = handler.unary_unary

        async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._guard(method, metadata, context):
                reply = unary_inner(request, context)
                return await reply if asyncio.iscoroutine(reply) else reply

        return grpc.unary_unary_rpc_method_handler(unary, handler.request_deserializer, handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _guard(
        self, method: str, metadata: dict[str, str], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[None]:
        request_id = _request_id(metadata.get(REQUEST_ID_METADATA, ""))
        try:
            principal = authorise(method, metadata.get("authorization"), self._tokens)
            remaining = context.time_remaining()
            deadline = None if remaining is None else time.monotonic() + remaining
            _current.set(Call(request_id, principal, deadline))
            yield
        except WireError as error:
            logger.info("%s refused: %s (request %s)", method, error, request_id)
            await _abort(context, error, request_id)
        except (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit):
            raise
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            logger.exception("%s failed (request %s)", method, request_id)
            await _abort(context, INTERNAL_ERROR, request_id)


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


def _request_id(given: str) -> str:
    if given and len(given) <= 64 and set(given) <= _ID_CHARACTERS:
        return given
    return secrets.token_hex(8)
