"""Clients that flood, stall, vanish or lie, against the real gateway and batcher: others go on, memory is bounded."""

import asyncio
import itertools
import signal
import subprocess
import sys
import threading
import time

import contract_gateway as gateways
import fake_backbone
import grpc
import numpy as np
import pytest
from trunkline_wire import codecs, messages
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_BATCH_ROWS
from trunkline_wire.v1 import error_pb2, inference_pb2_grpc, tensor_pb2
from trunkline_wire.v1 import inference_pb2 as pb
from trunkline_worker.engine.api import EngineStats, Extraction
from trunkline_worker.engine.batcher import Batcher, PartResult, Rows
from trunkline_worker.serving.servicers.inference import STREAM_WINDOW
from trunkline_worker.store.clock import SystemClock

SPEC = fake_backbone.spec()
SPACE = SPEC.space(SPEC.cut("input"))
SIZE = fake_backbone.INPUT_SIZE
BATCH_ROWS = 32
MAX_QUEUED_ROWS = 4 * MAX_BATCH_ROWS
USER = (("authorization", f"Bearer {gateways.TOKEN}"),)
PATIENCE_S = 60


class BatchedEngine(gateways.FakeEngine):
    """The fake backbone behind a real batcher. ``free`` lets batches run; ``refusals`` answers OVERLOADED first."""

    def __init__(self, *args):
        super().__init__(*args)
        self.free = asyncio.Event()
        self.free.set()
        self.refusals = 0
        self.calls = 0
        self.batches = []
        self.batcher = Batcher(
            self._run, clock=SystemClock(), max_rows=lambda _key: BATCH_ROWS, max_queued_rows=MAX_QUEUED_ROWS
        )
        self.batcher.start()

    async def extract(self, space, rows, slices=(), *, timeout_s=None, caller="", wait=False):
        self.calls += 1
        if self.refusals:
            self.refusals -= 1
            raise WireError(ErrorCode.OVERLOADED, "full", retry_delay_s=0.01)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if wait:
            hold = await self.batcher.hold_in_turn(len(rows), rows.nbytes, caller=caller, deadline=deadline)
        else:
            hold = self.batcher.hold(len(rows), rows.nbytes, caller=caller)
        with hold:
            result = await self.batcher.submit(
                "input", Rows(rows), (space, slices, caller), deadline=deadline, hold=hold
            )
        return Extraction(result.values, fake_backbone.columns(slices)[1])

    async def stats(self):
        return EngineStats(0, 0, 0, self.batcher.queued_rows)

    async def _run(self, _key, parts):
        self.batches.append([part.context[2] for part in parts])
        await self.free.wait()
        return [PartResult(fake_backbone.embed(space, rows.features, slices)[0]) for rows, (space, slices, _) in parts]


@pytest.fixture
def gateway(tmp_path):
    """A gateway over the batched engine; nothing may be left in it."""
    with gateways.Gateway(tmp_path, BatchedEngine) as running:
        running.engine = running.engines[fake_backbone.NAME]
        yield running
        set_free(running)
        eventually(lambda: (running.budget.held_bytes, running.budget.num_held) == (0, 0))
        eventually(lambda: (running.engine.batcher.queued_rows, running.engine.batcher.queued_bytes) == (0, 0))


@pytest.fixture
def connect(gateway):
    """Connect to it; each time a connection of its own."""
    channels = []

    def make():
        channels.append(grpc.insecure_channel(gateway.address, options=[("grpc.use_local_subchannel_pool", 1)]))
        return inference_pb2_grpc.InferenceServiceStub(channels[-1])

    yield make
    for channel in channels:
        channel.close()


def eventually(condition):
    """Wait for what another thread is about to bring about."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        threading.Event().wait(0.005)


def set_free(gateway, free=True):
    async def switch():
        if free:
            gateway.engine.free.set()
        else:
            gateway.engine.free.clear()

    gateway.run(switch())


def pictures(count, first=0):
    """Return rows that all differ."""
    numbers = np.arange(first, first + count)
    rows = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    rows[:, 0, 0] = (numbers[:, None] >> np.array([0, 8, 16])) & 255
    return rows


def request(rows, **fields):
    return pb.ExtractRequest(space=messages.space_to_proto(SPACE), features=codecs.encode_rows(rows), **fields)


def values(reply):
    assert not reply.row_errors
    return np.frombuffer(reply.embedding.data, "<f4").reshape(tuple(reply.embedding.shape))


def right(rows):
    return fake_backbone.embed(SPACE, rows)[0]


def works(stub, number=7):
    """Whether a call of another client is answered, and rightly."""
    rows = pictures(1, number)
    np.testing.assert_array_equal(values(stub.Extract(request(rows), metadata=USER, timeout=PATIENCE_S)), right(rows))
    return True


def refused(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def end(count):
    return pb.StreamExtractRequest(seq=count, end=error_pb2.EndOfStream(num_messages=count))


class Sender:
    """Sends the same rows again and again, ``count`` times or for ever, and knows how often it did."""

    def __init__(self, rows, count=None, **fields):
        self.sent = 0
        self._extract = request(rows, **fields)
        self._count = count

    def __iter__(self):
        for seq in itertools.count() if self._count is None else range(self._count):
            yield pb.StreamExtractRequest(seq=seq, extract=self._extract)
            self.sent += 1
        yield end(self._count)


@pytest.mark.parametrize("read", [0, 3], ids=["never reads", "stops reading"])
def test_a_client_that_does_not_read_fills_a_window_and_no_more(gateway, connect, read):
    rows = pictures(MAX_BATCH_ROWS)  # replies of 240 KiB, so that they do not fit what lies between
    sender = Sender(rows)
    stalled = connect().StreamExtract(iter(sender), metadata=USER)
    for _ in range(read):
        next(stalled)
    other, full = connect(), STREAM_WINDOW * (right(rows).nbytes + 1000)
    settled, before, stop = 0, -1, time.monotonic() + PATIENCE_S
    # Once what lies between is full, a window of replies waits, and no more is taken in, whatever else goes on.
    while settled < 20:
        assert works(other)
        assert gateway.budget.num_held <= STREAM_WINDOW
        is_full = gateway.budget.num_held == STREAM_WINDOW and gateway.budget.held_bytes < full
        settled = settled + 1 if is_full and sender.sent == before else 0
        before = sender.sent
        assert time.monotonic() < stop, "it takes more and more"
    assert gateway.engine.batcher.queued_rows == 0
    stalled.cancel()


def test_a_slow_reader_gets_everything_and_holds_up_nobody(gateway, connect):
    rows = pictures(1000)
    replies, other, most = connect().StreamExtract(iter(Sender(rows, 40)), metadata=USER), connect(), 0
    expected = right(rows)
    for count, reply in enumerate(replies):
        if reply.WhichOneof("kind") == "end":
            assert (count, reply.end.num_messages) == (40, 40)
            break
        np.testing.assert_array_equal(values(reply.result), expected)
        assert works(other)
        most = max(most, gateway.budget.num_held)
    assert 0 < most <= STREAM_WINDOW


VANISHING = """
import sys, grpc
from trunkline_wire.v1 import inference_pb2 as pb, inference_pb2_grpc
address, token, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
extract = pb.ExtractRequest.FromString(sys.stdin.buffer.read())
def requests():
    for seq in range(count):
        yield pb.StreamExtractRequest(seq=seq, extract=extract)
    print("sent", flush=True)
    import threading
    threading.Event().wait()
stub = inference_pb2_grpc.InferenceServiceStub(grpc.insecure_channel(address))
list(stub.StreamExtract(requests(), metadata=[("authorization", f"Bearer {token}")]))
"""


def test_the_rows_of_a_client_that_vanishes_leave_the_line(gateway, connect):
    other = connect()
    set_free(gateway, False)
    first = other.Extract.future(request(pictures(1)), metadata=USER)
    eventually(lambda: gateway.engine.batches)
    command = [sys.executable, "-c", VANISHING, gateway.address, gateway.token, str(STREAM_WINDOW)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdin.write(request(pictures(1000)).SerializeToString())
        process.stdin.close()
        assert process.stdout.readline() == b"sent\n"
        eventually(lambda: gateway.engine.batcher.queued_rows == 1000 * STREAM_WINDOW)
        assert gateway.budget.held_bytes > 1000 * STREAM_WINDOW * SIZE * SIZE * 3
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        process.stdout.close()
    # The device has done nothing meanwhile: they leave because nobody wants them any more.
    eventually(lambda: gateway.engine.batcher.queued_rows == 0)
    eventually(lambda: gateway.budget.num_held == 1)
    set_free(gateway)
    assert first.result(timeout=PATIENCE_S)
    assert works(other)


def test_ten_thousand_tiny_calls_are_all_answered_rightly(gateway):
    count, connections, at_a_time = 10_000, 4, 48
    most = 0

    async def main():
        numbers = iter(range(count))
        answers = np.zeros((count, right(pictures(1)).shape[1]), np.float32)

        async def caller(stub):
            nonlocal most
            for number in numbers:
                reply = await stub.Extract(request(pictures(1, number)), metadata=USER, timeout=PATIENCE_S)
                answers[number] = values(reply)[0]
                most = max(most, gateway.engine.batcher.queued_rows)

        async with asyncio.timeout(300):
            options = [("grpc.use_local_subchannel_pool", 1)]
            channels = [grpc.aio.insecure_channel(gateway.address, options=options) for _ in range(connections)]
            stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
            await asyncio.gather(*(caller(stub) for stub in stubs for _ in range(at_a_time)))
            for channel in channels:
                await channel.close()
        return answers

    np.testing.assert_array_equal(asyncio.run(main()), right(pictures(count)))
    assert most <= connections * at_a_time
    assert sum(map(len, gateway.engine.batches)) == count
    assert len(gateway.engine.batches) < count


def claimed():
    """Return rows by name only: a million of them in a few bytes."""
    return tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_UINT8, codec=tensor_pb2.CODEC_RAW, data=b"\0" * 100)


def really_there():
    """Return a million rows, of a byte each."""
    return tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_UINT8, codec=tensor_pb2.CODEC_RAW, data=b"\0" * 1_000_000)


def files():
    """Return a million files, all empty."""
    return tensor_pb2.Tensor(
        data_type=tensor_pb2.DATA_TYPE_UINT8, codec=tensor_pb2.CODEC_ENCODED_IMAGES, encoded=[b""] * 1_000_000
    )


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [(claimed, (1_000_000, SIZE, SIZE, 3)), (really_there, (1_000_000, 1)), (files, (1_000_000,))],
    ids=["claimed", "really there", "files"],
)
def test_a_million_rows_in_one_call_are_refused_before_they_are_decoded(gateway, connect, tensor, shape):
    message = tensor()
    message.shape.extend(shape)
    stub = connect()
    huge = pb.ExtractRequest(space=messages.space_to_proto(SPACE), features=message)
    error = refused(lambda: stub.Extract(huge, metadata=USER, timeout=PATIENCE_S))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "[PAYLOAD_TOO_LARGE] 1000000 rows in one message; at most 4096" in error.details()
    assert gateway.engine.calls == 0
    stream = stub.StreamExtract(
        iter([pb.StreamExtractRequest(seq=0, extract=huge), end(1)]), metadata=USER, timeout=PATIENCE_S
    )
    reply, last = list(stream)
    assert reply.error.code == error_pb2.ERROR_CODE_PAYLOAD_TOO_LARGE
    assert last.end.num_messages == 1
    assert works(stub)


def test_a_flooding_client_does_not_starve_another_of_the_same_tenant(gateway, connect):
    flooder, other = connect(), connect()
    set_free(gateway, False)
    # More than the line holds: what does not fit waits, and is not refused.
    streams = [flooder.StreamExtract(iter(Sender(pictures(1000), 6)), metadata=USER) for _ in range(4)]
    full = MAX_QUEUED_ROWS // 1000 * 1000 - BATCH_ROWS  # of the messages that fit, one batch is under way
    eventually(lambda: gateway.engine.batcher.queued_rows == full)
    small = other.Extract.future(request(pictures(3, 50)), metadata=USER, timeout=PATIENCE_S)
    eventually(lambda: gateway.engine.batcher.queued_rows == full + 3)
    # The next batch takes rows of both.
    seen = len(gateway.engine.batches)
    set_free(gateway)
    np.testing.assert_array_equal(values(small.result(timeout=PATIENCE_S)), right(pictures(3, 50)))
    assert len({caller for batch in gateway.engine.batches[seen : seen + 2] for caller in batch}) == 2
    expected = right(pictures(1000))
    for stream in streams:
        *replies, last = stream
        assert last.end.num_messages == len(replies) == 6
        for reply in replies:
            np.testing.assert_array_equal(values(reply.result), expected)


def test_a_full_line_refuses_single_calls_and_holds_streams_back(gateway, connect):
    streaming, calling = connect(), connect()
    set_free(gateway, False)
    stream = streaming.StreamExtract(iter(Sender(pictures(MAX_BATCH_ROWS), 12)), metadata=USER)
    eventually(lambda: gateway.engine.batcher.queued_rows > MAX_QUEUED_ROWS - MAX_BATCH_ROWS)
    error = refused(lambda: calling.Extract(request(pictures(2000)), metadata=USER, timeout=PATIENCE_S))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "[OVERLOADED]" in error.details()
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"]
    set_free(gateway)
    *replies, last = stream
    assert last.end.num_messages == 12
    assert [reply.WhichOneof("kind") for reply in replies] == ["result"] * 12


def test_streams_wait_for_memory_and_single_calls_are_told_when_to_come_back(gateway, connect):
    rows = pictures(100)
    gateway.budget.limit = 2 * Sender(rows)._extract.ByteSize()
    set_free(gateway, False)
    streams = [connect().StreamExtract(iter(Sender(rows, 5)), metadata=USER) for _ in range(3)]
    eventually(lambda: gateway.budget.num_waiting == 3)
    assert gateway.budget.num_held == 1  # a message of a stream is a little larger than what is in it
    error = refused(lambda: connect().Extract(request(rows), metadata=USER, timeout=PATIENCE_S))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    set_free(gateway)
    for stream in streams:
        assert [reply.WhichOneof("kind") for reply in stream] == ["result"] * 5 + ["end"]


def test_a_stream_does_not_see_that_an_engine_elsewhere_is_full(gateway, connect):
    gateway.engine.refusals = 5
    stub, rows = connect(), pictures(2)
    replies = list(stub.StreamExtract(iter(Sender(rows, 2)), metadata=USER))
    assert [reply.WhichOneof("kind") for reply in replies] == ["result", "result", "end"]
    assert gateway.engine.calls == 7
    gateway.engine.refusals = 1
    error = refused(lambda: stub.Extract(request(rows), metadata=USER))
    assert ("grpc-retry-pushback-ms", "10") in [tuple(one) for one in error.trailing_metadata()]


@pytest.mark.parametrize("where", ["line", "elsewhere", "memory"])
def test_a_message_waits_for_room_no_longer_than_it_says(gateway, connect, where):
    stub = connect()
    sender = Sender(pictures(300), 1, timeout_s=0.3)  # who needs little would be let in beyond the limit
    if where == "elsewhere":
        gateway.engine.refusals = 10**9
    elif where == "memory":
        gateway.budget.limit = sender._extract.ByteSize() + 100
    if where != "elsewhere":
        set_free(gateway, False)
        many = request(pictures(300 if where == "memory" else MAX_BATCH_ROWS))
        held = [connect().Extract.future(many, metadata=USER) for _ in range(1 if where == "memory" else 5)]
        rows = 300 if where == "memory" else MAX_QUEUED_ROWS
        eventually(lambda: gateway.engine.batches and gateway.engine.batcher.queued_rows == rows - BATCH_ROWS)
    reply, last = list(stub.StreamExtract(iter(sender), metadata=USER))
    assert reply.error.code == error_pb2.ERROR_CODE_DEADLINE_EXCEEDED
    assert last.end.num_messages == 1
    if where != "elsewhere":
        set_free(gateway)
        assert any(call.exception(timeout=PATIENCE_S) is None for call in held)
    gateway.engine.refusals = 0
