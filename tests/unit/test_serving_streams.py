import asyncio

import pytest
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.v1 import dataset_pb2 as pb
from trunkline_wire.v1 import error_pb2
from trunkline_worker.serving.budget import ByteBudget
from trunkline_worker.serving.draining import Draining
from trunkline_worker.serving.streams import PATIENCE_S, Room, pipelined, until_room


def chunk(seq):
    return pb.UploadRowsRequest(seq=seq, chunk=pb.RowChunk())


def end(count, seq=99):
    return pb.UploadRowsRequest(seq=seq, end=error_pb2.EndOfStream(num_messages=count))


async def stream(*messages):
    for message in messages:
        yield message


def answer(requests, handle, window=2, draining=None, room=None):
    return pipelined(requests, handle, window=window, draining=draining or Draining(), room=room)


async def collect(messages, handle):
    return [reply async for reply in answer(stream(*messages), handle)]


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
        async for reply in answer(stream(*messages), number):
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

        async for reply in answer(stream(chunk(0), chunk(1), end(2)), handle):
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

        replies = answer(source(), handle, window=3)
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

        replies = answer(stream(chunk(0), chunk(1), chunk(2), end(3)), handle, window=3)
        assert await anext(replies) == 0
        for _ in range(20):
            await asyncio.sleep(0)
        await replies.aclose()
        return cancelled

    assert sorted(asyncio.run(run())) == [1, 2]


async def endless(first):
    """Send one message after another, the next one once the last was read, and then nothing, without an end."""
    for message in first:
        yield message
    await asyncio.Event().wait()


def test_a_server_that_ends_answers_what_it_has_read_and_reads_no_further():
    async def run():
        draining, gate = Draining(), asyncio.Event()

        async def handle(message):
            await gate.wait()
            return message.seq

        replies = answer(endless([chunk(0), chunk(1), chunk(2)]), handle, 2, draining)
        first = asyncio.ensure_future(anext(replies))
        for _ in range(20):
            await asyncio.sleep(0)
        draining.begin()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not first.done()
        gate.set()
        got = [await first]
        with pytest.raises(WireError, match="not answered") as caught:
            async for reply in replies:
                got.append(reply)
        assert caught.value.code is ErrorCode.UNAVAILABLE
        return got

    # The third was read too, but not begun: it is not answered, and sent elsewhere.
    assert sorted(asyncio.run(run())) == [0, 1]


def test_a_stream_that_was_read_whole_ends_well_though_the_server_ends():
    async def run():
        draining, gate = Draining(), asyncio.Event()

        async def handle(message):
            await gate.wait()
            return message.seq

        replies = answer(stream(chunk(0), end(1)), handle, 2, draining)
        first = asyncio.ensure_future(anext(replies))
        for _ in range(20):
            await asyncio.sleep(0)
        draining.begin()
        gate.set()
        return [await first] + [reply async for reply in replies]

    assert asyncio.run(run()) == [0]


def test_a_stream_that_comes_too_late_is_told_at_once():
    async def run():
        draining = Draining()
        draining.begin()
        async with asyncio.timeout(60):
            return [reply async for reply in answer(endless([]), number, 2, draining)]

    with pytest.raises(WireError) as caught:
        asyncio.run(run())
    assert caught.value.code is ErrorCode.UNAVAILABLE


def test_a_stream_that_has_ended_is_not_told_any_more():
    draining = Draining()
    with draining.watched(lambda: pytest.fail("told")):
        pass
    draining.begin()
    assert draining.begun


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def ack(seq, size=0):
    error = error_pb2.Error(message="x" * size)
    return pb.UploadRowsResponse(seq=seq, error=error)


def room_in(budget, sizes):
    return Room(lambda message: budget.reserve(sizes[message.seq]), lambda message, error: ack(message.seq, 1))


def test_while_a_message_waits_for_room_nothing_is_read():
    async def run():
        read, budget, gates = [], ByteBudget(100), [asyncio.Event() for _ in range(4)]

        async def source():
            for seq in range(4):
                read.append(seq)
                yield chunk(seq)
            yield end(4)

        async def handle(message):
            await gates[message.seq].wait()
            return ack(message.seq)

        replies = answer(source(), handle, 4, room=room_in(budget, [60, 60, 30, 30]))
        first = asyncio.ensure_future(anext(replies))
        await settle()
        assert (read, budget.held_bytes, budget.num_waiting) == ([0, 1], 60, 1)
        gates[0].set()
        assert (await first).seq == 0
        rest = asyncio.ensure_future(anext(replies))
        await settle()
        assert (read, budget.held_bytes) == ([0, 1, 2, 3], 60 + 30)
        for gate in gates:
            gate.set()
        got = [await rest] + [reply async for reply in replies]
        assert sorted(reply.seq for reply in got) == [1, 2, 3]
        assert (budget.held_bytes, budget.num_waiting) == (0, 0)

    asyncio.run(run())


def test_replies_that_nobody_takes_are_counted_and_bounded():
    async def run():
        budget, handled = ByteBudget(10_000), []

        async def handle(message):
            handled.append(message.seq)
            return ack(message.seq, 100)

        messages = [chunk(seq) for seq in range(50)]
        replies = answer(stream(*messages, end(50)), handle, 3, room=room_in(budget, [1000] * 50))
        first = asyncio.ensure_future(anext(replies))
        await settle()
        assert first.done()
        size = ack(1, 100).ByteSize()
        assert handled == [0, 1, 2]  # the first reply is being taken, and so still there
        assert 2 * size <= budget.held_bytes <= 3 * size
        await replies.aclose()
        assert budget.held_bytes == 0

    asyncio.run(run())


def test_a_message_that_finds_no_room_is_answered_with_that_and_the_stream_goes_on():
    async def run():
        budget = ByteBudget(100)
        got = [
            reply
            async for reply in answer(
                stream(chunk(0), chunk(1), end(2)), lambda message: handled(message), 2, room=room_in(budget, [101, 5])
            )
        ]
        assert [(reply.seq, reply.error.message) for reply in sorted(got, key=lambda one: one.seq)] == [
            (0, "x"),
            (1, ""),
        ]

    async def handled(message):
        return ack(message.seq)

    asyncio.run(run())


@pytest.mark.parametrize("let_in", [False, True])
def test_a_stream_that_breaks_off_gives_its_room_back(let_in):
    async def run():
        budget = ByteBudget(100)
        other = budget.hold(90)

        async def handle(message):
            await asyncio.Event().wait()

        replies = answer(endless([chunk(0), chunk(1)]), handle, 2, room=room_in(budget, [20, 20]))
        first = asyncio.ensure_future(anext(replies))
        await settle()
        assert budget.num_waiting == 1
        if let_in:
            other.release()
            await settle()
            assert budget.held_bytes == 40
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await replies.aclose()
        other.release()
        assert (budget.held_bytes, budget.num_waiting) == (0, 0)

    asyncio.run(run())


class Full:
    """A call that is told OVERLOADED so many times. Keeps the pauses between."""

    def __init__(self, times, delay_s=0.3):
        self.times, self.delay_s, self.pauses, self.left = times, delay_s, [], None

    async def __call__(self):
        if self.times:
            self.times -= 1
            raise WireError(ErrorCode.OVERLOADED, "full", retry_delay_s=self.delay_s)
        return "done"

    async def sleep(self, seconds):
        self.pauses.append(seconds)
        if self.left is not None:
            self.left -= seconds

    def left_s(self):
        if self.left is not None and self.left <= 0:
            raise WireError(ErrorCode.DEADLINE_EXCEEDED, "over")
        return self.left

    def run(self, draining=None):
        return asyncio.run(until_room(self, left_s=self.left_s, draining=draining or Draining(), sleep=self.sleep))


def test_a_call_that_is_told_to_come_back_does_so():
    call = Full(3)
    assert call.run() == "done"
    assert call.pauses == [0.3, 0.3, 0.3]


def test_pauses_grow_though_short_ones_were_asked_for():
    call = Full(20, 0.0)
    assert call.run() == "done"
    assert call.pauses == sorted(call.pauses)
    assert call.pauses[0] > 0
    assert call.pauses[-1] == 2.0


def test_waiting_ends_with_the_deadline():
    call = Full(1000)
    call.left = 1.0
    with pytest.raises(WireError) as caught:
        call.run()
    assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED
    assert sum(call.pauses) == pytest.approx(1.0)


def test_without_a_deadline_waiting_ends_too():
    call = Full(10_000)
    with pytest.raises(WireError) as caught:
        call.run()
    assert caught.value.code is ErrorCode.OVERLOADED
    assert PATIENCE_S <= sum(call.pauses) < PATIENCE_S + 3.0


def test_a_server_that_ends_waits_for_nothing():
    call, draining = Full(5), Draining()
    draining.begin()
    with pytest.raises(WireError) as caught:
        call.run(draining)
    assert caught.value.code is ErrorCode.OVERLOADED
    assert not call.pauses


def test_other_errors_are_not_tried_again():
    async def call():
        raise WireError(ErrorCode.NOT_FOUND, "no")

    with pytest.raises(WireError) as caught:
        asyncio.run(until_room(call, left_s=lambda: None, draining=Draining()))
    assert caught.value.code is ErrorCode.NOT_FOUND
