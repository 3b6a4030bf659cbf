"""Plain records of what the store keeps. Times are seconds since the epoch."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from trunkline_wire.fits import FineTuneConfig, LossConfig, OptimiserConfig, SweepConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import FeatureSpace


class JobState(enum.Enum):
    """Where a training job stands. Values are those of ``trunkline_wire.v1.JobState``."""

    QUEUED = 1
    RUNNING = 2
    SUCCEEDED = 3
    FAILED = 4
    CANCELLED = 5

    @property
    def has_ended(self) -> bool:
        """Whether nothing will happen to the job any more."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True)
class DatasetSource:
    """Where the rows of one input of a dataset live, and how they were made and sent, as ``codec_label`` says."""

    space: FeatureSpace
    codec: str = ""


@dataclass(frozen=True)
class DatasetRecord:
    """A version of a dataset.

    ``space`` is ``IMAGES`` where the rows are images. ``codec`` says how the rows were made and sent, as
    ``codec_label`` does; empty where that is not known. ``more_inputs`` stand beside them. Class names and
    ``num_targets`` together: a row may be of several classes. ``num_groups`` is 0 where rows are not grouped. ``views``
    rows, one after another, are views of one picture, the first of them the picture itself.
    """

    tenant: str
    name: str
    version: int
    num_rows: int
    digest: str
    space: FeatureSpace
    class_names: tuple[str, ...]
    num_targets: int
    create_time: float
    codec: str = ""
    more_inputs: tuple[DatasetSource, ...] = ()
    num_groups: int = 0
    views: int = 1

    @property
    def reference(self) -> str:
        """Return ``name@version``."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class DatasetContent:
    """What a version of a dataset is made of, row by row.

    Attributes:
        record: The version.
        row_ids: One per row, in the dataset's order.
        class_indices: uint32, into ``record.class_names``; empty unless every row is of one class.
        targets: float32 (rows, outputs), or (rows, classes) of 0 and 1 where a row may be of several classes; None
            where every row is of one.
        more_row_ids: The same for each of ``record.more_inputs``.
        groups: uint32, the group of each row; None where they are not grouped.
    """

    record: DatasetRecord
    row_ids: list[bytes]
    class_indices: npt.NDArray[np.uint32]
    targets: npt.NDArray[np.float32] | None
    more_row_ids: tuple[list[bytes], ...] = ()
    groups: npt.NDArray[np.uint32] | None = None


@dataclass(frozen=True)
class BackboneChoice:
    """One more backbone that reads a dataset of images. Input size 0 is its own."""

    backbone: str
    input_size: int = 0


HEAD_JOB, TUNING_JOB = JOB_KINDS = ("head", "tuning")
"""What a job needs: a lane, or a fine-tuning run of its own."""


@dataclass(frozen=True)
class JobSpec:
    """What to train. ``embedding`` is ``pooled``, ``auto`` or ``slices``. See ``JobSpec`` in training.proto.

    ``select_by`` is the metric by which strengths and epochs are chosen; empty for the loss.
    """

    model: str
    dataset: str
    backbone: str
    input_size: int
    embedding: str = "auto"
    slices: tuple[str, ...] = ()
    head: HeadConfig = field(default_factory=HeadConfig)
    solver: str = "lbfgs"
    epochs: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    l2: float = -1.0
    validation_fraction: float = 0.2
    refit: bool = True
    seed: int = 0
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    select_by: str = ""
    calibrate: bool = True
    more_backbones: tuple[BackboneChoice, ...] = ()
    sweep: SweepConfig | None = None
    fine_tune: FineTuneConfig | None = None

    @property
    def kind(self) -> str:
        """Return which of ``JOB_KINDS`` it is."""
        return HEAD_JOB if self.fine_tune is None else TUNING_JOB


@dataclass(frozen=True)
class JobRecord:
    """A training job as it stands. ``error_code`` is an ``ErrorCode`` name, empty unless the job failed."""

    id: str
    tenant: str
    state: JobState
    spec: JobSpec
    create_time: float
    start_time: float = 0.0
    end_time: float = 0.0
    num_restarts: int = 0
    cancel_requested: bool = False
    error_code: str = ""
    error_message: str = ""
    model: str = ""


@dataclass(frozen=True)
class Event:
    """Something that happened to a job. ``seq`` counts from 1 within the job; 0 until the store has assigned it."""

    phase: str
    progress: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    message: str = ""
    time: float = 0.0
    seq: int = 0


@dataclass(frozen=True)
class Lease:
    """The right to work on a job until ``deadline``. ``fence`` grows with every lease of the job."""

    job: JobRecord
    fence: int
    deadline: float


@dataclass(frozen=True)
class Candidate:
    """A set of slices that was tried, and how well it did. See ``Candidate`` in registry.proto."""

    slices: tuple[str, ...]
    width: int
    score: float
    accuracy: float | None


@dataclass(frozen=True)
class TrialRecord:
    """A configuration that a sweep tried. See ``Trial`` in registry.proto."""

    slices: tuple[str, ...]
    l2: float
    hidden: tuple[int, ...]
    learning_rate: float
    dropout: float
    scores: tuple[float, ...]
    score: float
    error: str
    seconds: float
    won: bool


@dataclass(frozen=True)
class Conformal:
    """What gives a model's sets and intervals their coverage. See ``Conformal`` in registry.proto."""

    scores: tuple[float, ...]
    num_rows: int
    scales: tuple[float, ...] = ()


@dataclass(frozen=True)
class FineTuning:
    """What came of training the last blocks of the backbone. See ``FineTuning`` in registry.proto."""

    kept: bool
    reason: str
    cut: str
    metric: str = ""
    gain: float = 0.0
    low: float = 0.0
    high: float = 0.0
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    num_trained: int = 0
    epochs: int = 0
    num_workers: int = 0
    num_resumed: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ModelInput:
    """One more tensor that a model needs for each row. See ``ModelInput`` in registry.proto."""

    space: FeatureSpace
    embedding_fingerprint: str
    slices: tuple[str, ...]
    width: int
    codec: str = ""
    codec_error: float = 0.0


@dataclass(frozen=True)
class ModelRecord:
    """A trained model: immutable. ``task`` is one of ``heads.TASKS``.

    ``codec`` and ``codec_error`` say how the rows that it was trained on were made and sent, as ``codec_label`` does,
    and the embedding error of that. An empty codec is not known and counts as exact. ``candidates`` are best first.
    ``outliers_sha256`` is empty where it cannot say how unlike its training rows a row is.
    """

    tenant: str
    name: str
    version: int
    task: str
    class_names: tuple[str, ...]
    num_outputs: int
    space: FeatureSpace
    embedding_fingerprint: str
    slices: tuple[str, ...]
    metrics: Mapping[str, float]
    dataset: str
    dataset_digest: str
    head_sha256: str
    versions: Mapping[str, str]
    job_id: str
    create_time: float
    codec: str = ""
    codec_error: float = 0.0
    candidates: tuple[Candidate, ...] = ()
    more_inputs: tuple[ModelInput, ...] = ()
    head: HeadConfig = field(default_factory=HeadConfig)
    conformal: Conformal | None = None
    warnings: tuple[str, ...] = ()
    trials: tuple[TrialRecord, ...] = ()
    evaluation_sha256: str = ""
    fine_tuning: FineTuning | None = None
    outliers_sha256: str = ""

    @property
    def reference(self) -> str:
        """Return ``name@version``."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class RowLocation:
    """Where a row lies: the chunk's id and the row's index in it."""

    row_id: bytes
    chunk: str
    index: int
