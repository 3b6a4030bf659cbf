"""The exchange that survives broken connections, without any connection."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline._calls.exchange import Exchange
from trunkline._deadline import LONGEST_DELAY_S, Deadline, retry_delay
from trunkline.errors import DeadlineExceededError


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_window_bounds_what_is_unanswered():
    pulled = []
    exchange = Exchange((pulled.append(n) or n for n in range(10)), window=3)
    outgoing = exchange.outgoing(exchange.open())
    sent = [next(outgoing) for _ in range(3)]
    assert sent == [(1, 0), (2, 1), (3, 2)] and pulled == [0, 1, 2]
    waiting = threading.Thread(target=lambda: sent.append(next(outgoing)), daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive() and len(pulled) == 3
    assert exchange.answered(2) == 1
    waiting.join(5)
    assert sent[-1] == (4, 3)


def test_unanswered_is_sent_again_with_new_numbers():
    exchange = Exchange(iter("abcd"), window=4)
    outgoing = exchange.outgoing(exchange.open())
    assert [next(outgoing) for _ in range(3)] == [(1, "a"), (2, "b"), (3, "c")]
    exchange.answered(2)
    exchange.close()
    assert next(outgoing, None) is None
    again = exchange.outgoing(exchange.open())
    assert [next(again) for _ in range(3)] == [(4, "a"), (5, "c"), (6, "d")]
    assert exchange.answered(1) is None
    assert [exchange.answered(seq) for seq in (4, 5, 6)] == ["a", "c", "d"]
    assert next(again, None) is None and exchange.finished


def test_put_off_waits_for_its_time():
    clock = Clock()
    exchange = Exchange(iter("ab"), window=4, clock=clock)
    outgoing = exchange.outgoing(exchange.open())
    assert [next(outgoing), next(outgoing)] == [(1, "a"), (2, "b")]
    assert exchange.count_attempt(1) == 1
    exchange.put_off(1, 5.0)
    assert exchange.answered(1) is None
    clock.now += 5.0
    assert next(outgoing) == (3, "a")
    assert exchange.count_attempt(3) == 2 and exchange.count_attempt(99) == 0


def test_failure_of_the_source_is_kept():
    def source():
        yield "a"
        raise ZeroDivisionError

    exchange = Exchange(source(), window=4)
    outgoing = exchange.outgoing(exchange.open())
    assert list(outgoing) == [(1, "a")]
    assert isinstance(exchange.failure, ZeroDivisionError) and not exchange.finished


def test_what_was_being_made_when_the_connection_broke_is_not_lost():
    making, go_on = threading.Event(), threading.Event()

    def source():
        making.set()
        go_on.wait(5)
        yield "a"

    exchange = Exchange(source(), window=4)
    first = exchange.open()
    sent = []
    thread = threading.Thread(target=lambda: sent.extend(exchange.outgoing(first)), daemon=True)
    thread.start()
    assert making.wait(5)
    exchange.close()
    second = exchange.open()
    go_on.set()
    thread.join(5)
    assert sent == [] and next(exchange.outgoing(second)) == (1, "a")


@given(
    count=st.integers(0, 12),
    window=st.integers(1, 5),
    script=st.lists(st.sampled_from(["answer", "refuse", "break", "drop"]), max_size=60),
)
def test_everything_is_answered_once_and_numbers_only_grow(count, window, script):
    """Whatever happens on the way, each item is answered exactly once in the end."""
    clock = Clock()
    exchange = Exchange(iter(range(count)), window, clock=clock)
    done, script = [], list(script)
    for _ in range(len(script) + 2):
        last, under_way = 0, []
        for seq, item in exchange.outgoing(exchange.open()):
            assert seq > last
            last = seq
            under_way.append((seq, item))
            assert len(exchange.pending()) <= window
            # Answer for as long as nothing else can be sent: the sender would wait for this very thread.
            broken = refused = False
            while under_way and not (broken or refused) and len(under_way) >= min(window, count - len(done)):
                action = script.pop(0) if script else "answer"
                seq, item = under_way.pop(0)
                if action == "break":
                    broken = True
                elif action == "refuse":
                    exchange.put_off(seq, 0.0)
                    refused = True
                elif action == "drop":
                    (key,) = [key for key, one in exchange.pending().items() if one == item]
                    exchange.drop(key)
                    done.append(item)
                else:
                    assert exchange.answered(seq) == item
                    done.append(item)
            if broken:
                break
        exchange.close()
        if exchange.finished:
            break
    assert sorted(done) == list(range(count)) and exchange.finished


def test_deadline():
    clock = Clock()
    deadline = Deadline(2.0, clock=clock)
    assert deadline.check() == 2.0 and deadline.allows(1.9) and not deadline.allows(2.0)
    clock.now += 2.5
    assert deadline.remaining() == 0.0
    with pytest.raises(DeadlineExceededError, match="during Predict"):
        deadline.check("Predict")
    assert Deadline(None).check() is None and Deadline(None).allows(1e9)


@given(attempt=st.integers(0, 10_000), asked=st.floats(0, 60), random=st.floats(0, 1))
def test_delays_are_bounded_and_never_shorter_than_asked(attempt, asked, random):
    assert asked < retry_delay(attempt, asked, random_float=lambda: random) <= asked + LONGEST_DELAY_S + 1e-9
