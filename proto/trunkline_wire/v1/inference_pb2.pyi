from trunkline_wire.v1 import catalog_pb2 as _catalog_pb2
from trunkline_wire.v1 import error_pb2 as _error_pb2
from trunkline_wire.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CodecUse(_message.Message):
    __slots__ = ("codec", "embedding_error", "trained_codec", "trained_error")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_ERROR_FIELD_NUMBER: _ClassVar[int]
    TRAINED_CODEC_FIELD_NUMBER: _ClassVar[int]
    TRAINED_ERROR_FIELD_NUMBER: _ClassVar[int]
    codec: str
    embedding_error: float
    trained_codec: str
    trained_error: float
    def __init__(self, codec: _Optional[str] = ..., embedding_error: _Optional[float] = ..., trained_codec: _Optional[str] = ..., trained_error: _Optional[float] = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("space", "features")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    space: _tensor_pb2.FeatureSpace
    features: _tensor_pb2.Tensor
    def __init__(self, space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., features: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("space", "features", "model", "timeout_s", "more_inputs", "outlier_scores")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    MORE_INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTLIER_SCORES_FIELD_NUMBER: _ClassVar[int]
    space: _tensor_pb2.FeatureSpace
    features: _tensor_pb2.Tensor
    model: str
    timeout_s: float
    more_inputs: _containers.RepeatedCompositeFieldContainer[Input]
    outlier_scores: bool
    def __init__(self, space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., features: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., model: _Optional[str] = ..., timeout_s: _Optional[float] = ..., more_inputs: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., outlier_scores: bool = ...) -> None: ...

class PredictResponse(_message.Message):
    __slots__ = ("model", "outputs", "labels", "row_errors", "timings", "codec_use", "outlier_distances", "outlier_scores")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ROW_ERRORS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    CODEC_USE_FIELD_NUMBER: _ClassVar[int]
    OUTLIER_DISTANCES_FIELD_NUMBER: _ClassVar[int]
    OUTLIER_SCORES_FIELD_NUMBER: _ClassVar[int]
    model: str
    outputs: _tensor_pb2.Tensor
    labels: _containers.RepeatedScalarFieldContainer[str]
    row_errors: _containers.RepeatedCompositeFieldContainer[_error_pb2.RowError]
    timings: _tensor_pb2.Timings
    codec_use: CodecUse
    outlier_distances: _containers.RepeatedScalarFieldContainer[float]
    outlier_scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, model: _Optional[str] = ..., outputs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., labels: _Optional[_Iterable[str]] = ..., row_errors: _Optional[_Iterable[_Union[_error_pb2.RowError, _Mapping]]] = ..., timings: _Optional[_Union[_tensor_pb2.Timings, _Mapping]] = ..., codec_use: _Optional[_Union[CodecUse, _Mapping]] = ..., outlier_distances: _Optional[_Iterable[float]] = ..., outlier_scores: _Optional[_Iterable[float]] = ...) -> None: ...

class StreamPredictRequest(_message.Message):
    __slots__ = ("seq", "predict", "end")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    PREDICT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    seq: int
    predict: PredictRequest
    end: _error_pb2.EndOfStream
    def __init__(self, seq: _Optional[int] = ..., predict: _Optional[_Union[PredictRequest, _Mapping]] = ..., end: _Optional[_Union[_error_pb2.EndOfStream, _Mapping]] = ...) -> None: ...

class StreamPredictResponse(_message.Message):
    __slots__ = ("seq", "result", "error", "end")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    seq: int
    result: PredictResponse
    error: _error_pb2.Error
    end: _error_pb2.EndOfStream
    def __init__(self, seq: _Optional[int] = ..., result: _Optional[_Union[PredictResponse, _Mapping]] = ..., error: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., end: _Optional[_Union[_error_pb2.EndOfStream, _Mapping]] = ...) -> None: ...

class ExtractRequest(_message.Message):
    __slots__ = ("space", "features", "slices", "timeout_s")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    space: _tensor_pb2.FeatureSpace
    features: _tensor_pb2.Tensor
    slices: _containers.RepeatedScalarFieldContainer[str]
    timeout_s: float
    def __init__(self, space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., features: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., slices: _Optional[_Iterable[str]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class ExtractResponse(_message.Message):
    __slots__ = ("embedding", "slices", "row_errors", "timings", "codec_use")
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    ROW_ERRORS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    CODEC_USE_FIELD_NUMBER: _ClassVar[int]
    embedding: _tensor_pb2.Tensor
    slices: _containers.RepeatedCompositeFieldContainer[_catalog_pb2.Slice]
    row_errors: _containers.RepeatedCompositeFieldContainer[_error_pb2.RowError]
    timings: _tensor_pb2.Timings
    codec_use: CodecUse
    def __init__(self, embedding: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., slices: _Optional[_Iterable[_Union[_catalog_pb2.Slice, _Mapping]]] = ..., row_errors: _Optional[_Iterable[_Union[_error_pb2.RowError, _Mapping]]] = ..., timings: _Optional[_Union[_tensor_pb2.Timings, _Mapping]] = ..., codec_use: _Optional[_Union[CodecUse, _Mapping]] = ...) -> None: ...

class StreamExtractRequest(_message.Message):
    __slots__ = ("seq", "extract", "end")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    EXTRACT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    seq: int
    extract: ExtractRequest
    end: _error_pb2.EndOfStream
    def __init__(self, seq: _Optional[int] = ..., extract: _Optional[_Union[ExtractRequest, _Mapping]] = ..., end: _Optional[_Union[_error_pb2.EndOfStream, _Mapping]] = ...) -> None: ...

class StreamExtractResponse(_message.Message):
    __slots__ = ("seq", "result", "error", "end")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    seq: int
    result: ExtractResponse
    error: _error_pb2.Error
    end: _error_pb2.EndOfStream
    def __init__(self, seq: _Optional[int] = ..., result: _Optional[_Union[ExtractResponse, _Mapping]] = ..., error: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., end: _Optional[_Union[_error_pb2.EndOfStream, _Mapping]] = ...) -> None: ...
