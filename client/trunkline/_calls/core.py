"""What all calls share: request ids, deadlines, retries, and where they go."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import grpc
from trunkline_wire.errors import REQUEST_ID_METADATA, ErrorCode

from trunkline._calls.exchange import Exchange
from trunkline._calls.failures import error_from_call, error_from_message, new_request_id, note_failure
from trunkline._calls.streams import MAX_BATCH_ATTEMPTS, MAX_IDLE_CONNECTIONS, Method, Streams
from trunkline._channel import Connection
from trunkline._deadline import Deadline, retry_delay
from trunkline._direct import Direct, Pool, Replica
from trunkline._status import is_retryable
from trunkline.errors import DeadlineExceededError, OverloadedError, ServiceUnavailableError, TrunklineError

__all__ = [
    "MAX_BATCH_ATTEMPTS",
    "MAX_IDLE_CONNECTIONS",
    "Caller",
    "Method",
    "error_from_message",
    "new_request_id",
]

MAX_ATTEMPTS = 5
"""Most tries of one unary call that the cluster asks to repeat."""

T = TypeVar("T")


class Caller:
    """Makes calls: to the gateway, or for rows to replicas themselves."""

    def __init__(self, connection: Connection, direct: Direct, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """Keep the connections. ``sleep`` waits between tries."""
        self.connection = connection
        self.direct = direct
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
        """Make one unary call to the gateway, repeating it within the deadline where the cluster asks for that.

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
            # gRPC itself has repeated what ended UNAVAILABLE; once more only where the cluster asks for patience.
            asked = error.code is ErrorCode.OVERLOADED or (is_retryable(error) and error.retry_delay_s > 0)
            if not retry or not asked:
                raise error
            self._wait(error, attempt, deadline)

    def rows(
        self, stub: type[Any], method: str, request: Any, deadline: Deadline, *, backbone: str, num_rows: int
    ) -> Any:
        """Make one unary call with rows: to the least busy replica that can be reached, else to the gateway.

        Args:
            stub: Generated stub class.
            method: Name of the method. A repetition must be harmless.
            request: The message.
            deadline: Over all tries.
            backbone: Which has to answer; empty where the gateway must find that out.
            num_rows: How many rows.
        """
        if backbone:
            answer = self.rows_directly(stub, method, request, deadline, backbone=backbone, num_rows=num_rows)
            if answer is not None:
                return answer
        return self.unary(stub, method, request, deadline)

    def rows_directly(
        self, stub: type[Any], method: str, request: Any, deadline: Deadline, *, backbone: str, num_rows: int
    ) -> Any:
        """As ``rows``; None where no replica could be reached: through the gateway the call may succeed."""
        busy: list[Replica] = []
        error: TrunklineError = ServiceUnavailableError("no replica was reached")
        attempt = 0
        while True:
            left = deadline.check(method)
            found = self.direct.take(backbone, num_rows, busy)
            if found is None:
                if not busy:
                    return None
                # All of them have too much to do, so the gateway's queue is no shorter: wait as they ask.
                attempt += 1
                self._wait(error, attempt, deadline)
                busy = []
                continue
            pool, replica = found
            request_id = new_request_id()
            ticket, metadata = replica.show(stub, method, request_id)
            try:
                return replica.method(stub, method)(request, timeout=left, metadata=metadata)
            except grpc.RpcError as rpc_error:
                error = self.error(rpc_error, request_id, replica)
                if isinstance(error, OverloadedError):
                    busy.append(replica)
                elif note_failure(pool, replica, ticket, rpc_error, error):
                    return None
                else:
                    raise error from None
            except ValueError:  # its channel is being closed
                return None
            finally:
                pool.give_back(replica, num_rows)

    def _wait(self, error: TrunklineError, attempt: int, deadline: Deadline) -> None:
        """Wait before another try, or raise the error of the last one."""
        delay_s = retry_delay(attempt, error.retry_delay_s)
        if attempt >= MAX_ATTEMPTS or not deadline.allows(delay_s):
            raise error
        self.sleep(delay_s)

    def metadata(self, request_id: str) -> tuple[tuple[str, str], ...]:
        """Return the metadata of one call to the gateway."""
        return self.connection.metadata(REQUEST_ID_METADATA, request_id)

    def error(self, error: grpc.RpcError, request_id: str, replica: Replica | None = None) -> TrunklineError:
        """Return the exception for a failed call to a replica; None is the gateway."""
        address = self.connection.settings.address if replica is None else replica.endpoint.address
        found = error_from_call(error, address, request_id)
        # Waiting for a connection that never comes ends as an expired deadline: say what was really the matter.
        is_silent = isinstance(found, DeadlineExceededError) and not (error.details() or "").startswith("[")
        if is_silent and replica is None and not self.connection.accepts():
            return ServiceUnavailableError(f"nothing listens at {address}", request_id=request_id)
        return found

    def stream(
        self, method: Method[T], exchange: Exchange[T], deadline: Deadline, *, backbone: str = ""
    ) -> Generator[tuple[int, T, Any]]:
        """Run a numbered exchange to its end, over as many connections as it takes.

        Args:
            method: What is called.
            exchange: What to send and what is unanswered.
            deadline: Over everything.
            backbone: Whose replicas can answer, wherever they can be reached; empty where the gateway alone can.

        Yields:
            (seq, item, reply or TrunklineError), in the order of the answers.
        """
        pool: Pool | None = self.direct.pool(backbone) if backbone else None
        return Streams(self, method, exchange, deadline, pool).run()
