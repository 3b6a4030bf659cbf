"""Training jobs."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from trunkline_wire.errors import WireError
from trunkline_wire.fits import (
    AUTO,
    CROSS_ENTROPY,
    MSE,
    FineTuneConfig,
    LossConfig,
    OptimiserConfig,
    SweepConfig,
    check_metric,
    check_sweep,
    is_metric,
)
from trunkline_wire.heads import (
    CLASSIFICATION,
    CONCAT,
    CONV,
    LINEAR,
    ORDINAL,
    PROTOTYPE,
    HeadConfig,
)
from trunkline_wire.sizes import check_answers

from trunkline import _html
from trunkline._deadline import Deadline
from trunkline._names import check_user_name
from trunkline._track.recorder import Opened, Recording, open_all
from trunkline.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    JobCancelledError,
    JobFailedError,
    TrunklineError,
    UnsupportedError,
    from_wire,
)
from trunkline.heads import Head, head_config, head_summary
from trunkline.progress import Progress, show_progress
from trunkline.records import (
    BackboneChoice,
    FitConfig,
    JobEvent,
    JobSpec,
    JobState,
    JobStatus,
    ServerInfo,
)

if TYPE_CHECKING:
    from trunkline._calls.training import TrainingCalls
    from trunkline.client import Client
    from trunkline.datasets import Dataset
    from trunkline.models import Model
    from trunkline.track import Tracker

logger = logging.getLogger(__name__)

SOLVERS = ("auto", "lbfgs", "adamw")
"""How weights are found. ``auto``: ``lbfgs`` where that finds the one solution there is, else ``adamw``."""


class Job:
    """A training job on the cluster. It goes on whatever becomes of this object.

    Attributes:
        id: By which ``Client.job`` finds it again.
    """

    def __init__(self, client: Client, status: JobStatus, opened: Sequence[Opened] = ()) -> None:
        """Keep who asks, the last that is known, and where it is recorded."""
        self._client = client
        self._opened = tuple(opened)
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

    def result(
        self,
        timeout_s: float | None = None,
        *,
        progress: bool | None = None,
        track: Tracker | Sequence[Tracker] | None = None,
    ) -> Model:
        """Wait for the model.

        Interrupting ends the waiting, not the job.

        Args:
            timeout_s: How long to wait. None: as long as it takes.
            progress: None: show it if somebody can see it. False: never.
            track: Who records the job, from its first event on, in place of those that ``Client.train`` was given. A
                job that has ended can be recorded too.

        Raises:
            JobFailedError: The job failed; the error says why.
            JobCancelledError: It was cancelled.
            DeadlineExceededError: The time is over. The job goes on.
            MissingExtraError, TrackingError: A tracker's library is not installed, or it cannot be reached.
        """
        opened = self._opened if track is None else open_all(track)
        with Recording(self._client, self._last, opened) as recording:
            if recording or not self._last.state.has_ended:
                self._wait(timeout_s, progress, recording)
            self._opened = ()  # nothing will happen any more
            model = self._model()
            recording.model(model)
        return model

    def _model(self) -> Model:
        """Return the model of a job that has ended, or raise what it ended with."""
        status = self._last
        if status.state is JobState.SUCCEEDED:
            model = self._client.model(status.model)
            for one in model.warnings:
                logger.warning("%s: %s", model.reference, one)
            return model
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

    def _wait(self, timeout_s: float | None, progress: bool | None, recording: Recording) -> None:
        where = f"client.job({self.id!r})"
        try:
            with show_progress(f"Training {self._last.spec.model}", 1.0, progress) as bar:
                for event in self.events(timeout_s=timeout_s):
                    _show(bar, event)
                    recording.event(event)
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
        "more_backbones": [vars(one) for one in spec.more_backbones],
        "head": None if spec.head is None else asdict(spec.head),
        "loss": None if spec.fit.loss is None else asdict(spec.fit.loss),
        "select_by": spec.fit.select_by,
        "sweep": None if spec.sweep is None else asdict(spec.sweep),
        "fine_tune": None if spec.fine_tune is None else asdict(spec.fine_tune),
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
    backbones: Sequence[str],
    input_size: int,
    embedding: str | Sequence[str],
    head: str | Head,
    solver: str,
    loss: LossConfig,
    optimiser: OptimiserConfig,
    select_by: str,
    calibrate: bool,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    l2: float | None,
    validation: float,
    refit: bool,
    seed: int,
    sweep: SweepConfig | None = None,
    fine_tune: FineTuneConfig | None = None,
) -> JobSpec:
    """Check what was asked for. Arguments are those of ``Client.train``.

    Raises:
        InvalidArgumentError: Something is out of range.
    """
    check_user_name(model, "model")
    config = head_config(head)
    mode, slices = _embedding(embedding)
    if config.kind == CONV and mode == "slices":
        raise InvalidArgumentError(
            "a convolutional head reads the features at its tap, not slices of the embedding",
            hint="Leave embedding= out, and name a cut with Conv(tap=...)",
        )
    if sweep is not None:
        try:
            check_sweep(sweep, config, loss)
        except WireError as error:
            raise from_wire(error) from None
    if select_by and not is_metric(select_by):
        raise InvalidArgumentError(f"there is no metric {select_by[:40]!r} to select by")
    if len(set(backbones)) < len(backbones):
        raise InvalidArgumentError(f"a backbone is named twice: {', '.join(backbones)}")
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
        solver=_solver(solver, config, loss, mixup=optimiser.mixup),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        l2=-1.0 if l2 is None else l2,
        validation_fraction=validation,
        refit=refit,
        seed=seed,
        loss=loss,
        optimiser=optimiser,
        select_by=select_by,
        calibrate=calibrate,
    )
    if fine_tune is not None:
        _check_fine_tune(config, backbones, validation, loss)
    first, *more = backbones or ("",)
    others = tuple(BackboneChoice(one, input_size) for one in more)
    return JobSpec(model, dataset, first, input_size, mode, slices, config, fit, others, sweep, fine_tune)


def _check_fine_tune(head: HeadConfig, backbones: Sequence[str], validation: float, loss: LossConfig) -> None:
    if head.kind != LINEAR:
        raise InvalidArgumentError(
            f"fine-tuning goes on from a linear head, not one of kind {head.kind!r}", hint="Leave head= out"
        )
    if len(backbones) > 1:
        raise InvalidArgumentError("fine-tuning trains the last blocks of one backbone", hint="Name one")
    if loss.class_order:
        raise InvalidArgumentError("fine-tuning cannot learn classes in order", hint="Leave ordinal= out")
    if not validation:
        raise InvalidArgumentError(
            "fine-tuned blocks are kept only where held-out rows say that they help", hint="Leave validation= out"
        )


def check_spec_of(spec: JobSpec, data: Dataset) -> None:
    """Check what was asked for against the dataset, where that is at hand.

    Raises:
        InvalidArgumentError: They do not go together.
    """
    own = data.space.backbone
    named = [one for one in (spec.backbone, *(one.backbone for one in spec.more_backbones)) if one]
    if own and named and named != [own]:
        raise InvalidArgumentError(
            f"{data.reference} holds features of {own}; backbone is {', '.join(map(repr, named))}",
            hint="Leave backbone= out",
        )
    if spec.fine_tune is not None and (data.space.is_local or len(data.inputs) > 1):
        raise InvalidArgumentError(
            f"{data.reference} holds local features; fine-tuning needs rows of a single input that a backbone reads"
        )
    if data.space.is_local and (named or spec.input_size):
        raise InvalidArgumentError(
            f"{data.reference} holds local features alone, which no backbone reads",
            hint="Leave backbone= and input_size= out",
        )
    assert spec.fit.loss is not None
    task = ORDINAL if spec.fit.loss.class_order and data.task == CLASSIFICATION else data.task
    try:
        check_answers(data.num_rows, len(data.class_names))
        spec.fit.loss.kind_for(task)
        check_metric(spec.fit.select_by, task)
    except WireError as error:
        raise from_wire(error) from None


def submit(calls: TrainingCalls, spec: JobSpec, info: ServerInfo, deadline: Deadline) -> JobStatus:
    """Queue a job.

    Raises:
        UnsupportedError: The cluster is too old for it. It takes no notice of what it does not know, and would train
            something else: so what it says it will do is compared with what was asked for.
    """
    status = calls.submit(spec, deadline)
    ignored = _ignored(spec, status.spec)
    if not ignored:
        return status
    with contextlib.suppress(TrunklineError):  # it may have ended; nobody asked for what it makes
        calls.cancel(status.id, deadline)
    raise UnsupportedError(
        f"the cluster (version {info.version}) does not know {ignored}; job {status.id} was cancelled",
        hint="Update the cluster",
    )


def _ignored(asked: JobSpec, taken: JobSpec) -> str:
    """Return what a cluster took no notice of, in words; empty if it is nothing."""
    names = [one.backbone for one in asked.more_backbones]
    if names != [one.backbone for one in taken.more_backbones]:
        return "several backbones"
    if asked.head is not None:
        tap = taken.head.tap if taken.head is not None and not asked.head.tap else asked.head.tap
        if taken.head != replace(asked.head, tap=tap):
            return f"the head ({head_summary(asked.head)})"
    loss = _differing(asked.fit.loss, taken.fit.loss)
    if loss:
        return f"the loss's {loss}"
    optimiser = _differing(asked.fit.optimiser, taken.fit.optimiser) if asked.fit.solver == "adamw" else ""
    if optimiser:
        return f"the optimiser's {optimiser}"
    if asked.fit.calibrate != taken.fit.calibrate:
        return "calibrate=False"
    if asked.sweep != taken.sweep:
        return "sweeps"
    if asked.fine_tune is not None:
        cut = taken.fine_tune.cut if taken.fine_tune is not None and not asked.fine_tune.cut else asked.fine_tune.cut
        if taken.fine_tune != replace(asked.fine_tune, cut=cut):
            return "fine-tuning"
    if asked.fit.select_by != taken.fit.select_by:
        return f"choosing by {asked.fit.select_by}"
    return ""


def _differing(asked: LossConfig | OptimiserConfig | None, taken: LossConfig | OptimiserConfig | None) -> str:
    """Return the first setting that was not taken, with its value; empty if all were."""
    if asked is None:
        return ""
    names = (one.name for one in fields(asked) if getattr(asked, one.name) != getattr(taken, one.name, None))
    return next((f"{name} {getattr(asked, name)!r}" for name in names), "")


def _solver(solver: str, head: HeadConfig, loss: LossConfig, *, mixup: float) -> str:
    """Return the solver; ``auto`` is chosen by what there is to solve."""
    if solver not in SOLVERS:
        raise InvalidArgumentError(f"solver is {solver!r}; expected one of {', '.join(SOLVERS)}")
    if mixup and loss.class_order:
        raise InvalidArgumentError(
            "classes in order are not mixed: between two of them lie others", hint="Leave mixup out, or the order"
        )
    if mixup and (solver == "lbfgs" or head.kind == PROTOTYPE):
        raise InvalidArgumentError(
            "mixup is for what learns in minibatches", hint="Use solver='adamw', with a head other than prototype"
        )
    has_one_solution = head.kind == PROTOTYPE or (head.kind == LINEAR and head.fuse == CONCAT)
    is_solved = loss.kind in (AUTO, CROSS_ENTROPY, MSE)
    if solver == "auto":
        if mixup:
            return "adamw"
        return "lbfgs" if head.kind == PROTOTYPE or (has_one_solution and is_solved) else "adamw"
    if solver == "lbfgs" and not has_one_solution:
        raise InvalidArgumentError(
            "solver 'lbfgs' fits linear heads on inputs side by side only", hint="Use solver='adamw'"
        )
    if solver == "adamw" and head.kind == PROTOTYPE:
        raise InvalidArgumentError("a prototype head has nothing that 'adamw' could train", hint="Leave solver= out")
    return solver


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
