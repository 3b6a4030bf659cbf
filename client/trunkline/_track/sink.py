"""What a tracker is told of one job."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from trunkline._report.material import Material
from trunkline.records import JobEvent, JobState, JobStatus


class Sink(ABC):
    """Where one job is recorded. All but making it happens on a thread of its own, one call at a time.

    A call may raise anything: that is told once, and the next one is made all the same.
    """

    @abstractmethod
    def begin(self, job: JobStatus, facts: Mapping[str, str]) -> None:
        """Start a run, or go on with the one that this job has already.

        Args:
            job: As it stands.
            facts: What was asked for, and versions.
        """

    @abstractmethod
    def event(self, event: JobEvent) -> None:
        """Record what happened."""

    @abstractmethod
    def model(self, material: Material) -> None:
        """Record scores, what was chosen, and warnings of the model that came of it."""

    @abstractmethod
    def course(self, material: Material) -> None:
        """Record learning curves, and what was tried."""

    @abstractmethod
    def papers(self, material: Material) -> None:
        """Keep the report and the card."""

    @abstractmethod
    def end(self, state: JobState, reason: str) -> None:
        """End the run.

        Args:
            state: How the job ended.
            reason: Why it failed; empty if it did not.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of files and the like, whether the run has ended or not."""
