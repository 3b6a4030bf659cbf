"""The replicas of one backbone: which are ready, which has the least to do, and when to ask for them anew."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Sequence

from trunkline_wire.specs import Endpoint, Endpoints

from trunkline._direct.replica import Replica

MAX_REPLICAS = 16
"""Most replicas that one client talks to, chosen at random where there are more."""

REFRESH_AFTER = 2 / 3
"""Which part of a ticket's time passes before another one is asked for ..."""

REFRESH_S = 0.5
"""... and how long at least, in seconds."""

CONNECT_S = 3.0
"""How long a replica may take to be reached, in seconds."""

UNREACHABLE_REST_S = 120.0
"""How long one that was not is left alone, in seconds."""

LOST_REST_S = 5.0
"""How long one whose connection broke, or that sent a call away, is left alone, in seconds."""

FIRST_PAUSE_S = 1.0
"""After something went wrong it is asked at once, then after this many seconds, then after twice as many ..."""

NONE_AGAIN_S = 30.0
"""When to ask again where no replica listens or nobody answered, in seconds."""

IDLE_S = 60.0
"""How long after the last call connections are kept, in seconds."""

CLOSE_AGAIN_S = 2.0
"""How often it is looked whether the last call to a replica that was left has ended, in seconds."""

Opener = Callable[[Endpoint, Endpoints], Replica]


class Pool:
    """The replicas of a backbone that this client knows. Used from many threads."""

    def __init__(
        self,
        backbone: str,
        *,
        clock: Callable[[], float],
        random_float: Callable[[], float],
        on_due: Callable[[], None] = lambda: None,
    ) -> None:
        """Start with none.

        Args:
            backbone: Its name.
            clock: Monotonic clock.
            random_float: Draws from 0 to 1.
            on_due: Called where ``due_s`` has come nearer.
        """
        self.backbone = backbone
        self.why = "they were not asked for yet"
        self.num_listed = 0
        self._clock = clock
        self._random_float = random_float
        self._on_due = on_due
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._replicas: dict[Endpoint, Replica] = {}
        self._ready: tuple[Replica, ...] = ()
        self._left: list[Replica] = []
        self._close_s = math.inf
        self._rests: dict[Endpoint, float] = {}
        self._watchers: list[Callable[[], None]] = []
        self._used_s = clock()
        self._expires_s = 0.0
        self._ask_s = self._used_s
        self._pause_s = math.inf
        self._is_asked = False

    # For calls: quick, and never waiting for the network.

    def take(self, num_rows: int, avoid: Collection[Replica] = ()) -> Replica | None:
        """Return the ready replica with the fewest rows outstanding, these now among them. None: use the gateway.

        Args:
            num_rows: Rows of the call. ``give_back`` takes them off again.
            avoid: Not one of these.
        """
        now = self._used_s = self._clock()
        ready = self._ready
        if not ready or now >= self._expires_s:
            return None
        with self._lock:
            # Equal ones are taken in turns, starting anywhere: clients must not all begin with the same one.
            best, turn = None, int(self._random_float() * len(ready))
            for one in ready[turn:] + ready[:turn]:
                if (best is None or one.outstanding < best.outstanding) and one not in avoid:
                    best = one
            if best is not None:
                best.outstanding += num_rows
                best.num_calls += 1
            return best

    def take_several(self, most: int, avoid: Collection[Replica]) -> list[Replica]:
        """As ``take`` for streams, which have sent no rows yet: up to so many replicas."""
        taken: list[Replica] = []
        while len(taken) < most and (one := self.take(0, [*avoid, *taken])) is not None:
            taken.append(one)
        return taken

    def give_back(self, replica: Replica, num_rows: int) -> None:
        """Note that a call has ended, with so many rows of it outstanding until now."""
        with self._lock:
            replica.outstanding -= num_rows
            replica.num_calls -= 1

    def add_rows(self, replica: Replica, num_rows: int) -> None:
        """Note rows that were sent on a stream, or, as a negative number, that were answered."""
        with self._lock:
            replica.outstanding += num_rows

    def lost(self, replica: Replica) -> None:
        """Note that a replica sent a call away, or that its connection broke: others are used until it has rested."""
        if self._leave(replica, LOST_REST_S):
            with self._lock:
                self._hurry()
            self._count()
            self._on_due()

    def refused(self, replica: Replica, ticket: bytes) -> None:
        """Note that a replica did not accept a ticket: it is used again once it can be shown another one."""
        with self._lock:
            if replica.ticket != ticket:
                return
            replica.is_shut = True
            self._hurry()
        self._count()
        self._on_due()

    def ready(self) -> tuple[Replica, ...]:
        """Return the replicas that can be used now."""
        return self._ready if self._clock() < self._expires_s else ()

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call ``on_change``, from any thread, when other replicas are ready. Keeps the pool in use."""
        with self._lock:
            self._watchers.append(on_change)

    def unwatch(self, on_change: Callable[[], None]) -> None:
        """Call it no more."""
        self._used_s = self._clock()
        with self._lock:
            self._watchers.remove(on_change)

    def wait(self, until: Callable[[Pool], bool], timeout_s: float) -> bool:
        """Wait until something holds of this pool, and return whether it does. For those who have time."""
        with self._changed:
            return self._changed.wait_for(lambda: until(self), timeout_s)

    @property
    def num_ready(self) -> int:
        """How many replicas can be used."""
        return len(self._ready)

    @property
    def is_settled(self) -> bool:
        """Whether it is known of each replica if it can be reached."""
        return self._is_asked and all(one.is_connected for one in self._replicas.values())

    # For the keeper, on its thread.

    def due_s(self) -> float:
        """Return when ``sweep`` is wanted next, or another answer."""
        with self._lock:
            return min(self._ask_s, self._close_s)

    def wants_answer(self) -> bool:
        """Whether the gateway is to be asked now."""
        return self._clock() >= self._ask_s

    def is_idle(self) -> bool:
        """Whether nobody has used it for long."""
        with self._lock:
            return not self._watchers and self._clock() - self._used_s > IDLE_S

    def learn(
        self, endpoints: Endpoints, asked_s: float, open_replica: Opener, *, num_refused: int = 0, why: str = ""
    ) -> None:
        """Take an answer: show its ticket, leave replicas that are gone, open those that are new.

        Args:
            endpoints: The answer, without those that must not be used.
            asked_s: When it was asked for: the ticket's time counts from there.
            open_replica: Opens one.
            num_refused: How many these are.
            why: Why one of them is left out.
        """
        now = self._clock()
        with self._lock:
            listed = self._choose(endpoints.endpoints)
            gone = [one for one in self._replicas.values() if one.endpoint not in listed]
            self._rests = {one: until for one, until in self._rests.items() if until > now and one in listed}
            new = [one for one in listed if one not in self._replicas and one not in self._rests]
        for replica in gone:
            self._leave(replica, 0.0)
        opened = [open_replica(one, endpoints) for one in new]
        with self._lock:
            for one in self._replicas.values():
                one.renew(endpoints.ticket, endpoints.key)
            self._replicas.update({one.endpoint: one for one in opened})
            self._expires_s = asked_s + endpoints.valid_s
            self._schedule(max(REFRESH_S, REFRESH_AFTER * endpoints.valid_s) if listed else NONE_AGAIN_S)
            self.num_listed = len(listed) + num_refused
            self.why = why or ("" if listed else "no replica listens itself")
            self._is_asked = True
        self._count()
        for one in opened:
            one.connect(CONNECT_S, self._on_outcome)

    def unanswered(self, why: str, again_s: float = NONE_AGAIN_S) -> None:
        """Note that nobody could say. What is known is used until its ticket ends."""
        with self._lock:
            self.why = why
            self._is_asked = True
            self._schedule(again_s)
        self._count()

    def sweep(self) -> None:
        """Close what was left and is not called any more."""
        with self._lock:
            done = [one for one in self._left if not one.num_calls]
            self._left = [one for one in self._left if one.num_calls]
            self._close_s = self._clock() + CLOSE_AGAIN_S if self._left else math.inf
        for replica in done:
            replica.close()

    def close(self) -> None:
        """Leave every replica for good, and close the channels. What is under way there ends."""
        with self._lock:
            replicas = list(self._replicas.values())
        for one in replicas:
            self._leave(one, 0.0)
        self._count()
        with self._lock:
            left, self._left = self._left, []
        for one in left:
            one.close()

    def _leave(self, replica: Replica, rest_s: float) -> bool:
        """Use a replica no more. What is under way there goes on. Returns whether it was in use."""
        now = self._clock()
        with self._lock:
            if self._replicas.get(replica.endpoint) is not replica:
                return False
            del self._replicas[replica.endpoint]
            if rest_s:
                self._rests[replica.endpoint] = now + rest_s
            replica.is_connected = False
            self._left.append(replica)
            self._close_s = now
        return True

    def _on_outcome(self, replica: Replica, why_not: str) -> None:
        """Use a replica that was reached, leave one that was not."""
        if not why_not:
            with self._lock:
                replica.is_connected = self._replicas.get(replica.endpoint) is replica
        elif self._leave(replica, UNREACHABLE_REST_S):
            self.why = why_not
            self._on_due()
        self._count()

    def _choose(self, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        """Keep to replicas that are in use, and draw the others where there are too many."""
        if len(endpoints) <= MAX_REPLICAS:
            return list(dict.fromkeys(endpoints))
        order = sorted(set(endpoints), key=lambda one: (one not in self._replicas, self._random_float()))
        return order[:MAX_REPLICAS]

    def _schedule(self, usual_s: float) -> None:
        now = self._clock()
        if self._pause_s < usual_s:
            self._ask_s = now + self._pause_s
            self._pause_s *= 2
        else:
            self._ask_s = now + usual_s
            self._pause_s = math.inf

    def _hurry(self) -> None:
        """Ask soon. While that is done already, the next time it is asked stays as planned."""
        if self._pause_s == math.inf:
            self._pause_s = FIRST_PAUSE_S
            self._ask_s = self._clock()

    def _count(self) -> None:
        """Find out which replicas are ready, and tell those who watch."""
        with self._changed:
            before = self._ready
            self._ready = tuple(one for one in self._replicas.values() if one.is_connected and not one.is_shut)
            watchers = tuple(self._watchers) if self._ready != before else ()
            self._changed.notify_all()
        for on_change in watchers:
            on_change()
