"""What all calls share: request ids, deadlines, retries and the one way from a failed call to an exception."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
from trunkline_wire.errors import REQUEST_ID_METADATA, RETRY_DELAY_METADATA, ErrorCode, WireError
from trunkline_wire.messages import error_from_proto

from trunkline._calls.exchange import Exchange
from trunkline._channel import Connection
from trunkline._deadline import Deadline, retry_delay
from trunkline._status import exception_for, is_retryable
from trunkline.errors import (
    DeadlineExceededError,
    InternalError,
    ServiceUnavailableError,
    TrunklineError,
    from_wire,
)

MAX_ATTEMPTS = 5
"""Most tries of one unary call that the cluster asks to repeat."""

MAX_BATCH_ATTEMPTS = 20
"""Most tries of one batch of a stream that the cluster asks to repeat."""

MAX_IDLE_CONNECTIONS = 6
"""Most connections in a row that broke before anything was answered on them."""

T = TypeVar("T")
Result = TypeVar("Result")


def new_request_id() -> str:
    """Return an id for one call."""
    return uuid.uuid4().hex[:16]


class Caller:
    """Makes calls on a connection."""

    def __init__(self, connection: Connection, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """Keep the connection. ``sleep`` waits between tries."""
        self.connection = connection
        self.sleep = sleep

    def deadline(self, timeout_s: float | None) -> Deadline:
        """Return the deadline of one call; None means the setting's."""
        return Deadline(self.connection.settings.timeout_s if timeout_s is None else timeout_s)

    def unary(
        self,
        stub: type[Any],
        method: str,
        request: Any,
        deadline: Deadline,
        *,
        retry: bool = True,
        wait_for_ready: bool = True,
    ) -> Any:
        """Make one unary call, repeating it within the deadline where the cluster asks for that.

        Args:
            stub: Generated stub class.
            method: Name of the method.
            request: The message.
            deadline: Over all tries.
            retry: Whether a repetition is harmless.
            wait_for_ready: Whether to wait for a connection instead of failing at once.
        """
        request_id = new_request_id()
        attempt = 0
        while True:
            left = deadline.check(method)
            call = getattr(self.connection.stub(stub), method)
            try:
                return call(request, timeout=left, metadata=self.metadata(request_id), wait_for_ready=wait_for_ready)
            except grpc.RpcError as rpc_error:
                error = self.error(rpc_error, request_id)
            attempt += 1
            delay_s = retry_delay(attempt, error.retry_delay_s)
            # gRPC itself has repeated what ended UNAVAILABLE; once more only where the cluster asks for patience.
            asked = error.code is ErrorCode.OVERLOADED or (is_retryable(error) and error.retry_delay_s > 0)
            if not retry or not asked or attempt >= MAX_ATTEMPTS or not deadline.allows(delay_s):
                raise error
            self.sleep(delay_s)

    def metadata(self, request_id: str) -> tuple[tuple[str, str], ...]:
        """Return the metadata of one call."""
        return self.connection.metadata(REQUEST_ID_METADATA, request_id)

    def error(self, error: grpc.RpcError, request_id: str) -> TrunklineError:
        """Return the exception for a failed call."""
        address = self.connection.settings.address
        status, details, delay_s = error.code().name, error.details() or "", _asked_delay(error)
        found = exception_for(status, details, address=address, request_id=request_id, retry_delay_s=delay_s)
        # Waiting for a connection that never comes ends as an expired deadline: say what was really the matter.
        if isinstance(found, DeadlineExceededError) and not details.startswith("[") and not self.connection.accepts():
            return ServiceUnavailableError(f"nothing listens at {address}", request_id=request_id)
        return found

    def stream(
        self,
        stub: type[Any],
        method: str,
        exchange: Exchange[T],
        *,
        request: Callable[[int, T], Any],
        end: Callable[[int], Any],
        result: str,
        deadline: Deadline,
        on_reconnect: Callable[[Exchange[T]], None] | None = None,
        retry_item: Callable[[TrunklineError], bool] = is_retryable,
    ) -> Iterator[tuple[int, T, Any]]:
        """Run a numbered exchange to its end, over as many connections as it takes.

        Args:
            stub: Generated stub class.
            method: Name of the method.
            exchange: What to send and what is unanswered.
            request: Makes the message of one item. Runs in the sending thread.
            end: Makes the end message, from the number of messages before it.
            result: Name of the reply's field that holds a result.
            deadline: Over everything.
            on_reconnect: Called before another connection is used; may answer items that need no sending.
            retry_item: Whether to send an item again after its error.

        Yields:
            (seq, item, reply or TrunklineError), in the order of the answers.
        """
        broken = 0
        while True:
            progress = False
            connection = exchange.open()
            request_id = new_request_id()
            error: TrunklineError | None = None
            call = getattr(self.connection.stub(stub), method)(
                _sending(exchange, connection, request, end),
                timeout=deadline.check(method),
                metadata=self.metadata(request_id),
                wait_for_ready=True,
            )
            try:
                for reply in call:
                    kind = reply.WhichOneof("kind")
                    if kind == "end":
                        break
                    answer = self._answer(exchange, reply, kind, result, request_id, deadline, retry_item)
                    if answer is not None:
                        progress = True
                        yield (reply.seq, *answer)
            except grpc.RpcError as rpc_error:
                error = self.error(rpc_error, request_id)
            finally:
                exchange.close()
                call.cancel()
            if exchange.failure is not None:
                raise exchange.failure
            if exchange.finished:
                return
            error = error or ServiceUnavailableError("the cluster ended a stream early", request_id=request_id)
            broken = 0 if progress else broken + 1
            delay_s = retry_delay(broken + 1, error.retry_delay_s)
            if not is_retryable(error) or broken >= MAX_IDLE_CONNECTIONS or not deadline.allows(delay_s):
                raise error
            self.sleep(delay_s)
            if on_reconnect is not None:
                on_reconnect(exchange)
                if exchange.finished:
                    return

    def _answer(
        self,
        exchange: Exchange[T],
        reply: Any,
        kind: str | None,
        result: str,
        request_id: str,
        deadline: Deadline,
        retry_item: Callable[[TrunklineError], bool],
    ) -> tuple[T, Any] | None:
        """Match a reply with its request. None where the request is to be sent again."""
        if kind == "error":
            error = error_from_message(reply.error, request_id)
            attempt = exchange.count_attempt(reply.seq) if retry_item(error) else 0
            delay_s = retry_delay(attempt, error.retry_delay_s)
            if 0 < attempt < MAX_BATCH_ATTEMPTS and deadline.allows(delay_s):
                exchange.put_off(reply.seq, delay_s)
                return None
        elif kind != result:
            raise InternalError(f"the cluster answered with {kind!r}, not {result!r}", request_id=request_id)
        item = exchange.answered(reply.seq)
        if item is None:
            raise InternalError(
                f"the cluster answered batch {reply.seq}, which is not under way",
                hint="Run it again, and report this if it happens twice",
                request_id=request_id,
            )
        return item, (error if kind == "error" else getattr(reply, result))


def error_from_message(message: Any, request_id: str = "") -> TrunklineError:
    """Return the exception of an ``Error`` message."""
    return from_wire(error_from_proto(message), request_id=message.request_id or request_id)


def _sending(
    exchange: Exchange[T], connection: int, request: Callable[[int, T], Any], end: Callable[[int], Any]
) -> Iterator[Any]:
    """Make messages for one connection. Runs in gRPC's thread, where an exception would be lost: it is recorded."""
    sent = 0
    try:
        for seq, item in exchange.outgoing(connection):
            yield request(seq, item)
            sent += 1
        if exchange.finished:
            yield end(sent)
    except WireError as error:
        exchange.fail(from_wire(error))
    except Exception as error:
        exchange.fail(error)


def _asked_delay(error: grpc.RpcError) -> float:
    """Return the delay that the trailing metadata asks for, in seconds."""
    for key, value in error.trailing_metadata() or ():
        if key == RETRY_DELAY_METADATA:
            try:
                return max(0.0, int(value) / 1000.0)
            except ValueError:
                return 0.0
    return 0.0
