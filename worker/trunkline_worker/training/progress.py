"""What a training run tells its caller, and how it learns that it should stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trunkline_worker.store.records import Event

_MIN_ADVANCE = 0.05
"""Progress below this since the last event of the phase is not told: a job has a few dozen events, not thousands."""


class TrainingCancelled(Exception):
    """The caller asked the training to stop, and it did."""


class Progress:
    """Sends events, not too many of them, and turns a wish to stop into ``TrainingCancelled``.

    Args:
        on_event: Takes each event. ``seq`` and ``time`` are left for the store to assign.
        should_stop: Whether to stop. Asked between steps.
    """

    def __init__(self, on_event: Callable[[Event], None], should_stop: Callable[[], bool]) -> None:
        """Start with nothing told."""
        self._on_event = on_event
        self.should_stop = should_stop
        self._phase = ""
        self._told = 0.0

    def check(self) -> None:
        """Return if the training may go on.

        Raises:
            TrainingCancelled: If it may not.
        """
        if self.should_stop():
            raise TrainingCancelled

    def tell(
        self,
        phase: str,
        progress: float,
        metrics: Mapping[str, float] | None = None,
        message: str = "",
        *,
        always: bool = False,
    ) -> None:
        """Send an event if it is news: a new phase, enough progress, or ``always``. Checks for a wish to stop first.

        Raises:
            TrainingCancelled: If the training should stop.
        """
        self.check()
        progress = min(1.0, max(0.0, progress))
        if not always and phase == self._phase and progress < self._told + _MIN_ADVANCE:
            return
        self._phase, self._told = phase, progress
        self._on_event(Event(phase=phase, progress=progress, metrics=dict(metrics or {}), message=message))
