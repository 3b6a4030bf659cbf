"""One exchange over gRPC streams: several to replicas at once where these can be reached, else one to the gateway."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc
from trunkline_wire.bulk import Apart
from trunkline_wire.errors import ErrorCode, WireError

from trunkline._calls.exchange import Exchange
from trunkline._calls.failures import error_from_message, new_request_id, note_failure
from trunkline._deadline import Deadline, retry_delay
from trunkline._direct import Metadata, Pool, Replica
from trunkline._status import is_retryable
from trunkline.errors import (
    CallCancelledError,
    InternalError,
    OverloadedError,
    ServiceUnavailableError,
    TrunklineError,
    from_wire,
)

if TYPE_CHECKING:
    from trunkline._calls.core import Caller

MAX_BATCH_ATTEMPTS = 20
"""Most tries of one batch of a stream that the cluster asks to repeat."""

MAX_IDLE_CONNECTIONS = 6
"""Most connections in a row that broke before anything was answered on them."""

T = TypeVar("T")


@dataclass(frozen=True)
class Method(Generic[T]):
    """A method that takes a stream of numbered requests, and how to speak with it.

    Attributes:
        stub: Generated stub class.
        name: Of the method.
        request: Makes the message of one item. Runs in sending threads.
        end: Makes the end message, from the number of messages before it.
        result: Name of the reply's field that holds a result.
        num_rows: Rows of an item, to tell how busy a replica is.
        on_reconnect: Called before another connection to the gateway is used; may answer items that need no sending.
        retry_item: Whether to send an item again after its error.
    """

    stub: type[Any]
    name: str
    request: Callable[[int, T], Any]
    end: Callable[[int], Any]
    result: str
    num_rows: Callable[[T], int] = lambda item: 1
    on_reconnect: Callable[[Exchange[T]], None] | None = None
    retry_item: Callable[[TrunklineError], bool] = is_retryable


@dataclass(eq=False)
class _Link:
    """One stream.

    Attributes:
        connection: Its number in the exchange.
        request_id: Names it in the cluster's log.
        replica: Where it leads; None is the gateway.
        ticket: What that was shown.
        call: The stream.
        is_retired: Whether nothing more is sent on it.
        is_given_up: Whether the caller wants no more answers.
        has_answered: Whether anything was answered on it.
        rows: Rows outstanding, by number of the request.
    """

    connection: int
    request_id: str
    replica: Replica | None = None
    ticket: bytes = b""
    call: Any = None
    is_retired: bool = False
    is_given_up: bool = False
    has_answered: bool = False
    rows: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Answered(Generic[T]):
    seq: int
    item: T
    reply: Any


@dataclass(frozen=True)
class _Ended:
    link: _Link
    error: TrunklineError | None
    is_broken: bool


class Streams(Generic[T]):
    """The streams of one exchange. Each has a thread that reads; the caller's opens them and takes the answers."""

    def __init__(
        self, caller: Caller, method: Method[T], exchange: Exchange[T], deadline: Deadline, pool: Pool | None
    ) -> None:
        """Open nothing yet.

        Args:
            caller: Makes the calls.
            method: What is called.
            exchange: What to send and what is unanswered.
            deadline: Over everything.
            pool: The replicas that can answer. None: the gateway alone.
        """
        self._caller = caller
        self._method = method
        self._exchange = exchange
        self._deadline = deadline
        self._pool = pool
        self._links: list[_Link] = []
        self._events: SimpleQueue[_Answered[T] | _Ended | None] = SimpleQueue()

    def run(self) -> Generator[tuple[int, T, Any]]:
        """Yield (seq, item, reply or TrunklineError), in the order of the answers.

        Raises:
            TrunklineError: The source failed, or nothing could be reached in the time allowed.
        """
        if self._pool is not None:
            self._pool.watch(self._wake)
        try:
            self._adjust()
            yield from self._take_answers()
        except BaseException:
            for link in self._links:
                link.is_given_up = True
                self._exchange.close(link.connection)
                link.call.cancel()
            raise
        finally:
            if self._pool is not None:
                self._pool.unwatch(self._wake)

    def _take_answers(self) -> Iterator[tuple[int, T, Any]]:
        num_broken = 0
        while not self._exchange.finished:
            event = self._events.get()
            if self._exchange.failure is not None:
                raise self._exchange.failure
            if isinstance(event, _Answered):
                self._exchange.taken()
                yield event.seq, event.item, event.reply
                continue
            if isinstance(event, _Ended):
                self._links.remove(event.link)
                if event.error is not None and not event.is_broken:
                    raise event.error
                if event.link.replica is None and not self._links and not self._exchange.finished:
                    num_broken = 0 if event.link.has_answered else num_broken + 1
                    self._wait_for_gateway(event, num_broken)
            if not self._exchange.finished:
                self._adjust()

    def _wait_for_gateway(self, event: _Ended, num_broken: int) -> None:
        """Wait before another connection to the gateway, or give up."""
        error = event.error or ServiceUnavailableError(
            "the cluster ended a stream early", request_id=event.link.request_id
        )
        delay_s = retry_delay(num_broken + 1, error.retry_delay_s)
        if num_broken >= MAX_IDLE_CONNECTIONS or not self._deadline.allows(delay_s):
            raise error
        self._caller.sleep(delay_s)
        if self._method.on_reconnect is not None:
            self._method.on_reconnect(self._exchange)

    def _adjust(self) -> None:
        """Open streams to replicas that became ready, retire those to others, and use the gateway if there are none."""
        if self._pool is not None:
            ready = self._pool.ready()
            for link in self._links:
                if link.replica is not None and link.replica not in ready:
                    self._retire(link)
            self._open_direct(self._pool, len(ready))
            if any(link.replica is not None and not link.is_retired for link in self._links):
                for link in self._links:
                    if link.replica is None:
                        self._retire(link)
        if all(link.is_retired for link in self._links):
            self._open(None, None, self._deadline.check(self._method.name))

    def _open_direct(self, pool: Pool, num_ready: int) -> None:
        num_going = sum(link.replica is not None and not link.is_retired for link in self._links)
        num_left = self._exchange.num_left()
        most = num_ready if num_left is None else min(num_ready, num_left)
        if most <= num_going:
            return
        left_s = self._deadline.check(self._method.name)
        # Few requests are spread evenly: the first stream must not take them all before the next one is open.
        share = None if num_left is None else math.ceil(num_left / most)
        used = {link.replica for link in self._links if link.replica is not None}
        for replica in pool.take_several(most - num_going, used):
            try:
                self._open(replica, share, left_s)
            except ValueError:  # its channel is being closed
                pool.give_back(replica, 0)
                pool.lost(replica)

    def _open(self, replica: Replica | None, window: int | None, left_s: float | None) -> None:
        caller, method, request_id = self._caller, self._method, new_request_id()
        ticket = b""
        metadata: Metadata = caller.metadata(request_id)
        if replica is None:
            open_stream = getattr(caller.connection.stub(method.stub), method.name)
        else:
            ticket, metadata = replica.show(method.stub, method.name, request_id)
            open_stream = replica.method(method.stub, method.name)
        link = _Link(self._exchange.open(window), request_id, replica, ticket)
        try:
            link.call = open_stream(
                self._sending(link), timeout=left_s, metadata=metadata, wait_for_ready=replica is None
            )
        except BaseException:
            self._exchange.close(link.connection)
            raise
        self._links.append(link)
        threading.Thread(target=self._read, args=(link,), name="trunkline-stream", daemon=True).start()

    def _retire(self, link: _Link) -> None:
        link.is_retired = True
        self._exchange.retire(link.connection)

    def _wake(self) -> None:
        self._events.put(None)

    # In gRPC's threads, one for each stream.

    def _sending(self, link: _Link) -> Iterator[Any]:
        """Make messages for one stream. An exception here would be lost: it is recorded."""
        num_sent = 0
        try:
            for seq, item in self._exchange.outgoing(link.connection):
                message = self._method.request(seq, item)
                self._count_rows(link, seq, self._method.num_rows(item))
                yield message
                num_sent += 1
            if self._exchange.may_end(link.connection):
                self._wake()
                yield self._method.end(num_sent)
        except WireError as error:
            self._exchange.fail(from_wire(error))
        except Exception as error:
            self._exchange.fail(error)
        finally:
            self._wake()

    # In the reading threads, one for each stream.

    def _read(self, link: _Link) -> None:
        error: TrunklineError | None = None
        is_broken = True
        try:
            for reply in link.call:
                kind = reply.WhichOneof("kind")
                if kind == "end":
                    break
                self._answer(link, reply, kind)
            if link.replica is not None and not link.is_retired and not self._exchange.is_answered:
                self._lose(link)  # it ended the stream early, and says nothing
        except grpc.RpcError as rpc_error:
            error = self._caller.error(rpc_error, link.request_id, link.replica)
            is_broken = self._note_failure(link, rpc_error, error)
        except TrunklineError as found:
            error, is_broken = found, False
        except Exception as other:
            self._exchange.fail(other)
        finally:
            self._exchange.close(link.connection)
            link.call.cancel()
            if link.replica is not None and self._pool is not None:
                self._pool.give_back(link.replica, sum(link.rows.values()))
            self._events.put(_Ended(link, error, is_broken))

    def _note_failure(self, link: _Link, rpc_error: grpc.RpcError, error: TrunklineError) -> bool:
        """Return whether another connection may go on where this one failed."""
        if link.is_given_up:
            return True
        if link.replica is None or self._pool is None:
            # Nobody here has cancelled it: a gateway that ends at once cancels what it is at.
            return is_retryable(error) or isinstance(error, CallCancelledError)
        if isinstance(error, OverloadedError):
            self._pool.lost(link.replica)
            return True
        return note_failure(self._pool, link.replica, link.ticket, rpc_error, error)

    def _lose(self, link: _Link) -> None:
        if link.replica is not None and self._pool is not None:
            self._pool.lost(link.replica)

    def _answer(self, link: _Link, reply: Any, kind: str | None) -> None:
        """Match a reply with its request. One that is to be sent again is not passed on."""
        exchange, seq = self._exchange, reply.seq
        if kind == "error":
            error = error_from_message(reply.error, link.request_id)
            attempt = exchange.count_attempt(seq) if self._method.retry_item(error) else 0
            delay_s = retry_delay(attempt, error.retry_delay_s)
            if 0 < attempt < MAX_BATCH_ATTEMPTS and self._deadline.allows(delay_s):
                self._count_rows(link, seq, 0)
                exchange.put_off(seq, delay_s)
                if error.code is ErrorCode.UNAVAILABLE:
                    self._lose(link)
                return
        elif kind != self._method.result:
            raise InternalError(
                f"the cluster answered with {kind!r}, not {self._method.result!r}", request_id=link.request_id
            )
        item = exchange.answered(seq, untaken=True)
        if item is None:
            raise InternalError(
                f"the cluster answered batch {seq}, which is not under way",
                hint="Run it again, and report this if it happens twice",
                request_id=link.request_id,
            )
        self._count_rows(link, seq, 0)
        link.has_answered = True
        if kind == "error":
            answer: Any = error
        else:
            name = self._method.result
            answer = reply.part(name) if isinstance(reply, Apart) else getattr(reply, name)
        self._events.put(_Answered(seq, item, answer))

    def _count_rows(self, link: _Link, seq: int, num_rows: int) -> None:
        """Note how many rows of a request are outstanding."""
        if link.replica is None or self._pool is None:
            return
        before = link.rows.pop(seq, 0)
        if num_rows:
            link.rows[seq] = num_rows
        self._pool.add_rows(link.replica, num_rows - before)
