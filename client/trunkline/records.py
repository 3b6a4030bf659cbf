"""Plain descriptions of what the cluster keeps. No gRPC, no protobuf."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import numpy.typing as npt
from trunkline_wire.fits import FineTuneConfig, LossConfig, OptimiserConfig, SweepConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import FeatureSpace

from trunkline.errors import TrunklineError


@dataclass(frozen=True)
class ServerInfo:
    """What a cluster says about itself.

    Attributes:
        time_s: Its clock, in seconds since the epoch.
        codecs: Codecs that it reads. Empty if it is too old to say; it reads ``float32`` and ``float16`` then.
    """

    version: str
    wire_version: int
    versions: Mapping[str, str]
    max_message_bytes: int
    max_batch_rows: int
    time_s: float
    tenant: str
    storage_shared: bool
    storage_note: str
    codecs: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetSource:
    """Where the rows of one input of a dataset live. ``codec`` says how they were made and sent."""

    space: FeatureSpace
    codec: str = ""


@dataclass(frozen=True)
class DatasetRecord:
    """A version of a dataset.

    Class names and ``num_targets`` together say that a row may be of several classes.

    Attributes:
        codec: How the rows of the first input were made and sent. See ``Dataset.codec``.
        more_inputs: What stands beside the first input.
        num_groups: Groups that are never split. 0: rows are not grouped.
        views: So many rows, one after another, are views of one picture.
    """

    name: str
    version: int
    num_rows: int
    digest: str
    space: FeatureSpace
    class_names: tuple[str, ...]
    num_targets: int
    create_time: datetime | None
    codec: str = ""
    more_inputs: tuple[DatasetSource, ...] = ()
    num_groups: int = 0
    views: int = 1

    @property
    def reference(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def inputs(self) -> tuple[DatasetSource, ...]:
        """All of its inputs, the first included."""
        return (DatasetSource(self.space, self.codec), *self.more_inputs)


class JobState(enum.Enum):
    """Where a training job stands. Values are those of the wire."""

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
class FitConfig:
    """How a head is trained. See ``Client.train``. ``loss`` is None if it is one that this version does not know."""

    solver: str
    epochs: int
    batch_size: int
    learning_rate: float
    l2: float
    validation_fraction: float
    refit: bool
    seed: int
    loss: LossConfig | None = field(default_factory=LossConfig)
    optimiser: OptimiserConfig | None = field(default_factory=OptimiserConfig)
    select_by: str = ""
    calibrate: bool = True


@dataclass(frozen=True)
class BackboneChoice:
    """One more backbone that reads a dataset of images. Input size 0 is its own."""

    backbone: str
    input_size: int = 0


@dataclass(frozen=True)
class JobSpec:
    """What to train.

    Attributes:
        embedding: ``pooled``, ``auto`` or ``slices``.
        head: What the head is made of. None if it is of a kind that this version does not know.
        more_backbones: Who reads a dataset of images beside ``backbone``.
        sweep: What is tried. None: nothing is.
        fine_tune: How the last blocks of the backbone are trained. None: they are not.
    """

    model: str
    dataset: str
    backbone: str
    input_size: int
    embedding: str
    slices: tuple[str, ...]
    head: HeadConfig | None
    fit: FitConfig
    more_backbones: tuple[BackboneChoice, ...] = ()
    sweep: SweepConfig | None = None
    fine_tune: FineTuneConfig | None = None


@dataclass(frozen=True)
class JobStatus:
    """A training job as it stands.

    Attributes:
        id: Its id.
        state: Where it stands.
        spec: What was asked for.
        error: Why it failed. None unless it did.
        model: ``name@version`` of the model, empty unless it succeeded.
        num_restarts: How often it was taken back from a worker that died.
    """

    id: str
    state: JobState
    spec: JobSpec
    error: TrunklineError | None
    model: str
    num_restarts: int
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job. ``progress`` is the fraction of the phase that is done."""

    seq: int
    time: datetime | None
    phase: str
    progress: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    message: str = ""


@dataclass(frozen=True)
class Candidate:
    """A set of slices of the embedding and how well it did in cross-validation.

    Attributes:
        slices: Their names.
        width: Columns in all.
        score: Higher is better: minus the cross-entropy in nats a row, or R2.
        accuracy: Fraction of held-out rows that was right; None for numbers.
    """

    slices: tuple[str, ...]
    width: int
    score: float
    accuracy: float | None


@dataclass(frozen=True)
class ModelInput:
    """One more tensor that a model needs for each row, beside the first one.

    Attributes:
        space: Where its rows live.
        embedding_fingerprint: Of the backbone's embedding; empty for local features.
        slices: Of the embedding that the head reads; local features are one, of the local model's name.
        width: Columns in all.
        codec: As that of ``ModelRecord``.
        codec_error: Likewise.
    """

    space: FeatureSpace
    embedding_fingerprint: str
    slices: tuple[str, ...]
    width: int
    codec: str = ""
    codec_error: float = 0.0


@dataclass(frozen=True)
class Trial:
    """A configuration that a sweep tried, and how well it did in cross-validation on the training rows.

    Attributes:
        slices: Of the embedding.
        l2: Strength of the penalty; with hidden layers AdamW's weight decay.
        hidden: Widths of the hidden layers; none in a linear head.
        learning_rate: Of heads that learn in steps; 0 for the cluster's default.
        dropout: Of heads with layers of their own.
        scores: One a fold, higher is better. Empty if it failed; one alone if it was dropped.
        score: Their mean.
        error: Why it failed.
        seconds: Its share of the time of those that were computed together.
        won: Whether it is the one that was trained on everything.
        dropped: Whether it was left behind after a fifth of the epochs on the first fold. Its score is of that, and
            no match for the others'.
    """

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
    dropped: bool = False


@dataclass(frozen=True)
class LabelSuspect:
    """A row whose label looks wrong.

    Attributes:
        row: Its place in the dataset.
        given: The class that it was given, by its place in ``class_names``.
        suggested: The class that it is more likely of.
        margin: By how much: a difference of probabilities.
    """

    row: int
    given: int
    suggested: int
    margin: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the cluster keeps of a training for its report.

    Attributes:
        rows: Held-out rows, by their places in the dataset, ascending; a sample where they are many.
        num_held_out: Of so many.
        classes_N: The true class of each; None unless each is of one.
        targets_NK: What each should be; None where there are classes.
        answers_NK: Probabilities or values, as the model that was measured says them.
        curves: By epoch, or by step: ``loss``, ``validation_loss`` ...
        suspects: Rows whose label looks wrong, the most doubtful first.
    """

    rows: npt.NDArray[np.int64]
    num_held_out: int
    classes_N: npt.NDArray[np.int64] | None
    targets_NK: npt.NDArray[np.float32] | None
    answers_NK: npt.NDArray[np.float32]
    curves: Mapping[str, tuple[float, ...]]
    suspects: tuple[LabelSuspect, ...]


@dataclass(frozen=True)
class Conformal:
    """What gives sets and intervals of predictions their coverage: how unlike the truth held-out rows were.

    Attributes:
        scores: Ascending, thinned so that sets only grow by it.
        num_rows: Held-out rows that they stand for.
        scales: Of each output, for numbers: what a score of 1 is worth.
    """

    scores: tuple[float, ...]
    num_rows: int
    scales: tuple[float, ...] = ()


@dataclass(frozen=True)
class FineTuning:
    """What came of training the last blocks of the backbone.

    Attributes:
        kept: Whether the model has them. Otherwise it is the head alone, on the backbone as it is.
        reason: In a sentence.
        cut: Behind which they lie.
        metric: What held-out rows were compared by, each on its own, higher is better.
        gain: Its mean gain a row.
        low: End of the gain's 95 % interval.
        high: The other one.
        before: Held-out scores of the head alone.
        after: Of the head on the trained blocks.
        num_trained: Numbers that were trained, the head's included.
        epochs: Passes over the rows.
        num_workers: That worked on it.
        num_resumed: How often it went on from a checkpoint after workers were lost.
        seconds: That it took.
    """

    kept: bool
    reason: str
    cut: str
    metric: str
    gain: float
    low: float
    high: float
    before: Mapping[str, float]
    after: Mapping[str, float]
    num_trained: int
    epochs: int
    num_workers: int
    num_resumed: int
    seconds: float


@dataclass(frozen=True)
class ModelRecord:
    """A trained model: immutable.

    Attributes:
        task: ``classification``, ``multi_label``, ``ordinal`` or ``regression``.
        codec: How the rows that it was trained on were made and sent: ``float16``, ``int8@int8``, ``images`` ...
        codec_error: What that does to the embedding.
        candidates: Sets of slices that were tried, best first. Empty unless they were chosen automatically, and in
            lists of models.
        more_inputs: What it needs beside its first input, in the order of the head's columns.
        head: What its head is made of. None if the cluster does not say, or this version does not know the kind.
        conformal: What gives sets and intervals their coverage. None where no rows were held out, and in lists.
        warnings: What its maker should know before trusting it.
        trials: What a sweep tried, in its order. Empty in lists.
        fine_tuning: What came of it; None where it was not tried.
        has_outlier_scores: Whether it can say how unlike its training rows a row is.
    """

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
    create_time: datetime | None
    codec: str = ""
    codec_error: float = 0.0
    candidates: tuple[Candidate, ...] = ()
    more_inputs: tuple[ModelInput, ...] = ()
    head: HeadConfig | None = None
    conformal: Conformal | None = None
    warnings: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    fine_tuning: FineTuning | None = None
    has_outlier_scores: bool = False

    @property
    def reference(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def inputs(self) -> tuple[DatasetSource, ...]:
        """Where the rows of all of its inputs live, the first included, and how those it was trained on were sent."""
        return (
            DatasetSource(self.space, self.codec),
            *(DatasetSource(one.space, one.codec) for one in self.more_inputs),
        )
