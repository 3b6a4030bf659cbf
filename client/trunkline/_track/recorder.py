"""Tells trackers of a job beside the waiting for it: a tracker that is slow or gone must not cost the model."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from trunkline._report.material import Material, gather
from trunkline._track.facts import spec_facts
from trunkline._track.sink import Sink
from trunkline.errors import InvalidArgumentError, JobCancelledError, JobFailedError, TrackingError, TrunklineError
from trunkline.records import JobEvent, JobState, JobStatus

if TYPE_CHECKING:
    from trunkline.client import Client
    from trunkline.models import Model
    from trunkline.track import Tracker

logger = logging.getLogger(__name__)

OPEN_S = 30.0
"""How long a tracker may take to answer at first: its libraries try for minutes."""

FLUSH_S = 30.0
"""How long the last of it may take once the job has ended."""

LEAVE_S = 3.0
"""Likewise, where nobody waits for the job any more."""


@dataclass(frozen=True)
class Opened:
    """A tracker that has answered, and where it records a job. ``name`` is for people."""

    name: str
    sink: Sink


def open_all(track: Tracker | Sequence[Tracker] | None) -> tuple[Opened, ...]:
    """Return where a job is recorded: all of the trackers answer, or none is used.

    Raises:
        InvalidArgumentError: Something in it is no tracker.
        MissingExtraError: A library is not installed.
        TrackingError: A tracker does not answer, or refuses.
    """
    from trunkline.track import Tracker

    trackers = [] if track is None else [track] if isinstance(track, Tracker) else list(track)
    for one in trackers:
        if not isinstance(one, Tracker):
            raise InvalidArgumentError(
                f"track holds {one!r}; expected such as trunkline.track.TensorBoard('runs')",
                hint="Give one tracker or a list of them",
            )
        one.load()
    return tuple(Opened(str(one), _within(OPEN_S, one)) for one in trackers)


class Recording:
    """Tells each tracker of a job while it is waited for. A context manager: how it is left is how the run ends.

    A job that failed or was cancelled ends its runs so. Where the waiting ends before the job, runs stay open, and
    whoever waits for the job again goes on with them.
    """

    def __init__(self, client: Client, job: JobStatus, opened: Sequence[Opened]) -> None:
        """Keep whom to tell."""
        self._client, self._job = client, job
        self._teller = [_Teller(one) for one in opened]

    def __bool__(self) -> bool:
        """Whether anybody is told."""
        return bool(self._teller)

    def __enter__(self) -> Recording:
        """Start the runs."""
        if self._teller:
            facts = spec_facts(self._job.spec, self._client.info)
            self._tell(lambda sink: sink.begin(self._job, facts))
        return self

    def event(self, event: JobEvent) -> None:
        """Tell what happened."""
        self._tell(lambda sink: sink.event(event))

    def model(self, model: Model) -> None:
        """Tell what came of it."""
        if not self._teller:
            return
        try:
            material = gather(model, self._client._deadline(None))
        except TrunklineError as error:
            # The scores are in the record, which is at hand.
            material = Material(model.record, damage=error.message)
        self._tell(lambda sink: sink.model(material))
        self._tell(lambda sink: sink.course(material))
        self._tell(lambda sink: sink.papers(material))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the runs, or leave them open."""
        state, reason = JobState.SUCCEEDED, ""
        if isinstance(error, JobCancelledError):
            state = JobState.CANCELLED
        elif isinstance(error, JobFailedError):
            state, reason = JobState.FAILED, str(error)
        has_ended = error is None or isinstance(error, JobFailedError)
        if has_ended:
            self._tell(lambda sink: sink.end(state, reason))
        for one in self._teller:
            one.finish(FLUSH_S if has_ended else LEAVE_S)

    def _tell(self, what: Callable[[Sink], None]) -> None:
        for one in self._teller:
            one.tell(what)


class _Teller:
    """Tells one tracker, on a thread of its own, one thing after the other. Warns once if that does not work."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._items: queue.SimpleQueue[Callable[[Sink], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._has_warned = False
        # A daemon: a tracker that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"trunkline {opened.name}", daemon=True)
        self._thread.start()

    def tell(self, what: Callable[[Sink], None]) -> None:
        self._items.put(what)

    def finish(self, timeout_s: float) -> None:
        """Wait for everything to be told, for a while."""
        self._items.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._warn(f"has not taken everything within {timeout_s:g} s")

    def _run(self) -> None:
        while (what := self._items.get()) is not None:
            self._try(what)
        self._try(lambda sink: sink.close())

    def _try(self, what: Callable[[Sink], None]) -> None:
        try:
            what(self._opened.sink)
        except Exception as error:  # of libraries and networks, which share no base
            self._warn(f"failed: {error or type(error).__name__}")

    def _warn(self, what: str) -> None:
        with self._lock:
            is_first, self._has_warned = not self._has_warned, True
        if is_first:
            logger.warning("%s %s. The run there is not complete; the job is not concerned", self._opened.name, what)


def _within(timeout_s: float, tracker: Tracker) -> Sink:
    """Open a tracker, but wait no longer than so many seconds for it."""
    answers: queue.SimpleQueue[Sink | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(tracker.open())
        except BaseException as error:
            answers.put(error)

    threading.Thread(target=work, name=f"trunkline {tracker}", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TrackingError(f"{tracker} does not answer within {timeout_s:g} s") from None
    if isinstance(answer, TrunklineError):
        raise answer
    if isinstance(answer, BaseException):
        raise TrackingError(f"{tracker} failed: {answer or type(answer).__name__}") from answer
    return answer
