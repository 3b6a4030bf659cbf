from google.protobuf import timestamp_pb2 as _timestamp_pb2
from trunkline_wire.v1 import tensor_pb2 as _tensor_pb2
from trunkline_wire.v1 import training_pb2 as _training_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Task(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_UNSPECIFIED: _ClassVar[Task]
    TASK_CLASSIFICATION: _ClassVar[Task]
    TASK_REGRESSION: _ClassVar[Task]
    TASK_MULTI_LABEL: _ClassVar[Task]
    TASK_ORDINAL: _ClassVar[Task]
TASK_UNSPECIFIED: Task
TASK_CLASSIFICATION: Task
TASK_REGRESSION: Task
TASK_MULTI_LABEL: Task
TASK_ORDINAL: Task

class ModelInput(_message.Message):
    __slots__ = ("space", "embedding_fingerprint", "slices", "width", "codec", "codec_error")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CODEC_ERROR_FIELD_NUMBER: _ClassVar[int]
    space: _tensor_pb2.FeatureSpace
    embedding_fingerprint: str
    slices: _containers.RepeatedScalarFieldContainer[str]
    width: int
    codec: str
    codec_error: float
    def __init__(self, space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., embedding_fingerprint: _Optional[str] = ..., slices: _Optional[_Iterable[str]] = ..., width: _Optional[int] = ..., codec: _Optional[str] = ..., codec_error: _Optional[float] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "task", "class_names", "num_outputs", "space", "embedding_fingerprint", "slices", "metrics", "dataset", "dataset_digest", "head_sha256", "versions", "job_id", "create_time", "codec", "codec_error", "candidates", "more_inputs", "head", "conformal", "warnings", "trials", "fine_tuning", "has_outlier_scores")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAMES_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    DATASET_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HEAD_SHA256_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CODEC_ERROR_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    MORE_INPUTS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CONFORMAL_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    TRIALS_FIELD_NUMBER: _ClassVar[int]
    FINE_TUNING_FIELD_NUMBER: _ClassVar[int]
    HAS_OUTLIER_SCORES_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    task: Task
    class_names: _containers.RepeatedScalarFieldContainer[str]
    num_outputs: int
    space: _tensor_pb2.FeatureSpace
    embedding_fingerprint: str
    slices: _containers.RepeatedScalarFieldContainer[str]
    metrics: _containers.ScalarMap[str, float]
    dataset: str
    dataset_digest: str
    head_sha256: str
    versions: _containers.ScalarMap[str, str]
    job_id: str
    create_time: _timestamp_pb2.Timestamp
    codec: str
    codec_error: float
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    more_inputs: _containers.RepeatedCompositeFieldContainer[ModelInput]
    head: _training_pb2.HeadConfig
    conformal: Conformal
    warnings: _containers.RepeatedScalarFieldContainer[str]
    trials: _containers.RepeatedCompositeFieldContainer[Trial]
    fine_tuning: FineTuning
    has_outlier_scores: bool
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., task: _Optional[_Union[Task, str]] = ..., class_names: _Optional[_Iterable[str]] = ..., num_outputs: _Optional[int] = ..., space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., embedding_fingerprint: _Optional[str] = ..., slices: _Optional[_Iterable[str]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., dataset: _Optional[str] = ..., dataset_digest: _Optional[str] = ..., head_sha256: _Optional[str] = ..., versions: _Optional[_Mapping[str, str]] = ..., job_id: _Optional[str] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., codec: _Optional[str] = ..., codec_error: _Optional[float] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., more_inputs: _Optional[_Iterable[_Union[ModelInput, _Mapping]]] = ..., head: _Optional[_Union[_training_pb2.HeadConfig, _Mapping]] = ..., conformal: _Optional[_Union[Conformal, _Mapping]] = ..., warnings: _Optional[_Iterable[str]] = ..., trials: _Optional[_Iterable[_Union[Trial, _Mapping]]] = ..., fine_tuning: _Optional[_Union[FineTuning, _Mapping]] = ..., has_outlier_scores: bool = ...) -> None: ...

class FineTuning(_message.Message):
    __slots__ = ("kept", "reason", "cut", "metric", "gain", "low", "high", "before", "after", "num_trained", "epochs", "num_workers", "num_resumed", "seconds")
    class BeforeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class AfterEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    KEPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    GAIN_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    NUM_TRAINED_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    NUM_WORKERS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESUMED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    kept: bool
    reason: str
    cut: str
    metric: str
    gain: float
    low: float
    high: float
    before: _containers.ScalarMap[str, float]
    after: _containers.ScalarMap[str, float]
    num_trained: int
    epochs: int
    num_workers: int
    num_resumed: int
    seconds: float
    def __init__(self, kept: bool = ..., reason: _Optional[str] = ..., cut: _Optional[str] = ..., metric: _Optional[str] = ..., gain: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., before: _Optional[_Mapping[str, float]] = ..., after: _Optional[_Mapping[str, float]] = ..., num_trained: _Optional[int] = ..., epochs: _Optional[int] = ..., num_workers: _Optional[int] = ..., num_resumed: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Trial(_message.Message):
    __slots__ = ("slices", "l2", "hidden", "learning_rate", "dropout", "scores", "score", "error", "seconds", "won")
    SLICES_FIELD_NUMBER: _ClassVar[int]
    L2_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WON_FIELD_NUMBER: _ClassVar[int]
    slices: _containers.RepeatedScalarFieldContainer[str]
    l2: float
    hidden: _containers.RepeatedScalarFieldContainer[int]
    learning_rate: float
    dropout: float
    scores: _containers.RepeatedScalarFieldContainer[float]
    score: float
    error: str
    seconds: float
    won: bool
    def __init__(self, slices: _Optional[_Iterable[str]] = ..., l2: _Optional[float] = ..., hidden: _Optional[_Iterable[int]] = ..., learning_rate: _Optional[float] = ..., dropout: _Optional[float] = ..., scores: _Optional[_Iterable[float]] = ..., score: _Optional[float] = ..., error: _Optional[str] = ..., seconds: _Optional[float] = ..., won: bool = ...) -> None: ...

class Conformal(_message.Message):
    __slots__ = ("scores", "num_rows", "scales")
    SCORES_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedScalarFieldContainer[float]
    num_rows: int
    scales: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, scores: _Optional[_Iterable[float]] = ..., num_rows: _Optional[int] = ..., scales: _Optional[_Iterable[float]] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("slices", "width", "score", "accuracy")
    SLICES_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    slices: _containers.RepeatedScalarFieldContainer[str]
    width: int
    score: float
    accuracy: float
    def __init__(self, slices: _Optional[_Iterable[str]] = ..., width: _Optional[int] = ..., score: _Optional[float] = ..., accuracy: _Optional[float] = ...) -> None: ...

class Curve(_message.Message):
    __slots__ = ("name", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class LabelSuspect(_message.Message):
    __slots__ = ("row", "given", "suggested", "margin")
    ROW_FIELD_NUMBER: _ClassVar[int]
    GIVEN_FIELD_NUMBER: _ClassVar[int]
    SUGGESTED_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    row: int
    given: int
    suggested: int
    margin: float
    def __init__(self, row: _Optional[int] = ..., given: _Optional[int] = ..., suggested: _Optional[int] = ..., margin: _Optional[float] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("rows", "num_held_out", "classes", "targets", "answers", "curves", "suspects")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    CURVES_FIELD_NUMBER: _ClassVar[int]
    SUSPECTS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    num_held_out: int
    classes: _containers.RepeatedScalarFieldContainer[int]
    targets: _tensor_pb2.Tensor
    answers: _tensor_pb2.Tensor
    curves: _containers.RepeatedCompositeFieldContainer[Curve]
    suspects: _containers.RepeatedCompositeFieldContainer[LabelSuspect]
    def __init__(self, rows: _Optional[_Iterable[int]] = ..., num_held_out: _Optional[int] = ..., classes: _Optional[_Iterable[int]] = ..., targets: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., answers: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., curves: _Optional[_Iterable[_Union[Curve, _Mapping]]] = ..., suspects: _Optional[_Iterable[_Union[LabelSuspect, _Mapping]]] = ...) -> None: ...

class GetModelEvaluationRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelEvaluationResponse(_message.Message):
    __slots__ = ("evaluation",)
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    evaluation: Evaluation
    def __init__(self, evaluation: _Optional[_Union[Evaluation, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...
