import asyncio

import pytest
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.v1 import dataset_pb2 as pb
from trunkline_wire.v1 import error_pb2
from trunkline_worker.serving.streams import pipelined


def chunk(seq):
    return pb.UploadRowsRequest(seq=seq, chunk=pb.RowChunk())


def end(count, seq=99):
    return pb.UploadRowsRequest(seq=seq, end=error_pb2.EndOfStream(num_messages=count))


async def stream(*messages):
    for message in messages:
        yield message


async def collect(messages, handle, window=2):
    return [reply async for reply in pipelined(stream(*messages), handle, window=window)]


async def number(message):
    return message.seq


def test_every_message_is_answered():
    assert sorted(asyncio.run(collect([chunk(0), chunk(1), chunk(5), end(3)], number))) == [0, 1, 5]


def test_an_empty_stream_ends_well():
    assert asyncio.run(collect([end(0)], number)) == []


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([chunk(0)], "without its end message"),
        ([], "without its end message"),
        ([chunk(0), end(2)], "counts 2 messages; 1 arrived"),
        ([chunk(1), chunk(1), end(2)], "numbers must grow"),
        ([chunk(1), chunk(0), end(2)], "numbers must grow"),
        ([pb.UploadRowsRequest(seq=3), end(1)], "message 3 of the stream is empty"),
    ],
)
def test_a_stream_that_is_not_whole_is_refused_after_what_came_was_answered(messages, what):
    answered = []

    async def run():
        async for reply in pipelined(stream(*messages), number, window=2):
            answered.append(reply)

    with pytest.raises(WireError, match=what) as caught:
        asyncio.run(run())
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    good = [message.seq for message in messages if message.WhichOneof("kind") == "chunk"]
    assert answered == good[: len(answered)]


def test_a_slow_message_does_not_hold_up_the_next_one():
    async def run():
        gate = asyncio.Event()
        order = []

        async def handle(message):
            if message.seq == 0:
                await gate.wait()
            return message.seq

        async for reply in pipelined(stream(chunk(0), chunk(1), end(2)), handle, window=2):
            order.append(reply)
            gate.set()
        return order

    assert asyncio.run(run()) == [1, 0]


def test_reading_stops_while_the_window_is_full():
    async def run():
        read, running, most = [], 0, 0
        gates = [asyncio.Event() for _ in range(6)]

        async def source():
            for seq in range(6):
                read.append(seq)
                yield chunk(seq)
            yield end(6)

        async def handle(message):
            nonlocal running, most
            running += 1
            most = max(most, running)
            await gates[message.seq].wait()
            running -= 1
            return message.seq

        replies = pipelined(source(), handle, window=3)
        first = asyncio.ensure_future(anext(replies))
        for _ in range(50):
            await asyncio.sleep(0)
        # Three are worked on; the fourth has been read and waits for a slot.
        assert read == [0, 1, 2, 3]
        for gate in gates:
            gate.set()
        got = [await first] + [reply async for reply in replies]
        assert sorted(got) == list(range(6))
        return most

    assert asyncio.run(run()) == 3


def test_leaving_early_cancels_what_is_in_flight():
    async def run():
        cancelled = []

        async def handle(message):
            if message.seq == 0:
                return 0
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(message.seq)
                raise

        replies = pipelined(stream(chunk(0), chunk(1), chunk(2), end(3)), handle, window=3)
        assert await anext(replies) == 0
        for _ in range(20):
            await asyncio.sleep(0)
        await replies.aclose()
        return cancelled

    assert sorted(asyncio.run(run())) == [1, 2]
