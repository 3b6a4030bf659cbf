from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]
    DATA_TYPE_UINT4: _ClassVar[DataType]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_RAW: _ClassVar[Codec]
    CODEC_ENCODED_IMAGES: _ClassVar[Codec]
    CODEC_AFFINE: _ClassVar[Codec]

class Compression(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPRESSION_UNSPECIFIED: _ClassVar[Compression]
    COMPRESSION_NONE: _ClassVar[Compression]
    COMPRESSION_ZSTD: _ClassVar[Compression]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_BFLOAT16: DataType
DATA_TYPE_UINT4: DataType
CODEC_UNSPECIFIED: Codec
CODEC_RAW: Codec
CODEC_ENCODED_IMAGES: Codec
CODEC_AFFINE: Codec
COMPRESSION_UNSPECIFIED: Compression
COMPRESSION_NONE: Compression
COMPRESSION_ZSTD: Compression

class Tensor(_message.Message):
    __slots__ = ("data_type", "codec", "compression", "shape", "data", "encoded", "affine")
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    AFFINE_FIELD_NUMBER: _ClassVar[int]
    data_type: DataType
    codec: Codec
    compression: Compression
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    encoded: _containers.RepeatedScalarFieldContainer[bytes]
    affine: Affine
    def __init__(self, data_type: _Optional[_Union[DataType, str]] = ..., codec: _Optional[_Union[Codec, str]] = ..., compression: _Optional[_Union[Compression, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., encoded: _Optional[_Iterable[bytes]] = ..., affine: _Optional[_Union[Affine, _Mapping]] = ...) -> None: ...

class Affine(_message.Message):
    __slots__ = ("channel_axis", "scale", "offset")
    CHANNEL_AXIS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    channel_axis: int
    scale: bytes
    offset: bytes
    def __init__(self, channel_axis: _Optional[int] = ..., scale: _Optional[bytes] = ..., offset: _Optional[bytes] = ...) -> None: ...

class FeatureSpace(_message.Message):
    __slots__ = ("backbone", "cut", "input_size", "fingerprint", "local_model", "bottleneck")
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    INPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LOCAL_MODEL_FIELD_NUMBER: _ClassVar[int]
    BOTTLENECK_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    cut: str
    input_size: int
    fingerprint: str
    local_model: str
    bottleneck: str
    def __init__(self, backbone: _Optional[str] = ..., cut: _Optional[str] = ..., input_size: _Optional[int] = ..., fingerprint: _Optional[str] = ..., local_model: _Optional[str] = ..., bottleneck: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_s", "decode_s", "trunk_s", "head_s", "total_s")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    TRUNK_S_FIELD_NUMBER: _ClassVar[int]
    HEAD_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    decode_s: float
    trunk_s: float
    head_s: float
    total_s: float
    def __init__(self, queue_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., trunk_s: _Optional[float] = ..., head_s: _Optional[float] = ..., total_s: _Optional[float] = ...) -> None: ...
