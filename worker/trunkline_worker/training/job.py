"""One training job from its lease to the published model. Free of Ray and gRPC: a lane passes in what it needs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import BackboneSpec, FeatureSpace, SliceSpec

from trunkline_worker.engine.api import Extraction, Payload
from trunkline_worker.heads.artefact import head_path, head_to_bytes
from trunkline_worker.store import chunks
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import Clock
from trunkline_worker.store.failpoints import Failpoints
from trunkline_worker.store.records import Event, JobSpec, Lease, ModelRecord
from trunkline_worker.training.keeper import LeaseKeeper
from trunkline_worker.training.loop import Labels, TrainingCancelled, TrainingResult, train_head

# Shape suffix legend: N = rows of the dataset, D = columns of the embedding

logger = logging.getLogger(__name__)

EMBED_ROWS = 128
"""Rows that are sent through the trunk in one piece, and kept in one chunk."""


class Trunk(Protocol):
    """A backbone somewhere, called from a thread that may wait."""

    def describe(self, backbone: str, input_size: int) -> BackboneSpec:
        """Describe the backbone at an input size."""

    def extract(self, batches: Iterator[tuple[FeatureSpace, Payload]]) -> Iterator[Extraction]:
        """Return the whole embedding of each batch, in order, keeping a few in flight."""


@dataclass(frozen=True)
class JobTools:
    """What a job works with.

    Attributes:
        metadata: Calls the metadata store by name, waiting while it restarts.
        blobs: Chunks and heads.
        trunk: The backbones.
        clock: For lease renewals and the model's time.
        versions: Library to version, for the manifest.
        lease_s: How long a renewed lease lasts, in seconds.
        failpoints: Switched on by tests.
    """

    metadata: Callable[..., Any]
    blobs: BlobStore
    trunk: Trunk
    clock: Clock
    versions: Mapping[str, str]
    lease_s: float
    failpoints: Failpoints


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
        except MemoryError:
            tools.metadata("jobs.fail", job.id, lease.fence, ErrorCode.WORKER_OOM, "the lane ran out of memory")
        except Exception:
            logger.exception("job %s failed", job.id)
            message = "training failed in a way that was not foreseen; the lane's log names this job"
            tools.metadata("jobs.fail", job.id, lease.fence, ErrorCode.INTERNAL, message)


def _train(lease: Lease, tools: JobTools, keeper: LeaseKeeper) -> ModelRecord:
    job = lease.job
    content = tools.metadata("datasets.rows", job.tenant, job.spec.dataset)
    spec = tools.trunk.describe(job.spec.backbone, job.spec.input_size)
    space = content.record.space
    if not space.backbone:
        cut = spec.cut(space.cut)
        assert cut is not None  # every backbone has the cut `input`
        space = spec.space(cut)
    slices, embedding_ND = _embedding(job.tenant, spec, space, content.row_ids, tools, keeper)
    labels = Labels(content.record.class_names, content.class_indices, content.targets)
    started = tools.clock.monotonic()
    result = train_head(embedding_ND, slices, labels, job.spec, on_event=keeper.report, should_stop=keeper.should_stop)
    result.metrics["train_s"] = tools.clock.monotonic() - started
    keeper.report(Event("publish"))
    return _publish(lease, spec, space, content.record, result, tools)


def _embedding(
    tenant: str,
    spec: BackboneSpec,
    space: FeatureSpace,
    row_ids: Sequence[bytes],
    tools: JobTools,
    keeper: LeaseKeeper,
) -> tuple[tuple[SliceSpec, ...], npt.NDArray[np.float32]]:
    """Return the embedding of every row, sending through the trunk only rows that never went before."""
    cut = spec.cut(space.cut)
    if cut is None or cut.fingerprint != space.fingerprint:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"the dataset's features were made with other weights or preprocessing than {spec.name} has now; "
            "upload the images again",
        )
    slices = _behind(spec, cut.slices)
    key = f"{spec.embedding_fingerprint}-{space.cut}"
    unique = list(dict.fromkeys(row_ids))
    missing = [unique[index] for index in tools.metadata("embeddings.missing", tenant, key, unique)]
    keeper.report(Event("embed", 0.0 if missing else 1.0, {"rows": len(unique), "cached": len(unique) - len(missing)}))

    groups = [missing[start : start + EMBED_ROWS] for start in range(0, len(missing), EMBED_ROWS)]

    def batches() -> Iterator[tuple[FeatureSpace, Payload]]:
        for group in groups:
            if keeper.should_stop():
                raise TrainingCancelled
            locations = tools.metadata("rows.locate", tenant, group)
            yield space, chunks.read_rows(tools.blobs, locations)

    done = 0
    for group, extraction in zip(groups, tools.trunk.extract(batches()), strict=True):
        if extraction.row_errors:
            row, error = min(extraction.row_errors.items())
            raise WireError(
                error.code,
                f"{len(extraction.row_errors)} rows of the dataset cannot be read, one of them is row "
                f"{row_ids.index(group[row])}: {error.message}",
            )
        sha256 = chunks.write_chunk(tools.blobs, extraction.embedding_BD)
        tools.failpoints.hit("job.embedding_written")
        tools.metadata("embeddings.add_chunk", tenant, key, sha256, group)
        done += len(group)
        keeper.report(Event("embed", done / len(missing), {"rows": len(unique), "cached": len(unique) - len(missing)}))

    locations = tools.metadata("embeddings.locate", tenant, key, row_ids)
    embedding_ND = chunks.read_rows(tools.blobs, locations)
    if not isinstance(embedding_ND, np.ndarray) or embedding_ND.shape[1] != slices[-1].stop:
        raise WireError(ErrorCode.CORRUPT_DATA, "the cached embeddings do not have the backbone's width")
    return slices, embedding_ND.astype(np.float32, copy=False)


def _behind(spec: BackboneSpec, names: Sequence[str]) -> tuple[SliceSpec, ...]:
    """Return the slices of the embedding behind a cut: a suffix of the whole one, counted from 0."""
    wanted = [one for one in spec.slices if one.name in set(names)]
    first = wanted[0].start
    return tuple(SliceSpec(one.name, one.start - first, one.stop - first) for one in wanted)


def _publish(
    lease: Lease,
    spec: BackboneSpec,
    space: FeatureSpace,
    dataset: Any,
    result: TrainingResult,
    tools: JobTools,
) -> ModelRecord:
    """Make the head and its manifest durable, and return the record that will name them."""
    job = lease.job
    head = result.head
    data = head_to_bytes(head)
    sha256 = hashlib.sha256(data).hexdigest()
    record = ModelRecord(
        tenant=job.tenant,
        name=job.spec.model,
        version=0,  # assigned by the store in the transaction that publishes
        task=head.task,
        class_names=tuple(head.class_names),
        num_outputs=head.num_outputs,
        space=space,
        embedding_fingerprint=spec.embedding_fingerprint,
        slices=tuple(head.slices),
        metrics=dict(result.metrics),
        dataset=f"{dataset.name}@{dataset.version}",
        dataset_digest=dataset.digest,
        head_sha256=sha256,
        versions=dict(tools.versions),
        job_id=job.id,
        create_time=tools.clock.now(),
    )
    tools.blobs.put(head_path(sha256), data)
    tools.failpoints.hit("job.head_written")
    tools.blobs.put(manifest_path(job.id, lease.fence), _manifest(record, job.spec, spec, result))
    tools.failpoints.hit("job.manifest_written")
    return record


def manifest_path(job_id: str, fence: int) -> str:
    """Return where the manifest of a job's attempt lies."""
    return f"models/{job_id}/{fence}.json"


def _manifest(record: ModelRecord, job: JobSpec, spec: BackboneSpec, result: TrainingResult) -> bytes:
    manifest = {
        "format": 1,
        "model": {**asdict(record), "version": None},
        "job": asdict(job),
        "backbone": {"weights": spec.weights, "weights_sha256": spec.weights_sha256, "runtime": spec.runtime},
        "preprocessing": asdict(spec.preprocessing),
        "candidates": [asdict(candidate) for candidate in result.candidates],
    }
    return json.dumps(manifest, indent=2, sort_keys=True).encode()
