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
    waiting.join(60)
    assert sent[-1] == (4, 3)


def test_unanswered_is_sent_again_with_new_numbers():
    exchange = Exchange(iter("abcd"), window=4)
    first = exchange.open()
    outgoing = exchange.outgoing(first)
    assert [next(outgoing) for _ in range(3)] == [(1, "a"), (2, "b"), (3, "c")]
    exchange.answered(2)
    exchange.close(first)
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
        go_on.wait(60)
        yield "a"

    exchange = Exchange(source(), window=4)
    first = exchange.open()
    sent = []
    thread = threading.Thread(target=lambda: sent.extend(exchange.outgoing(first)), daemon=True)
    thread.start()
    assert making.wait(60)
    exchange.close(first)
    second = exchange.open()
    go_on.set()
    thread.join(60)
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
        connection = exchange.open()
        for seq, item in exchange.outgoing(connection):
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
        exchange.close(connection)
        if exchange.finished:
            break
    assert sorted(done) == list(range(count)) and exchange.finished


def take(outgoing, count):
    return [next(outgoing) for _ in range(count)]


class TestSeveralConnections:
    def test_whoever_has_room_takes_the_next(self):
        exchange = Exchange(iter(range(8)), window=2)
        slow, quick = exchange.outgoing(exchange.open()), exchange.outgoing(exchange.open())
        assert take(slow, 2) == [(1, 0), (2, 1)] and take(quick, 2) == [(3, 2), (4, 3)]
        for seq in (3, 4, 5, 6):
            exchange.answered(seq)
            assert next(quick) == (seq + 2, seq + 1)
        assert exchange.answered(1) == 0 and exchange.answered(2) == 1
        assert [exchange.answered(seq) for seq in (7, 8)] == [6, 7]
        assert next(slow, None) is None and next(quick, None) is None and exchange.finished

    def test_the_least_busy_of_those_who_wait_is_next(self):
        """The busy one fetches a request while the idle one waits for it: it goes to the idle one."""
        pulled, arrive, asked, got = threading.Event(), threading.Event(), threading.Event(), []

        def source():
            yield "a"
            pulled.set()
            arrive.wait(60)
            yield "b"

        def clock():
            if threading.current_thread().name == "idle":
                asked.set()
            return 0.0

        def run(connection):
            got.extend((connection, item) for _, item in exchange.outgoing(connection))

        exchange = Exchange(source(), window=3, clock=clock)
        busy, idle = exchange.open(), exchange.open()
        assert take(exchange.outgoing(busy), 1) == [(1, "a")]
        threads = [threading.Thread(target=run, args=(busy,), daemon=True)]
        threads[0].start()
        assert pulled.wait(60)
        threads.append(threading.Thread(target=run, args=(idle,), daemon=True, name="idle"))
        threads[1].start()
        assert asked.wait(60)
        with exchange._changed:  # the idle one has let go of it, and waits
            arrive.set()
        threads[0].join(0.1)
        assert exchange.answered(2) == "b" and exchange.answered(1) == "a"
        for thread in threads:
            thread.join(60)
        assert got == [(idle, "b")]

    def test_what_a_broken_one_leaves_is_sent_on_the_other(self):
        exchange = Exchange(iter("abcd"), window=2)
        one, two = exchange.open(), exchange.open()
        first, second = exchange.outgoing(one), exchange.outgoing(two)
        assert take(first, 2) == [(1, "a"), (2, "b")] and take(second, 1) == [(3, "c")]
        exchange.close(one)
        assert next(first, None) is None and exchange.answered(1) is None
        assert next(second) == (4, "a")
        assert exchange.answered(3) == "c" and next(second) == (5, "b")
        assert exchange.answered(4) == "a" and next(second) == (6, "d")
        assert [exchange.answered(seq) for seq in (5, 6)] == ["b", "d"]
        assert next(second, None) is None and exchange.may_end(two) and not exchange.may_end(one)

    def test_one_that_retires_finishes_what_it_has(self):
        exchange = Exchange(iter("abc"), window=2)
        one, two = exchange.open(), exchange.open()
        first, second = exchange.outgoing(one), exchange.outgoing(two)
        assert take(first, 1) == [(1, "a")]
        exchange.retire(one)
        assert take(second, 2) == [(2, "b"), (3, "c")]
        assert not exchange.may_end(one)
        assert exchange.answered(1) == "a" and next(first, None) is None and exchange.may_end(one)

    def test_what_one_refuses_the_other_takes_at_once(self):
        clock = Clock()
        exchange = Exchange(iter("abc"), window=2, clock=clock)
        one, two = exchange.open(), exchange.open()
        first, second = exchange.outgoing(one), exchange.outgoing(two)
        assert next(first) == (1, "a")
        assert exchange.count_attempt(1) == 1
        exchange.put_off(1, 5.0)
        got = []
        waiting = threading.Thread(target=lambda: got.append(next(first)), daemon=True)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        assert next(second) == (2, "a")
        assert exchange.count_attempt(2) == 1
        clock.now += 5.0
        exchange.put_off(2, 5.0)
        waiting.join(60)
        assert got == [(3, "a")] and exchange.count_attempt(3) == 2

    def test_answers_that_nobody_takes_count(self):
        pulled = []
        exchange = Exchange((pulled.append(n) or n for n in range(99)), window=1)
        connections = [exchange.open(), exchange.open()]
        one, two = map(exchange.outgoing, connections)
        for outgoing in (one, two):
            seq, _ = next(outgoing)
            exchange.answered(seq, untaken=True)
        waiting = threading.Thread(target=lambda: next(one), daemon=True)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive() and len(pulled) == 2 and not exchange.finished
        exchange.taken()
        waiting.join(60)
        assert len(pulled) == 3
        for connection in connections:
            exchange.close(connection)

    def test_says_what_is_left(self):
        exchange = Exchange(iter([1, 2, 3]), window=2)
        assert exchange.num_left() == 3
        outgoing = exchange.outgoing(exchange.open())
        exchange.answered(next(outgoing)[0])
        assert exchange.num_left() == 2
        assert Exchange((n for n in range(3)), window=2).num_left() is None

    def test_a_share_bounds_one_connection(self):
        exchange = Exchange(iter(range(4)), window=4)
        one, two = exchange.outgoing(exchange.open(2)), exchange.outgoing(exchange.open(9))
        assert take(one, 2) == [(1, 0), (2, 1)]
        waiting = threading.Thread(target=lambda: next(one, None), daemon=True)
        waiting.start()
        assert take(two, 2) == [(3, 2), (4, 3)]
        for seq in (1, 2, 3, 4):
            exchange.answered(seq)
        waiting.join(60)
        assert not waiting.is_alive() and exchange.finished


@given(
    count=st.integers(0, 30),
    window=st.integers(1, 4),
    script=st.lists(
        st.tuples(st.sampled_from(["answer", "refuse", "break", "retire", "open"]), st.integers(0, 9)), max_size=80
    ),
)
def test_however_many_connections_come_and_go_each_is_answered_once(count, window, script):
    """A model of several connections on one thread: what is sent where, and what becomes of it."""
    clock = Clock()
    exchange = Exchange(iter(range(count)), window, clock=clock)
    under_way, sent_on, done = {}, {}, []

    def can_send(one):
        """Whether a connection gets a request without waiting for this very thread."""
        has_room = not one.is_retired and len(one.keys) < one.window and clock.now >= one.paused_until_s
        return has_room and (exchange._resend or (exchange._last_key < count and exchange._may_pull()))

    def fill():
        """Let every connection take what it can get."""
        while able := [name for name, one in exchange._connections.items() if can_send(one)]:
            for other in exchange._connections.values():
                other.is_asking = False
            seq, item = exchange._next(able[0])
            assert seq > sent_on.get(able[0], 0)
            sent_on[able[0]] = seq
            under_way[seq] = (able[0], item)

    def leave(connection):
        exchange.close(connection)
        for seq in [seq for seq, (where, _) in under_way.items() if where == connection]:
            assert exchange.answered(seq) is None
            del under_way[seq]

    exchange.open()
    for action, which in [*script, *[("answer", 0)] * (2 * count + 2)]:
        if not exchange._num_open():
            exchange.open()
        fill()
        clock.now += 1.0
        assert all(len(one.keys) <= window for one in exchange._connections.values())
        connections = sorted(exchange._connections)
        if action == "open" and len(connections) < 4:
            exchange.open()
        elif action == "break":
            leave(connections[which % len(connections)])
        elif action == "retire":
            exchange.retire(connections[which % len(connections)])
        elif under_way:
            seq = sorted(under_way)[which % len(under_way)]
            connection, item = under_way.pop(seq)
            if action == "refuse":
                exchange.put_off(seq, 0.5)
            else:
                assert exchange.answered(seq) == item
                done.append(item)
    while not exchange.finished:
        connection = exchange.open()
        clock.now += 10.0
        for other in [one for one in exchange._connections if one != connection]:
            leave(other)
        for seq, item in exchange.outgoing(connection):
            assert exchange.answered(seq) == item
            done.append(item)
        exchange.close(connection)
    assert sorted(done) == list(range(count))


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
