from google.protobuf import timestamp_pb2 as _timestamp_pb2
from trunkline_wire.v1 import error_pb2 as _error_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HeadKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HEAD_KIND_UNSPECIFIED: _ClassVar[HeadKind]
    HEAD_KIND_LINEAR: _ClassVar[HeadKind]
    HEAD_KIND_MLP: _ClassVar[HeadKind]
    HEAD_KIND_CONV: _ClassVar[HeadKind]
    HEAD_KIND_PROTOTYPE: _ClassVar[HeadKind]
    HEAD_KIND_TAIL: _ClassVar[HeadKind]

class Activation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTIVATION_UNSPECIFIED: _ClassVar[Activation]
    ACTIVATION_RELU: _ClassVar[Activation]
    ACTIVATION_GELU: _ClassVar[Activation]

class Fusion(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FUSION_UNSPECIFIED: _ClassVar[Fusion]
    FUSION_CONCAT: _ClassVar[Fusion]
    FUSION_ADD: _ClassVar[Fusion]
    FUSION_GATE: _ClassVar[Fusion]

class Solver(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOLVER_UNSPECIFIED: _ClassVar[Solver]
    SOLVER_LBFGS: _ClassVar[Solver]
    SOLVER_ADAM: _ClassVar[Solver]

class Loss(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOSS_UNSPECIFIED: _ClassVar[Loss]
    LOSS_MSE: _ClassVar[Loss]
    LOSS_HUBER: _ClassVar[Loss]
    LOSS_QUANTILE: _ClassVar[Loss]
    LOSS_CROSS_ENTROPY: _ClassVar[Loss]
    LOSS_FOCAL: _ClassVar[Loss]

class Precision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRECISION_UNSPECIFIED: _ClassVar[Precision]
    PRECISION_FLOAT32: _ClassVar[Precision]
    PRECISION_BFLOAT16: _ClassVar[Precision]
    PRECISION_FLOAT16: _ClassVar[Precision]

class EmbeddingMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EMBEDDING_MODE_UNSPECIFIED: _ClassVar[EmbeddingMode]
    EMBEDDING_MODE_POOLED: _ClassVar[EmbeddingMode]
    EMBEDDING_MODE_AUTO: _ClassVar[EmbeddingMode]
    EMBEDDING_MODE_SLICES: _ClassVar[EmbeddingMode]

class BatchNorm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BATCH_NORM_UNSPECIFIED: _ClassVar[BatchNorm]
    BATCH_NORM_FROZEN: _ClassVar[BatchNorm]
    BATCH_NORM_ADAPT: _ClassVar[BatchNorm]

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_SUCCEEDED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]
HEAD_KIND_UNSPECIFIED: HeadKind
HEAD_KIND_LINEAR: HeadKind
HEAD_KIND_MLP: HeadKind
HEAD_KIND_CONV: HeadKind
HEAD_KIND_PROTOTYPE: HeadKind
HEAD_KIND_TAIL: HeadKind
ACTIVATION_UNSPECIFIED: Activation
ACTIVATION_RELU: Activation
ACTIVATION_GELU: Activation
FUSION_UNSPECIFIED: Fusion
FUSION_CONCAT: Fusion
FUSION_ADD: Fusion
FUSION_GATE: Fusion
SOLVER_UNSPECIFIED: Solver
SOLVER_LBFGS: Solver
SOLVER_ADAM: Solver
LOSS_UNSPECIFIED: Loss
LOSS_MSE: Loss
LOSS_HUBER: Loss
LOSS_QUANTILE: Loss
LOSS_CROSS_ENTROPY: Loss
LOSS_FOCAL: Loss
PRECISION_UNSPECIFIED: Precision
PRECISION_FLOAT32: Precision
PRECISION_BFLOAT16: Precision
PRECISION_FLOAT16: Precision
EMBEDDING_MODE_UNSPECIFIED: EmbeddingMode
EMBEDDING_MODE_POOLED: EmbeddingMode
EMBEDDING_MODE_AUTO: EmbeddingMode
EMBEDDING_MODE_SLICES: EmbeddingMode
BATCH_NORM_UNSPECIFIED: BatchNorm
BATCH_NORM_FROZEN: BatchNorm
BATCH_NORM_ADAPT: BatchNorm
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_SUCCEEDED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState

class HeadConfig(_message.Message):
    __slots__ = ("kind", "hidden", "dropout", "activation", "batch_norm", "channels", "tap", "fuse", "fuse_width", "slices", "lora_rank")
    KIND_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    BATCH_NORM_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    TAP_FIELD_NUMBER: _ClassVar[int]
    FUSE_FIELD_NUMBER: _ClassVar[int]
    FUSE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    kind: HeadKind
    hidden: _containers.RepeatedScalarFieldContainer[int]
    dropout: float
    activation: Activation
    batch_norm: bool
    channels: _containers.RepeatedScalarFieldContainer[int]
    tap: str
    fuse: Fusion
    fuse_width: int
    slices: _containers.RepeatedScalarFieldContainer[str]
    lora_rank: int
    def __init__(self, kind: _Optional[_Union[HeadKind, str]] = ..., hidden: _Optional[_Iterable[int]] = ..., dropout: _Optional[float] = ..., activation: _Optional[_Union[Activation, str]] = ..., batch_norm: bool = ..., channels: _Optional[_Iterable[int]] = ..., tap: _Optional[str] = ..., fuse: _Optional[_Union[Fusion, str]] = ..., fuse_width: _Optional[int] = ..., slices: _Optional[_Iterable[str]] = ..., lora_rank: _Optional[int] = ...) -> None: ...

class FitConfig(_message.Message):
    __slots__ = ("solver", "epochs", "batch_size", "learning_rate", "l2", "validation_fraction", "refit", "seed", "loss", "huber_delta", "quantile", "focal_gamma", "label_smoothing", "class_weights", "balanced", "class_order", "select_by", "warmup", "clip_norm", "ema", "precision", "patience", "calibrate", "mixup")
    SOLVER_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    L2_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_FRACTION_FIELD_NUMBER: _ClassVar[int]
    REFIT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    HUBER_DELTA_FIELD_NUMBER: _ClassVar[int]
    QUANTILE_FIELD_NUMBER: _ClassVar[int]
    FOCAL_GAMMA_FIELD_NUMBER: _ClassVar[int]
    LABEL_SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    CLASS_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    BALANCED_FIELD_NUMBER: _ClassVar[int]
    CLASS_ORDER_FIELD_NUMBER: _ClassVar[int]
    SELECT_BY_FIELD_NUMBER: _ClassVar[int]
    WARMUP_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    EMA_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    CALIBRATE_FIELD_NUMBER: _ClassVar[int]
    MIXUP_FIELD_NUMBER: _ClassVar[int]
    solver: Solver
    epochs: int
    batch_size: int
    learning_rate: float
    l2: float
    validation_fraction: float
    refit: bool
    seed: int
    loss: Loss
    huber_delta: float
    quantile: float
    focal_gamma: float
    label_smoothing: float
    class_weights: _containers.RepeatedScalarFieldContainer[float]
    balanced: bool
    class_order: _containers.RepeatedScalarFieldContainer[str]
    select_by: str
    warmup: float
    clip_norm: float
    ema: float
    precision: Precision
    patience: int
    calibrate: bool
    mixup: float
    def __init__(self, solver: _Optional[_Union[Solver, str]] = ..., epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., learning_rate: _Optional[float] = ..., l2: _Optional[float] = ..., validation_fraction: _Optional[float] = ..., refit: bool = ..., seed: _Optional[int] = ..., loss: _Optional[_Union[Loss, str]] = ..., huber_delta: _Optional[float] = ..., quantile: _Optional[float] = ..., focal_gamma: _Optional[float] = ..., label_smoothing: _Optional[float] = ..., class_weights: _Optional[_Iterable[float]] = ..., balanced: bool = ..., class_order: _Optional[_Iterable[str]] = ..., select_by: _Optional[str] = ..., warmup: _Optional[float] = ..., clip_norm: _Optional[float] = ..., ema: _Optional[float] = ..., precision: _Optional[_Union[Precision, str]] = ..., patience: _Optional[int] = ..., calibrate: bool = ..., mixup: _Optional[float] = ...) -> None: ...

class BackboneChoice(_message.Message):
    __slots__ = ("backbone", "input_size")
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    INPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    input_size: int
    def __init__(self, backbone: _Optional[str] = ..., input_size: _Optional[int] = ...) -> None: ...

class JobSpec(_message.Message):
    __slots__ = ("model", "dataset", "backbone", "input_size", "embedding", "slices", "head", "fit", "more_backbones", "sweep", "fine_tune")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    INPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    MORE_BACKBONES_FIELD_NUMBER: _ClassVar[int]
    SWEEP_FIELD_NUMBER: _ClassVar[int]
    FINE_TUNE_FIELD_NUMBER: _ClassVar[int]
    model: str
    dataset: str
    backbone: str
    input_size: int
    embedding: EmbeddingMode
    slices: _containers.RepeatedScalarFieldContainer[str]
    head: HeadConfig
    fit: FitConfig
    more_backbones: _containers.RepeatedCompositeFieldContainer[BackboneChoice]
    sweep: SweepConfig
    fine_tune: FineTuneConfig
    def __init__(self, model: _Optional[str] = ..., dataset: _Optional[str] = ..., backbone: _Optional[str] = ..., input_size: _Optional[int] = ..., embedding: _Optional[_Union[EmbeddingMode, str]] = ..., slices: _Optional[_Iterable[str]] = ..., head: _Optional[_Union[HeadConfig, _Mapping]] = ..., fit: _Optional[_Union[FitConfig, _Mapping]] = ..., more_backbones: _Optional[_Iterable[_Union[BackboneChoice, _Mapping]]] = ..., sweep: _Optional[_Union[SweepConfig, _Mapping]] = ..., fine_tune: _Optional[_Union[FineTuneConfig, _Mapping]] = ...) -> None: ...

class FineTuneConfig(_message.Message):
    __slots__ = ("cut", "lora_rank", "epochs", "batch_size", "learning_rate", "layer_decay", "weight_decay", "batch_norm", "min_workers", "max_workers")
    CUT_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    LAYER_DECAY_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    BATCH_NORM_FIELD_NUMBER: _ClassVar[int]
    MIN_WORKERS_FIELD_NUMBER: _ClassVar[int]
    MAX_WORKERS_FIELD_NUMBER: _ClassVar[int]
    cut: str
    lora_rank: int
    epochs: int
    batch_size: int
    learning_rate: float
    layer_decay: float
    weight_decay: float
    batch_norm: BatchNorm
    min_workers: int
    max_workers: int
    def __init__(self, cut: _Optional[str] = ..., lora_rank: _Optional[int] = ..., epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., learning_rate: _Optional[float] = ..., layer_decay: _Optional[float] = ..., weight_decay: _Optional[float] = ..., batch_norm: _Optional[_Union[BatchNorm, str]] = ..., min_workers: _Optional[int] = ..., max_workers: _Optional[int] = ...) -> None: ...

class SweepConfig(_message.Message):
    __slots__ = ("l2", "learning_rate", "hidden", "dropout", "embeddings", "folds")
    L2_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    FOLDS_FIELD_NUMBER: _ClassVar[int]
    l2: _containers.RepeatedScalarFieldContainer[float]
    learning_rate: _containers.RepeatedScalarFieldContainer[float]
    hidden: _containers.RepeatedCompositeFieldContainer[Layers]
    dropout: _containers.RepeatedScalarFieldContainer[float]
    embeddings: _containers.RepeatedCompositeFieldContainer[SliceSet]
    folds: int
    def __init__(self, l2: _Optional[_Iterable[float]] = ..., learning_rate: _Optional[_Iterable[float]] = ..., hidden: _Optional[_Iterable[_Union[Layers, _Mapping]]] = ..., dropout: _Optional[_Iterable[float]] = ..., embeddings: _Optional[_Iterable[_Union[SliceSet, _Mapping]]] = ..., folds: _Optional[int] = ...) -> None: ...

class Layers(_message.Message):
    __slots__ = ("widths",)
    WIDTHS_FIELD_NUMBER: _ClassVar[int]
    widths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, widths: _Optional[_Iterable[int]] = ...) -> None: ...

class SliceSet(_message.Message):
    __slots__ = ("slices",)
    SLICES_FIELD_NUMBER: _ClassVar[int]
    slices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, slices: _Optional[_Iterable[str]] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "state", "spec", "error", "model", "num_restarts", "create_time", "start_time", "end_time")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    id: str
    state: JobState
    spec: JobSpec
    error: _error_pb2.Error
    model: str
    num_restarts: int
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    def __init__(self, id: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ..., spec: _Optional[_Union[JobSpec, _Mapping]] = ..., error: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., model: _Optional[str] = ..., num_restarts: _Optional[int] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class JobEvent(_message.Message):
    __slots__ = ("seq", "time", "phase", "progress", "metrics", "message")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    time: _timestamp_pb2.Timestamp
    phase: str
    progress: float
    metrics: _containers.ScalarMap[str, float]
    message: str
    def __init__(self, seq: _Optional[int] = ..., time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., phase: _Optional[str] = ..., progress: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., message: _Optional[str] = ...) -> None: ...

class SubmitJobRequest(_message.Message):
    __slots__ = ("spec", "idempotency_key")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    spec: JobSpec
    idempotency_key: str
    def __init__(self, spec: _Optional[_Union[JobSpec, _Mapping]] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class SubmitJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("id", "idempotency_key")
    ID_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    id: str
    idempotency_key: str
    def __init__(self, id: _Optional[str] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("id", "after_seq")
    ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQ_FIELD_NUMBER: _ClassVar[int]
    id: str
    after_seq: int
    def __init__(self, id: _Optional[str] = ..., after_seq: _Optional[int] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("seq", "event", "job", "end")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    seq: int
    event: JobEvent
    job: Job
    end: _error_pb2.EndOfStream
    def __init__(self, seq: _Optional[int] = ..., event: _Optional[_Union[JobEvent, _Mapping]] = ..., job: _Optional[_Union[Job, _Mapping]] = ..., end: _Optional[_Union[_error_pb2.EndOfStream, _Mapping]] = ...) -> None: ...
