"""Training jobs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trunkline import _html
from trunkline._deadline import Deadline
from trunkline.datasets import check_user_name
from trunkline.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    JobCancelledError,
    JobFailedError,
)
from trunkline.progress import Progress, show_progress
from trunkline.records import MLP, FitConfig, JobEvent, JobSpec, JobState, JobStatus, Linear

if TYPE_CHECKING:
    from trunkline.client import Client
    from trunkline.models import Model

SOLVERS = ("auto", "lbfgs", "adam")
"""How weights are found. ``auto``: ``lbfgs`` for a linear head, ``adam`` for an MLP."""


class Job:
    """A training job on the cluster. It goes on whatever becomes of this object.

    Attributes:
        id: By which ``Client.job`` finds it again.
    """

    def __init__(self, client: Client, status: JobStatus) -> None:
        """Keep who asks, and the last that is known."""
        self._client = client
        self._last = status
        self._last_seq = 0
        self.id = status.id

    def status(self, *, timeout_s: float | None = None) -> JobStatus:
        """Ask how the job stands."""
        self._last = self._client._calls.training.get(self.id, self._client._deadline(timeout_s))
        return self._last

    def events(self, *, after_seq: int = 0, timeout_s: float | None = None) -> Iterator[JobEvent]:
        """Yield what happened and what happens, until the job has ended.

        A broken connection is resumed after the last event seen.

        Args:
            after_seq: Start after this event.
            timeout_s: How long to watch. None: until the end.
        """
        for item in self._client._calls.training.watch(self.id, after_seq, Deadline(timeout_s)):
            if isinstance(item, JobStatus):
                self._last = item
                return
            yield item

    def cancel(self, *, timeout_s: float | None = None) -> JobStatus:
        """Ask the cluster to end the job.

        Raises:
            JobStateError: It has ended already.
        """
        self._last = self._client._calls.training.cancel(self.id, self._client._deadline(timeout_s))
        return self._last

    def result(self, timeout_s: float | None = None, *, progress: bool | None = None) -> Model:
        """Wait for the model.

        Interrupting ends the waiting, not the job.

        Args:
            timeout_s: How long to wait. None: as long as it takes.
            progress: None: show it if somebody can see it. False: never.

        Raises:
            JobFailedError: The job failed; the error says why.
            JobCancelledError: It was cancelled.
            DeadlineExceededError: The time is over. The job goes on.
        """
        if not self._last.state.has_ended:
            self._wait(timeout_s, progress)
        status = self._last
        if status.state is JobState.SUCCEEDED:
            return self._client.model(status.model)
        if status.state is JobState.CANCELLED:
            raise JobCancelledError(f"job {self.id} was cancelled", job_id=self.id, hint="Train once more")
        error = status.error or InternalError("no reason given")
        raise JobFailedError(
            f"job {self.id} failed: {error.message}",
            job_id=self.id,
            code=error.code,
            hint=error.hint,
            request_id=error.request_id,
        )

    def _wait(self, timeout_s: float | None, progress: bool | None) -> None:
        where = f"client.job({self.id!r})"
        try:
            with show_progress(f"Training {self._last.spec.model}", 1.0, progress) as bar:
                for event in self.events(timeout_s=timeout_s):
                    _show(bar, event)
        except KeyboardInterrupt:
            sys.stderr.write(
                f"\nThe job goes on. Get back to it with {where}.result(), or end it with {where}.cancel()"
                f" (or: trunkline jobs {self.id} [--cancel]).\n"
            )
            raise
        except DeadlineExceededError as error:
            raise DeadlineExceededError(
                f"job {self.id} has not ended within {timeout_s:g} s and goes on" if timeout_s else error.message,
                hint=f"Wait on with {where}.result()",
            ) from None
        if not self._last.state.has_ended:
            self.status()

    def __repr__(self) -> str:
        """Return id and the last known state."""
        return f"Job({self.id!r}, {self._last.state.name}, model={self._last.spec.model!r})"

    def _repr_html_(self) -> str:
        last = self._last
        return _html.facts(
            f"Job {self.id}",
            [
                ("state", last.state.name),
                ("model", last.model or last.spec.model),
                ("dataset", last.spec.dataset),
                ("embedding", last.spec.embedding),
                ("restarts", last.num_restarts or None),
                ("error", last.error.message if last.error else None),
            ],
        )


def _show(bar: Progress, event: JobEvent) -> None:
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in sorted(event.metrics.items())[:3])
    bar.update(event.progress, note=" · ".join(one for one in (event.phase, event.message, metrics) if one))


def job_to_dict(status: JobStatus) -> dict[str, Any]:
    """Return a job as plain values, for JSON."""
    spec = status.spec
    times = {name: getattr(status, name) for name in ("create_time", "start_time", "end_time")}
    return {
        "id": status.id,
        "state": status.state.name,
        "model": status.model or spec.model,
        "dataset": spec.dataset,
        "backbone": spec.backbone,
        "input_size": spec.input_size,
        "embedding": spec.embedding,
        "slices": list(spec.slices),
        "head": "mlp" if isinstance(spec.head, MLP) else "linear",
        "seed": spec.fit.seed,
        "num_restarts": status.num_restarts,
        "error": None
        if status.error is None
        else {"code": status.error.code.name if status.error.code else "", "message": status.error.message},
        **{name: moment.isoformat() if moment else None for name, moment in times.items()},
    }


def event_to_dict(event: JobEvent) -> dict[str, Any]:
    """Return an event as plain values, for JSON."""
    return {
        "seq": event.seq,
        "time": event.time.isoformat() if event.time else None,
        "phase": event.phase,
        "progress": event.progress,
        "metrics": dict(event.metrics),
        "message": event.message,
    }


def make_spec(
    *,
    model: str,
    dataset: str,
    backbone: str,
    input_size: int,
    embedding: str | Sequence[str],
    head: str | Linear | MLP,
    solver: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    l2: float | None,
    validation: float,
    refit: bool,
    seed: int,
) -> JobSpec:
    """Check what was asked for. Arguments are those of ``Client.train``.

    Raises:
        InvalidArgumentError: Something is out of range.
    """
    check_user_name(model, "model")
    chosen = _head(head)
    mode, slices = _embedding(embedding)
    if solver not in SOLVERS:
        raise InvalidArgumentError(f"solver is {solver!r}; expected one of {', '.join(SOLVERS)}")
    if solver == "auto":
        solver = "adam" if isinstance(chosen, MLP) else "lbfgs"
    if solver == "lbfgs" and isinstance(chosen, MLP):
        raise InvalidArgumentError("solver 'lbfgs' fits linear heads only", hint="Use solver='adam'")
    if not 0.0 <= validation < 1.0:
        raise InvalidArgumentError(f"validation is {validation}; expected a fraction from 0 to below 1")
    for what, value in (("epochs", epochs), ("batch_size", batch_size), ("input_size", input_size)):
        if value < 0:
            raise InvalidArgumentError(f"{what} is {value}; expected 1 or more, or 0 for the default")
    if learning_rate < 0 or (l2 is not None and l2 < 0):
        raise InvalidArgumentError(f"learning_rate ({learning_rate}) and l2 ({l2}) must not be negative")
    if not -(2**63) <= seed < 2**63:
        raise InvalidArgumentError(f"seed is {seed}; expected 64 bits at most")
    fit = FitConfig(
        solver=solver,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        l2=-1.0 if l2 is None else l2,
        validation_fraction=validation,
        refit=refit,
        seed=seed,
    )
    return JobSpec(model, dataset, backbone, input_size, mode, slices, chosen, fit)


def _head(head: str | Linear | MLP) -> Linear | MLP:
    if head == "linear":
        return Linear()
    if head == "mlp":
        return MLP()
    if isinstance(head, MLP):
        if not head.hidden or min(head.hidden) < 1 or not 0.0 <= head.dropout < 1.0:
            raise InvalidArgumentError(f"{head} needs widths of 1 or more, and a dropout from 0 to below 1")
        return head
    if isinstance(head, Linear):
        return head
    raise InvalidArgumentError(f"head is {head!r}; expected 'linear', 'mlp', trunkline.Linear() or trunkline.MLP(...)")


def _embedding(embedding: str | Sequence[str]) -> tuple[str, tuple[str, ...]]:
    if isinstance(embedding, str):
        if embedding not in ("auto", "pooled"):
            raise InvalidArgumentError(
                f"embedding is {embedding!r}; expected 'auto', 'pooled' or a list of slices",
                hint="`trunkline backbones NAME` lists the slices",
            )
        return embedding, ()
    slices = tuple(embedding)
    if not slices:
        raise InvalidArgumentError("embedding is an empty list", hint="Name at least one slice, or use 'auto'")
    return "slices", slices
