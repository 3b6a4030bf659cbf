"""Keeps a job's lease alive and its events flowing, beside the training."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.store.records import Event, Lease

logger = logging.getLogger(__name__)

EVENT_INTERVAL_S = 0.2
"""Events are sent together at most this often, in seconds."""

RENEW_INTERVAL_S = 1.0
"""A lease is renewed this often, in seconds, or three times in its life: so soon is a cancelled job noticed."""


class LeaseKeeper:
    """Renews a lease and sends events from a thread of its own, while the job runs in the caller's.

    The job asks ``should_stop`` between steps: True once the user has cancelled, or the lease is lost.
    """

    def __init__(
        self, lease: Lease, metadata: Callable[..., Any], *, lease_s: float, monotonic: Callable[[], float]
    ) -> None:
        """Keep what is needed; entering the context starts the thread."""
        self._lease = lease
        self._metadata = metadata
        self._lease_s = lease_s
        self._monotonic = monotonic
        self._interval_s = min(RENEW_INTERVAL_S, lease_s / 3)
        self._wake = threading.Condition()
        self._events: list[Event] = []
        self._unsent: list[Event] = []
        self._batch = 1
        self._closed = False
        self._cancelled = False
        self.lost = False
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"lease-{lease.job.id[:8]}", daemon=True)

    def __enter__(self) -> LeaseKeeper:
        """Start renewing."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop renewing."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def report(self, event: Event) -> None:
        """Send an event soon."""
        with self._wake:
            self._events.append(event)

    def flush(self) -> None:
        """Send the events that are waiting, now."""
        self._send()  # a batch that failed before
        self._send()

    def should_stop(self) -> bool:
        """Return whether going on makes no sense."""
        return self._cancelled or self.lost

    def _run(self) -> None:
        renew_at = self._monotonic() + self._interval_s
        while True:
            with self._wake:
                if not self._closed:
                    self._wake.wait(EVENT_INTERVAL_S)
                if self._closed:
                    return
            try:
                self._send()
                if self._monotonic() >= renew_at:
                    self._cancelled |= bool(
                        self._metadata("jobs.renew", self._lease.job.id, self._lease.fence, self._lease_s)
                    )
                    renew_at = self._monotonic() + self._interval_s
            except WireError as error:
                if error.code is ErrorCode.JOB_STATE:
                    self.lost = True
                    return
                logger.warning("job %s: %s", self._lease.job.id, error)

    def _send(self) -> None:
        with self._sending:
            with self._wake:
                if not self._unsent:
                    self._unsent, self._events = self._events, []
            if not self._unsent:
                return
            try:
                # Numbered, so that a batch whose reply was lost is added once.
                self._metadata("jobs.append_events", self._lease.job.id, self._lease.fence, self._unsent, self._batch)
                self._unsent, self._batch = [], self._batch + 1
            except WireError as error:
                if error.code is ErrorCode.JOB_STATE:
                    self.lost = True
                raise
