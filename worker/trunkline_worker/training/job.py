"""One training job from its lease to the published model. Free of Ray and gRPC: a lane passes in what it needs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict

from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.engine.memory import is_out_of_memory
from trunkline_worker.heads.artefact import head_path, head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.outliers import detector_to_bytes, outliers_path
from trunkline_worker.store.evaluations import evaluation_path, evaluation_to_bytes
from trunkline_worker.store.records import (
    Candidate,
    DatasetRecord,
    Event,
    JobSpec,
    Lease,
    ModelInput,
    ModelRecord,
    TrialRecord,
)
from trunkline_worker.training.embed import ReadInput, RowMaps, Trunk, read_inputs
from trunkline_worker.training.keeper import LeaseKeeper
from trunkline_worker.training.loop import Labels, TrainingCancelled, TrainingResult, train_head
from trunkline_worker.training.sweep.alone import run_in_process
from trunkline_worker.training.sweep.plan import Trial
from trunkline_worker.training.tools import JobTools
from trunkline_worker.training.tuning.tune import TailSource

__all__ = ["JobTools", "Trunk", "manifest_path", "run_job"]

logger = logging.getLogger(__name__)


def run_job(lease: Lease, tools: JobTools) -> None:
    """Do the job and say how it ended. Never raises for a reason that lies in the job.

    A job whose lease was lost is dropped without a word: whoever holds it now speaks for it.
    """
    job = lease.job
    with LeaseKeeper(lease, tools.metadata, lease_s=tools.lease_s, monotonic=tools.clock.monotonic) as keeper:
        try:
            model = _train(lease, tools, keeper)
            keeper.flush()
            tools.failpoints.hit("job.before_succeed")
            tools.metadata("jobs.succeed", job.id, lease.fence, model)
            tools.failpoints.hit("job.after_succeed")
        except TrainingCancelled:
            if keeper.lost:
                logger.warning("job %s: the lease was lost; dropped", job.id)
                return
            tools.metadata("jobs.mark_cancelled", job.id, lease.fence)
        except WireError as error:
            if keeper.lost or error.code is ErrorCode.JOB_STATE:
                logger.warning("job %s: the lease was lost; dropped (%s)", job.id, error)
                return
            logger.info("job %s failed: %s", job.id, error)
            tools.metadata("jobs.fail", job.id, lease.fence, error.code, error.message)
        except Exception as error:
            if is_out_of_memory(error):
                tools.metadata("jobs.fail", job.id, lease.fence, ErrorCode.WORKER_OOM, "the lane ran out of memory")
                return
            logger.exception("job %s failed", job.id)
            message = "training failed in a way that was not foreseen; the lane's log names this job"
            tools.metadata("jobs.fail", job.id, lease.fence, ErrorCode.INTERNAL, message)


def _train(lease: Lease, tools: JobTools, keeper: LeaseKeeper) -> ModelRecord:
    job = lease.job
    content = tools.metadata("datasets.rows", job.tenant, job.spec.dataset)
    record: DatasetRecord = content.record
    read = read_inputs(job.tenant, job.spec, content, tools, keeper)
    # One class a row has indices; several, and numbers, have targets.
    labels = Labels(record.class_names, None if content.targets is not None else content.class_indices, content.targets)
    started = tools.clock.monotonic()
    result = train_head(
        [one.source for one in read],
        labels,
        job.spec,
        row_ids=[b"".join(ids) for ids in zip(content.row_ids, *content.more_row_ids, strict=True)],
        tail=_tail(lease, tools, keeper, read[0], content.row_ids),
        groups=content.groups,
        num_views=record.views,
        on_event=keeper.report,
        should_stop=keeper.should_stop,
        run_trials=tools.run_trials or run_in_process,
    )
    result.metrics["train_s"] = tools.clock.monotonic() - started
    keeper.report(Event("publish"))
    return _publish(lease, read, record, result, tools)


def _tail(
    lease: Lease, tools: JobTools, keeper: LeaseKeeper, first: ReadInput, row_ids: Sequence[bytes]
) -> TailSource | None:
    """Return where the blocks begin that a job wants fine-tuned, with the maps there in storage."""
    wanted, spec = lease.job.spec.fine_tune, first.spec
    if wanted is None or spec is None or tools.tails is None:
        return None
    cut = spec.cut(wanted.cut)
    if cut is None or not cut.map_shape:
        raise WireError(
            ErrorCode.INCOMPATIBLE, f"{spec.name} has no map at {wanted.cut!r} any more; submit the job again"
        )
    maps = RowMaps(lease.job.tenant, spec, first.space, cut.name, row_ids)
    maps.prepare(tools, keeper)
    return TailSource(cut, tools.tails(lease.job.id, maps))


def _publish(
    lease: Lease, read: Sequence[ReadInput], dataset: DatasetRecord, result: TrainingResult, tools: JobTools
) -> ModelRecord:
    """Make the head and its manifest durable, and return the record that will name them."""
    job = lease.job
    head = result.head
    data = head_to_bytes(head)
    sha256 = hashlib.sha256(data).hexdigest()
    evaluation = b"" if result.evaluation is None else evaluation_to_bytes(result.evaluation)
    evaluation_sha256 = hashlib.sha256(evaluation).hexdigest() if evaluation else ""
    outliers = b"" if result.outliers is None else detector_to_bytes(result.outliers)
    outliers_sha256 = hashlib.sha256(outliers).hexdigest() if outliers else ""
    first, *others = (_model_input(one, entry) for one, entry in zip(read, head.inputs, strict=True))
    record = ModelRecord(
        tenant=job.tenant,
        name=job.spec.model,
        version=0,  # assigned by the store in the transaction that publishes
        task=head.task,
        class_names=tuple(head.class_names),
        num_outputs=head.num_outputs,
        space=first.space,
        embedding_fingerprint=first.embedding_fingerprint,
        slices=first.slices,
        metrics=dict(result.metrics),
        dataset=dataset.reference,
        dataset_digest=dataset.digest,
        head_sha256=sha256,
        versions=dict(tools.versions),
        job_id=job.id,
        create_time=tools.clock.now(),
        codec=first.codec,
        codec_error=first.codec_error,
        candidates=tuple(Candidate(one.slices, one.width, one.score, one.accuracy) for one in result.candidates),
        more_inputs=tuple(others),
        head=head.config,
        conformal=result.conformal,
        warnings=result.warnings,
        evaluation_sha256=evaluation_sha256,
        outliers_sha256=outliers_sha256,
        trials=() if result.found is None else tuple(_trial(one, result.found.won) for one in result.found.trials),
        fine_tuning=result.tuning,
    )
    tools.blobs.put(head_path(sha256), data)
    if evaluation:
        tools.blobs.put(evaluation_path(evaluation_sha256), evaluation)
    if outliers:
        tools.blobs.put(outliers_path(outliers_sha256), outliers)
    tools.failpoints.hit("job.head_written")
    tools.blobs.put(manifest_path(job.id, lease.fence), _manifest(record, job.spec, read, result))
    tools.failpoints.hit("job.manifest_written")
    return record


def _trial(one: Trial, won: Trial) -> TrialRecord:
    own = one.configuration
    # JSON has no infinity, which is the score of what failed.
    score = 0.0 if one.error else one.score
    return TrialRecord(
        *(own.slices, own.l2, own.hidden, own.learning_rate, own.dropout, one.scores, score, one.error, one.seconds),
        won=own == won.configuration,
    )


def _model_input(read: ReadInput, entry: HeadInput) -> ModelInput:
    fingerprint = read.spec.embedding_fingerprint if read.spec else ""
    return ModelInput(read.space, fingerprint, entry.slices, entry.num_columns, read.codec, read.codec_error)


def manifest_path(job_id: str, fence: int) -> str:
    """Return where the manifest of a job's attempt lies."""
    return f"models/{job_id}/{fence}.json"


def _manifest(record: ModelRecord, job: JobSpec, read: Sequence[ReadInput], result: TrainingResult) -> bytes:
    model = {**asdict(record), "version": None}
    del model["candidates"]  # they stand below, and say more there
    del model["trials"]
    specs = [one.spec for one in read if one.spec is not None]
    backbones = [
        {
            "name": spec.name,
            "weights": spec.weights,
            "weights_sha256": spec.weights_sha256,
            "runtime": spec.runtime,
            "preprocessing": asdict(spec.preprocessing),
        }
        for spec in specs
    ]
    manifest = {
        "format": 2,
        "model": model,
        "job": asdict(job),
        "backbones": backbones,
        "candidates": [asdict(candidate) for candidate in result.candidates],
        "trials": [asdict(one) for one in record.trials],
    }
    return json.dumps(manifest, indent=2, sort_keys=True).encode()
