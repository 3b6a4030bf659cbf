"""Calls that train."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
from trunkline_wire import job_messages
from trunkline_wire.errors import WireError
from trunkline_wire.fits import FineTuneConfig, LossConfig, OptimiserConfig
from trunkline_wire.v1 import training_pb2 as pb
from trunkline_wire.v1.training_pb2_grpc import TrainingServiceStub

from trunkline._calls.aside import read_aside
from trunkline._calls.core import MAX_IDLE_CONNECTIONS, Caller, error_from_message, new_request_id
from trunkline._calls.heads import head_from_message, head_to_message
from trunkline._calls.times import from_timestamp
from trunkline._deadline import Deadline, retry_delay
from trunkline._status import is_retryable
from trunkline.errors import ServiceUnavailableError, TrunklineError
from trunkline.records import BackboneChoice, FitConfig, JobEvent, JobSpec, JobState, JobStatus

_EMBEDDINGS = {
    "pooled": pb.EMBEDDING_MODE_POOLED,
    "auto": pb.EMBEDDING_MODE_AUTO,
    "slices": pb.EMBEDDING_MODE_SLICES,
}
_EMBEDDING_NAMES = {value: name for name, value in _EMBEDDINGS.items()}
_SOLVERS = {"lbfgs": pb.SOLVER_LBFGS, "adamw": pb.SOLVER_ADAM}
_SOLVER_NAMES = {value: name for name, value in _SOLVERS.items()}


class TrainingCalls:
    """``TrainingService``."""

    def __init__(self, caller: Caller) -> None:
        """Keep who makes the calls."""
        self._caller = caller

    def submit(self, spec: JobSpec, deadline: Deadline) -> JobStatus:
        """Queue a job. A repetition after a lost answer gives the same job."""
        request = pb.SubmitJobRequest(spec=_spec_to_message(spec), idempotency_key=uuid.uuid4().hex)
        answer: pb.SubmitJobResponse = self._caller.unary(TrainingServiceStub, "SubmitJob", request, deadline)
        return _job(answer.job)

    def get(self, job_id: str, deadline: Deadline) -> JobStatus:
        """Return a job as it stands."""
        answer: pb.GetJobResponse = self._caller.unary(
            TrainingServiceStub, "GetJob", pb.GetJobRequest(id=job_id), deadline
        )
        return _job(answer.job)

    def list(self, deadline: Deadline) -> list[JobStatus]:
        """Return every job."""
        answer: pb.ListJobsResponse = self._caller.unary(
            TrainingServiceStub, "ListJobs", pb.ListJobsRequest(), deadline
        )
        return [_job(one) for one in answer.jobs]

    def cancel(self, job_id: str, deadline: Deadline) -> JobStatus:
        """Ask for a job's end. The key makes it safe to repeat after a lost reply."""
        request = pb.CancelJobRequest(id=job_id, idempotency_key=uuid.uuid4().hex)
        answer: pb.CancelJobResponse = self._caller.unary(TrainingServiceStub, "CancelJob", request, deadline)
        return _job(answer.job)

    def watch(self, job_id: str, after_seq: int, deadline: Deadline) -> Iterator[JobEvent | JobStatus]:
        """Yield a job's events from ``after_seq`` on, and the job as it ended at last.

        A broken connection is resumed after the last event seen.
        """
        broken = 0
        while True:
            seen = after_seq
            try:
                for item in self._watch_once(job_id, after_seq, deadline):
                    if isinstance(item, JobStatus):
                        yield item
                        return
                    if item.seq > after_seq:
                        after_seq = item.seq
                        yield item
                error: TrunklineError = ServiceUnavailableError("the cluster ended the stream of events early")
            except TrunklineError as failure:
                error = failure
            broken = 0 if after_seq > seen else broken + 1
            delay_s = retry_delay(broken + 1, error.retry_delay_s)
            if not is_retryable(error) or broken >= MAX_IDLE_CONNECTIONS or not deadline.allows(delay_s):
                raise error
            self._caller.sleep(delay_s)

    def _watch_once(self, job_id: str, after_seq: int, deadline: Deadline) -> Iterator[JobEvent | JobStatus]:
        request_id = new_request_id()
        timeout_s = deadline.check("WatchJob")

        def open_call() -> Any:
            return self._caller.connection.stub(TrainingServiceStub).WatchJob(
                pb.WatchJobRequest(id=job_id, after_seq=after_seq),
                timeout=timeout_s,
                metadata=self._caller.metadata(request_id),
                wait_for_ready=True,
            )

        try:
            for message in read_aside(open_call):
                kind = message.WhichOneof("kind")
                if kind == "event":
                    yield _event(message.event)
                elif kind == "job":
                    yield _job(message.job)
                elif kind == "end":
                    return
        except grpc.RpcError as error:
            raise self._caller.error(error, request_id) from None


def _spec_to_message(spec: JobSpec) -> pb.JobSpec:
    return pb.JobSpec(
        model=spec.model,
        dataset=spec.dataset,
        backbone=spec.backbone,
        input_size=spec.input_size,
        embedding=_EMBEDDINGS[spec.embedding],
        slices=spec.slices,
        head=None if spec.head is None else head_to_message(spec.head),
        fit=_fit_to_message(spec.fit),
        more_backbones=[
            pb.BackboneChoice(backbone=one.backbone, input_size=one.input_size) for one in spec.more_backbones
        ],
        sweep=None if spec.sweep is None else job_messages.sweep_to_proto(spec.sweep),
        fine_tune=job_messages.fine_tune_to_proto(spec.fine_tune),
    )


def _spec_from_message(message: pb.JobSpec) -> JobSpec:
    return JobSpec(
        model=message.model,
        dataset=message.dataset,
        backbone=message.backbone,
        input_size=message.input_size,
        embedding=_EMBEDDING_NAMES.get(message.embedding, ""),
        slices=tuple(message.slices),
        head=head_from_message(message.head),
        fit=FitConfig(
            solver=_SOLVER_NAMES.get(message.fit.solver, ""),
            epochs=message.fit.epochs,
            batch_size=message.fit.batch_size,
            learning_rate=message.fit.learning_rate,
            l2=message.fit.l2,
            validation_fraction=message.fit.validation_fraction,
            refit=message.fit.refit,
            seed=message.fit.seed,
            loss=_loss_from_message(message.fit),
            optimiser=_optimiser_from_message(message.fit),
            select_by=message.fit.select_by,
            calibrate=message.fit.calibrate if message.fit.HasField("calibrate") else True,
        ),
        more_backbones=tuple(BackboneChoice(one.backbone, one.input_size) for one in message.more_backbones),
        sweep=job_messages.sweep_from_proto(message.sweep) if message.HasField("sweep") else None,
        fine_tune=_fine_tune_from_message(message),
    )


def _fine_tune_from_message(message: pb.JobSpec) -> FineTuneConfig | None:
    """Return what is asked for; None for nothing, or for something that this version does not know."""
    if not message.HasField("fine_tune"):
        return None
    with contextlib.suppress(WireError):
        return job_messages.fine_tune_from_proto(message.fine_tune)
    return None


def _fit_to_message(fit: FitConfig) -> pb.FitConfig:
    message = pb.FitConfig(
        solver=_SOLVERS[fit.solver],
        epochs=fit.epochs,
        batch_size=fit.batch_size,
        learning_rate=fit.learning_rate,
        l2=fit.l2,
        validation_fraction=fit.validation_fraction,
        refit=fit.refit,
        seed=fit.seed,
        select_by=fit.select_by,
        calibrate=fit.calibrate,
    )
    if fit.loss is not None:
        job_messages.write_loss(fit.loss, message)
    if fit.optimiser is not None:
        job_messages.write_optimiser(fit.optimiser, message)
    return message


def _loss_from_message(fit: pb.FitConfig) -> LossConfig | None:
    """Return the loss; None for one that this version does not know."""
    with contextlib.suppress(WireError):
        return job_messages.loss_from_proto(fit)
    return None


def _optimiser_from_message(fit: pb.FitConfig) -> OptimiserConfig | None:
    with contextlib.suppress(WireError):
        return job_messages.optimiser_from_proto(fit)
    return None


def _job(message: pb.Job) -> JobStatus:
    state = JobState(message.state) if message.state else JobState.QUEUED
    return JobStatus(
        id=message.id,
        state=state,
        spec=_spec_from_message(message.spec),
        error=error_from_message(message.error) if state is JobState.FAILED else None,
        model=message.model,
        num_restarts=message.num_restarts,
        create_time=from_timestamp(message, "create_time"),
        start_time=from_timestamp(message, "start_time"),
        end_time=from_timestamp(message, "end_time"),
    )


def _event(message: pb.JobEvent) -> JobEvent:
    return JobEvent(
        seq=message.seq,
        time=from_timestamp(message, "time"),
        phase=message.phase,
        progress=message.progress,
        metrics=dict(message.metrics),
        message=message.message,
    )
