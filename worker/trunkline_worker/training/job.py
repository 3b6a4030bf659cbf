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
from trunkline_wire.quantise import IMAGES
from trunkline_wire.specs import FLOAT32, BackboneSpec, CodecUse, CutCost, CutSpec, FeatureSpace, SliceSpec

from trunkline_worker.engine.api import Extraction, Payload
from trunkline_worker.heads.artefact import head_path, head_to_bytes
from trunkline_worker.store import chunks
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import Clock
from trunkline_worker.store.failpoints import Failpoints
from trunkline_worker.store.records import Candidate, DatasetRecord, Event, JobSpec, Lease, ModelRecord
from trunkline_worker.training.keeper import LeaseKeeper
from trunkline_worker.training.loop import Labels, TrainingCancelled, TrainingResult, train_head

# Shape suffix legend: N = rows of the dataset, D = columns of the embedding

logger = logging.getLogger(__name__)

EMBED_ROWS = 128
"""Rows that are sent through the trunk in one piece, and kept in one chunk."""

_EXACT = frozenset({"", IMAGES, "uint8", FLOAT32})
"""Codecs, as ``codec_label`` names them, that do nothing to the embedding; the empty one is not known."""


class Trunk(Protocol):
    """A backbone somewhere, called from a thread that may wait."""

    def describe(self, backbone: str, input_size: int) -> BackboneSpec:
        """Describe the backbone at an input size."""

    def cut_cost(self, backbone: str, cut: str, input_size: int) -> CutCost:
        """Say what codecs and stems cost at a cut."""

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


@dataclass(frozen=True)
class _Source:
    """Where a dataset's rows enter the trunk."""

    spec: BackboneSpec
    space: FeatureSpace
    cut: CutSpec

    @property
    def slices(self) -> tuple[SliceSpec, ...]:
        """The slices of the embedding behind the cut, side by side from column 0."""
        widths = {one.name: one.width for one in self.spec.slices}
        slices, start = [], 0
        for name in self.cut.slices:
            slices.append(SliceSpec(name, start, start + widths[name]))
            start += widths[name]
        return tuple(slices)

    @property
    def embedding_key(self) -> str:
        """The key that embeddings are cached under: all that the numbers depend on besides the row.

        The network and its preprocessing, the stem where it is not exact, and the columns behind the cut.
        """
        exact = self.cut.precision_of(self.space.fingerprint) == FLOAT32
        origin = self.spec.embedding_fingerprint if exact else self.space.fingerprint
        columns = json.dumps([self.cut.name, *((one.name, one.width) for one in self.slices)])
        return f"{origin}-{hashlib.sha256(columns.encode()).hexdigest()[:32]}"


def _train(lease: Lease, tools: JobTools, keeper: LeaseKeeper) -> ModelRecord:
    job = lease.job
    content = tools.metadata("datasets.rows", job.tenant, job.spec.dataset)
    source = _source(tools.trunk.describe(job.spec.backbone, job.spec.input_size), content.record.space)
    embedding_ND, use = _embedding(job.tenant, source, content.row_ids, tools, keeper)
    codec_error = _codec_error(content.record.codec, source, use, tools.trunk)
    labels = Labels(content.record.class_names, content.class_indices, content.targets)
    started = tools.clock.monotonic()
    result = train_head(
        embedding_ND, source.slices, labels, job.spec, on_event=keeper.report, should_stop=keeper.should_stop
    )
    result.metrics["train_s"] = tools.clock.monotonic() - started
    keeper.report(Event("publish"))
    return _publish(lease, source, content.record, codec_error, result, tools)


def _source(spec: BackboneSpec, space: FeatureSpace) -> _Source:
    """Find where rows enter, and check that the backbone still is what they were made for."""
    cut = spec.cut(space.cut)
    if cut is not None and not space.backbone:
        space = spec.space(cut)
    if cut is None or cut.precision_of(space.fingerprint) is None:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"the dataset's features were made with other weights or preprocessing than {spec.name} has now; "
            "upload the images again",
        )
    return _Source(spec, space, cut)


def _embedding(
    tenant: str, source: _Source, row_ids: Sequence[bytes], tools: JobTools, keeper: LeaseKeeper
) -> tuple[npt.NDArray[np.float32], CodecUse]:
    """Return the embedding of every row, sending through the trunk only rows that never went before.

    Beside it, what the trunk said of the rows' codec; nothing where no row was sent.
    """
    key = source.embedding_key
    unique = list(dict.fromkeys(row_ids))
    missing = [unique[index] for index in tools.metadata("embeddings.missing", tenant, key, unique)]
    keeper.report(Event("embed", 0.0 if missing else 1.0, {"rows": len(unique), "cached": len(unique) - len(missing)}))

    groups = [missing[start : start + EMBED_ROWS] for start in range(0, len(missing), EMBED_ROWS)]

    def batches() -> Iterator[tuple[FeatureSpace, Payload]]:
        for group in groups:
            if keeper.should_stop():
                raise TrainingCancelled
            locations = tools.metadata("rows.locate", tenant, group)
            yield source.space, chunks.read_rows(tools.blobs, locations)

    done = 0
    use = CodecUse()
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
        use = extraction.codec_use
        done += len(group)
        keeper.report(Event("embed", done / len(missing), {"rows": len(unique), "cached": len(unique) - len(missing)}))

    locations = tools.metadata("embeddings.locate", tenant, key, row_ids)
    embedding_ND = chunks.read_rows(tools.blobs, locations)
    if not isinstance(embedding_ND, np.ndarray) or embedding_ND.shape[1] != source.slices[-1].stop:
        raise WireError(ErrorCode.CORRUPT_DATA, "the cached embeddings do not have the backbone's width")
    return embedding_ND.astype(np.float32, copy=False), use


def _codec_error(codec: str, source: _Source, use: CodecUse, trunk: Trunk) -> float:
    """Return what a dataset's codec, its stem included, does to the embedding.

    The trunk is asked only where something is lost and no row went through it.
    """
    if codec in _EXACT:
        return 0.0
    if use.codec == codec:
        return use.embedding_error
    cost = trunk.cut_cost(source.spec.name, source.cut.name, source.space.input_size)
    name, _, precision = codec.partition("@")
    coded, stem = cost.codec(name), cost.stem(precision or FLOAT32)
    if coded is None or stem is None:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            f"the dataset's rows were sent as {codec!r}, which cut {source.cut.name!r} of {source.spec.name} does not "
            "offer now; upload the images again",
        )
    # Together they are measured only where rows are sent; there they came to less than the sum.
    return coded.embedding_error + stem.embedding_error


def _publish(
    lease: Lease,
    source: _Source,
    dataset: DatasetRecord,
    codec_error: float,
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
        space=source.space,
        embedding_fingerprint=source.spec.embedding_fingerprint,
        slices=tuple(head.slices),
        metrics=dict(result.metrics),
        dataset=dataset.reference,
        dataset_digest=dataset.digest,
        head_sha256=sha256,
        versions=dict(tools.versions),
        job_id=job.id,
        create_time=tools.clock.now(),
        codec=dataset.codec,
        codec_error=codec_error,
        candidates=tuple(Candidate(one.slices, one.width, one.score, one.accuracy) for one in result.candidates),
    )
    tools.blobs.put(head_path(sha256), data)
    tools.failpoints.hit("job.head_written")
    tools.blobs.put(manifest_path(job.id, lease.fence), _manifest(record, job.spec, source.spec, result))
    tools.failpoints.hit("job.manifest_written")
    return record


def manifest_path(job_id: str, fence: int) -> str:
    """Return where the manifest of a job's attempt lies."""
    return f"models/{job_id}/{fence}.json"


def _manifest(record: ModelRecord, job: JobSpec, spec: BackboneSpec, result: TrainingResult) -> bytes:
    model = {**asdict(record), "version": None}
    del model["candidates"]  # they stand below, and say more there
    manifest = {
        "format": 1,
        "model": model,
        "job": asdict(job),
        "backbone": {"weights": spec.weights, "weights_sha256": spec.weights_sha256, "runtime": spec.runtime},
        "preprocessing": asdict(spec.preprocessing),
        "candidates": [asdict(candidate) for candidate in result.candidates],
    }
    return json.dumps(manifest, indent=2, sort_keys=True).encode()
