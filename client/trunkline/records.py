"""Plain descriptions of what the cluster keeps. No gRPC, no protobuf."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

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
class DatasetRecord:
    """A version of a dataset. ``codec`` says how its rows were made and sent. See ``Dataset.codec``."""

    name: str
    version: int
    num_rows: int
    digest: str
    space: FeatureSpace
    class_names: tuple[str, ...]
    num_targets: int
    create_time: datetime | None
    codec: str = ""

    @property
    def reference(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"


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
class Linear:
    """A head of one linear layer on the standardised embedding."""


@dataclass(frozen=True)
class MLP:
    """A head with hidden layers.

    Attributes:
        hidden: Width of each hidden layer.
        dropout: Probability of dropping a hidden unit while training, 0 to 1.
    """

    hidden: tuple[int, ...] = (1024,)
    dropout: float = 0.0


@dataclass(frozen=True)
class FitConfig:
    """How a head is trained. See ``Client.train``."""

    solver: str
    epochs: int
    batch_size: int
    learning_rate: float
    l2: float
    validation_fraction: float
    refit: bool
    seed: int


@dataclass(frozen=True)
class JobSpec:
    """What to train. ``embedding`` is ``pooled``, ``auto`` or ``slices``."""

    model: str
    dataset: str
    backbone: str
    input_size: int
    embedding: str
    slices: tuple[str, ...]
    head: Linear | MLP
    fit: FitConfig


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
class ModelRecord:
    """A trained model: immutable.

    Attributes:
        codec: How the rows that it was trained on were made and sent: ``float16``, ``int8@int8``, ``images`` ...
        codec_error: What that does to the embedding.
        candidates: Sets of slices that were tried, best first. Empty unless they were chosen automatically, and in
            lists of models.
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

    @property
    def reference(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"
