"""The thread that asks for endpoints, connects and closes, so that no call has to."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import count

from trunkline_wire.specs import Endpoint, Endpoints

from trunkline._channel import forget_in_children, open_direct_channel
from trunkline._direct.admission import refusal
from trunkline._direct.pool import Pool
from trunkline._direct.replica import Replica
from trunkline.config import Settings
from trunkline.errors import TrunklineError, UnsupportedError

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 2.0
"""How long the gateway may take to say where replicas are, in seconds."""

OLD_AGAIN_S = 600.0
"""When a cluster that does not know the question is asked again, in seconds: it may have been upgraded."""


@dataclass(frozen=True)
class Reach:
    """How many of a backbone's replicas can be reached, and why not all or none."""

    num_listed: int
    num_ready: int
    why: str


class Direct:
    """The direct connections of a client, by backbone. Used from many threads."""

    def __init__(
        self,
        settings: Settings,
        ask: Callable[[str, float], Endpoints],
        *,
        clock: Callable[[], float] = time.monotonic,
        random_float: Callable[[], float] = random.random,
    ) -> None:
        """Open nothing yet.

        Args:
            settings: Of the connection to the gateway.
            ask: Asks the gateway for the endpoints of a backbone, within so many seconds.
            clock: Monotonic clock.
            random_float: Draws from 0 to 1.
        """
        self._settings = settings
        self._ask = ask
        self._clock = clock
        self._random_float = random_float
        self._numbers: defaultdict[str, Iterator[int]] = defaultdict(lambda: count(1))
        self._left_behind: list[object] = []
        self._start_afresh()
        forget_in_children(self)

    def _start_afresh(self) -> None:
        self._wake = threading.Condition(threading.Lock())
        self._pools: dict[str, Pool] = {}
        self._called_once: set[str] = set()
        self._thread: threading.Thread | None = None
        self._is_closed = not self._settings.direct

    def take(self, backbone: str, num_rows: int, avoid: Collection[Replica] = ()) -> tuple[Pool, Replica] | None:
        """Return the replica that one call should go to, as ``Pool.take`` does. None: through the gateway.

        The first call of all starts nothing: connections are for those who come back.
        """
        pool = self._pools.get(backbone)
        if pool is None:
            if self._is_closed:
                return None
            if backbone in self._called_once:
                self.pool(backbone)
            else:
                self._called_once.add(backbone)
            return None
        replica = pool.take(num_rows, avoid)
        return None if replica is None else (pool, replica)

    def pool(self, backbone: str) -> Pool | None:
        """Return the replicas of a backbone, asked for from now on. None where none are to be used."""
        with self._wake:
            if self._is_closed or not backbone:
                return None
            pool = self._pools.get(backbone)
            if pool is None:
                pool = Pool(backbone, clock=self._clock, random_float=self._random_float, on_due=self._on_due)
                # Replaced, not changed: calls read it without the lock.
                self._pools = {**self._pools, backbone: pool}
                self._wake.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep, name="trunkline-direct", daemon=True)
                self._thread.start()
            return pool

    def reach(self, backbone: str, timeout_s: float) -> Reach:
        """Connect to the replicas of a backbone, wait for that, and return how it went."""
        pool = self.pool(backbone)
        if pool is None:
            return Reach(0, 0, "switched off")
        pool.wait(lambda one: one.is_settled, timeout_s)
        return Reach(pool.num_listed, pool.num_ready, pool.why)

    def close(self) -> None:
        """Use no replica any more, and close the connections."""
        with self._wake:
            self._is_closed = True
            self._wake.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait until everything is closed. Only after ``close``."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def forget_after_fork(self) -> None:
        """Let go of the parent's connections in a child: their threads are not here, so they cannot even be closed."""
        was_closed = self._is_closed
        self._left_behind.append(self._pools)
        self._start_afresh()
        self._is_closed = was_closed

    def _on_due(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _keep(self) -> None:
        while True:
            with self._wake:
                pools = list(self._pools.values())
                if self._is_closed:
                    self._pools = {}
                    break
                if not pools:
                    self._thread = None
                    return
                left = min(one.due_s() for one in pools) - self._clock()
                if left > 0:
                    self._wake.wait(left)
                    continue
            for pool in pools:
                self._visit(pool)
        for pool in pools:
            pool.close()

    def _visit(self, pool: Pool) -> None:
        pool.sweep()
        if not pool.wants_answer():
            return
        if pool.is_idle():
            with self._wake:
                self._pools = {name: one for name, one in self._pools.items() if one is not pool}
            pool.close()
            return
        asked_s = self._clock()
        try:
            endpoints = self._ask(pool.backbone, ASK_TIMEOUT_S)
            refusals = {one: refusal(one, endpoints, self._settings) for one in endpoints.endpoints}
            allowed = replace(endpoints, endpoints=tuple(one for one, why in refusals.items() if not why))
            refused = [why for why in refusals.values() if why]
            pool.learn(allowed, asked_s, self._open, num_refused=len(refused), why=refused[0] if refused else "")
        except UnsupportedError:
            pool.unanswered("the cluster is of a version that has none", OLD_AGAIN_S)
        except (TrunklineError, OSError) as error:
            pool.unanswered(str(error))
        except Exception as error:
            # Whatever it was: calls go through the gateway, and this thread must go on for the sake of the others.
            logger.debug("endpoints of %s", pool.backbone, exc_info=error)
            pool.unanswered(f"{type(error).__name__}: {error}")

    def _open(self, endpoint: Endpoint, endpoints: Endpoints) -> Replica:
        channel = open_direct_channel(self._settings, endpoint.address, tls=endpoints.tls, tls_name=endpoints.tls_name)
        numbers = self._numbers[endpoint.replica]
        return Replica(endpoint, channel, numbers, (endpoints.ticket, endpoints.key))
