from trunkline_wire.v1 import error_pb2 as _error_pb2
from trunkline_wire.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChannelLinear(_message.Message):
    __slots__ = ("weight", "bias")
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    weight: _tensor_pb2.Tensor
    bias: _tensor_pb2.Tensor
    def __init__(self, weight: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., bias: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Bottleneck(_message.Message):
    __slots__ = ("format", "space", "feature_shape", "channel_axis", "encoder", "decoder", "codec", "embedding_error")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    FEATURE_SHAPE_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_AXIS_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_ERROR_FIELD_NUMBER: _ClassVar[int]
    format: int
    space: _tensor_pb2.FeatureSpace
    feature_shape: _containers.RepeatedScalarFieldContainer[int]
    channel_axis: int
    encoder: ChannelLinear
    decoder: ChannelLinear
    codec: str
    embedding_error: float
    def __init__(self, format: _Optional[int] = ..., space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., feature_shape: _Optional[_Iterable[int]] = ..., channel_axis: _Optional[int] = ..., encoder: _Optional[_Union[ChannelLinear, _Mapping]] = ..., decoder: _Optional[_Union[ChannelLinear, _Mapping]] = ..., codec: _Optional[str] = ..., embedding_error: _Optional[float] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("space", "features", "outputs", "decoder", "timeout_s")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    space: _tensor_pb2.FeatureSpace
    features: _tensor_pb2.Tensor
    outputs: _containers.RepeatedScalarFieldContainer[str]
    decoder: ChannelLinear
    timeout_s: float
    def __init__(self, space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., features: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., outputs: _Optional[_Iterable[str]] = ..., decoder: _Optional[_Union[ChannelLinear, _Mapping]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("outputs", "timings")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    outputs: _tensor_pb2.Tensor
    timings: _tensor_pb2.Timings
    def __init__(self, outputs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., timings: _Optional[_Union[_tensor_pb2.Timings, _Mapping]] = ...) -> None: ...

class BackwardRequest(_message.Message):
    __slots__ = ("space", "features", "outputs", "decoder", "gradient", "timeout_s")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    space: _tensor_pb2.FeatureSpace
    features: _tensor_pb2.Tensor
    outputs: _containers.RepeatedScalarFieldContainer[str]
    decoder: ChannelLinear
    gradient: _tensor_pb2.Tensor
    timeout_s: float
    def __init__(self, space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., features: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., outputs: _Optional[_Iterable[str]] = ..., decoder: _Optional[_Union[ChannelLinear, _Mapping]] = ..., gradient: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class BackwardResponse(_message.Message):
    __slots__ = ("gradient", "decoder_gradient", "timings")
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    DECODER_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    gradient: _tensor_pb2.Tensor
    decoder_gradient: ChannelLinear
    timings: _tensor_pb2.Timings
    def __init__(self, gradient: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., decoder_gradient: _Optional[_Union[ChannelLinear, _Mapping]] = ..., timings: _Optional[_Union[_tensor_pb2.Timings, _Mapping]] = ...) -> None: ...

class StreamTrunkRequest(_message.Message):
    __slots__ = ("seq", "forward", "backward", "end")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    seq: int
    forward: ForwardRequest
    backward: BackwardRequest
    end: _error_pb2.EndOfStream
    def __init__(self, seq: _Optional[int] = ..., forward: _Optional[_Union[ForwardRequest, _Mapping]] = ..., backward: _Optional[_Union[BackwardRequest, _Mapping]] = ..., end: _Optional[_Union[_error_pb2.EndOfStream, _Mapping]] = ...) -> None: ...

class StreamTrunkResponse(_message.Message):
    __slots__ = ("seq", "forward", "backward", "error", "end")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    seq: int
    forward: ForwardResponse
    backward: BackwardResponse
    error: _error_pb2.Error
    end: _error_pb2.EndOfStream
    def __init__(self, seq: _Optional[int] = ..., forward: _Optional[_Union[ForwardResponse, _Mapping]] = ..., backward: _Optional[_Union[BackwardResponse, _Mapping]] = ..., error: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., end: _Optional[_Union[_error_pb2.EndOfStream, _Mapping]] = ...) -> None: ...

class PutBottleneckRequest(_message.Message):
    __slots__ = ("file",)
    FILE_FIELD_NUMBER: _ClassVar[int]
    file: bytes
    def __init__(self, file: _Optional[bytes] = ...) -> None: ...

class PutBottleneckResponse(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class GetBottleneckRequest(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class GetBottleneckResponse(_message.Message):
    __slots__ = ("file",)
    FILE_FIELD_NUMBER: _ClassVar[int]
    file: bytes
    def __init__(self, file: _Optional[bytes] = ...) -> None: ...
