from trunkline_wire.v1 import error_pb2 as _error_pb2
from trunkline_wire.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "wire_version", "versions", "max_message_bytes", "max_batch_rows", "time_s", "tenant", "storage_shared", "storage_note", "codecs")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    STORAGE_SHARED_FIELD_NUMBER: _ClassVar[int]
    STORAGE_NOTE_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    version: str
    wire_version: int
    versions: _containers.ScalarMap[str, str]
    max_message_bytes: int
    max_batch_rows: int
    time_s: float
    tenant: str
    storage_shared: bool
    storage_note: str
    codecs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[str] = ..., wire_version: _Optional[int] = ..., versions: _Optional[_Mapping[str, str]] = ..., max_message_bytes: _Optional[int] = ..., max_batch_rows: _Optional[int] = ..., time_s: _Optional[float] = ..., tenant: _Optional[str] = ..., storage_shared: bool = ..., storage_note: _Optional[str] = ..., codecs: _Optional[_Iterable[str]] = ...) -> None: ...

class Preprocessing(_message.Message):
    __slots__ = ("input_size", "crop_fraction", "interpolation", "mean", "std")
    INPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    CROP_FRACTION_FIELD_NUMBER: _ClassVar[int]
    INTERPOLATION_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    input_size: int
    crop_fraction: float
    interpolation: str
    mean: _containers.RepeatedScalarFieldContainer[float]
    std: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, input_size: _Optional[int] = ..., crop_fraction: _Optional[float] = ..., interpolation: _Optional[str] = ..., mean: _Optional[_Iterable[float]] = ..., std: _Optional[_Iterable[float]] = ...) -> None: ...

class Cut(_message.Message):
    __slots__ = ("name", "feature_shape", "fingerprint", "slices", "channel_axis", "is_stage", "stem_macs", "stem_parameters", "int8_fingerprint", "map_shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FEATURE_SHAPE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_AXIS_FIELD_NUMBER: _ClassVar[int]
    IS_STAGE_FIELD_NUMBER: _ClassVar[int]
    STEM_MACS_FIELD_NUMBER: _ClassVar[int]
    STEM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    INT8_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAP_SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    feature_shape: _containers.RepeatedScalarFieldContainer[int]
    fingerprint: str
    slices: _containers.RepeatedScalarFieldContainer[str]
    channel_axis: int
    is_stage: bool
    stem_macs: int
    stem_parameters: int
    int8_fingerprint: str
    map_shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., feature_shape: _Optional[_Iterable[int]] = ..., fingerprint: _Optional[str] = ..., slices: _Optional[_Iterable[str]] = ..., channel_axis: _Optional[int] = ..., is_stage: bool = ..., stem_macs: _Optional[int] = ..., stem_parameters: _Optional[int] = ..., int8_fingerprint: _Optional[str] = ..., map_shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Slice(_message.Message):
    __slots__ = ("name", "start", "stop")
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    name: str
    start: int
    stop: int
    def __init__(self, name: _Optional[str] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class Backbone(_message.Message):
    __slots__ = ("name", "pretrained", "weights", "weights_sha256", "num_parameters", "preprocessing", "resizable", "cuts", "slices", "embedding_fingerprint", "runtime", "device", "runtime_error", "macs", "class_names", "rows_per_s", "batch_rows")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PRETRAINED_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PREPROCESSING_FIELD_NUMBER: _ClassVar[int]
    RESIZABLE_FIELD_NUMBER: _ClassVar[int]
    CUTS_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_ERROR_FIELD_NUMBER: _ClassVar[int]
    MACS_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAMES_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_S_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    pretrained: bool
    weights: str
    weights_sha256: str
    num_parameters: int
    preprocessing: Preprocessing
    resizable: bool
    cuts: _containers.RepeatedCompositeFieldContainer[Cut]
    slices: _containers.RepeatedCompositeFieldContainer[Slice]
    embedding_fingerprint: str
    runtime: str
    device: str
    runtime_error: float
    macs: int
    class_names: _containers.RepeatedScalarFieldContainer[str]
    rows_per_s: float
    batch_rows: int
    def __init__(self, name: _Optional[str] = ..., pretrained: bool = ..., weights: _Optional[str] = ..., weights_sha256: _Optional[str] = ..., num_parameters: _Optional[int] = ..., preprocessing: _Optional[_Union[Preprocessing, _Mapping]] = ..., resizable: bool = ..., cuts: _Optional[_Iterable[_Union[Cut, _Mapping]]] = ..., slices: _Optional[_Iterable[_Union[Slice, _Mapping]]] = ..., embedding_fingerprint: _Optional[str] = ..., runtime: _Optional[str] = ..., device: _Optional[str] = ..., runtime_error: _Optional[float] = ..., macs: _Optional[int] = ..., class_names: _Optional[_Iterable[str]] = ..., rows_per_s: _Optional[float] = ..., batch_rows: _Optional[int] = ...) -> None: ...

class ListBackbonesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBackbonesResponse(_message.Message):
    __slots__ = ("backbones",)
    BACKBONES_FIELD_NUMBER: _ClassVar[int]
    backbones: _containers.RepeatedCompositeFieldContainer[Backbone]
    def __init__(self, backbones: _Optional[_Iterable[_Union[Backbone, _Mapping]]] = ...) -> None: ...

class DescribeBackboneRequest(_message.Message):
    __slots__ = ("backbone", "input_size")
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    INPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    input_size: int
    def __init__(self, backbone: _Optional[str] = ..., input_size: _Optional[int] = ...) -> None: ...

class DescribeBackboneResponse(_message.Message):
    __slots__ = ("backbone",)
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    backbone: Backbone
    def __init__(self, backbone: _Optional[_Union[Backbone, _Mapping]] = ...) -> None: ...

class DescribeCutRequest(_message.Message):
    __slots__ = ("backbone", "cut", "input_size")
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    INPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    cut: str
    input_size: int
    def __init__(self, backbone: _Optional[str] = ..., cut: _Optional[str] = ..., input_size: _Optional[int] = ...) -> None: ...

class CodecCost(_message.Message):
    __slots__ = ("codec", "bytes_per_row", "embedding_error")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_ROW_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_ERROR_FIELD_NUMBER: _ClassVar[int]
    codec: str
    bytes_per_row: float
    embedding_error: float
    def __init__(self, codec: _Optional[str] = ..., bytes_per_row: _Optional[float] = ..., embedding_error: _Optional[float] = ...) -> None: ...

class StemCost(_message.Message):
    __slots__ = ("precision", "size_bytes", "embedding_error", "refused")
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_ERROR_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    precision: str
    size_bytes: int
    embedding_error: float
    refused: str
    def __init__(self, precision: _Optional[str] = ..., size_bytes: _Optional[int] = ..., embedding_error: _Optional[float] = ..., refused: _Optional[str] = ...) -> None: ...

class CutCost(_message.Message):
    __slots__ = ("cut", "codecs", "stems", "jpeg_bytes_per_row", "sample")
    CUT_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    STEMS_FIELD_NUMBER: _ClassVar[int]
    JPEG_BYTES_PER_ROW_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    cut: Cut
    codecs: _containers.RepeatedCompositeFieldContainer[CodecCost]
    stems: _containers.RepeatedCompositeFieldContainer[StemCost]
    jpeg_bytes_per_row: float
    sample: str
    def __init__(self, cut: _Optional[_Union[Cut, _Mapping]] = ..., codecs: _Optional[_Iterable[_Union[CodecCost, _Mapping]]] = ..., stems: _Optional[_Iterable[_Union[StemCost, _Mapping]]] = ..., jpeg_bytes_per_row: _Optional[float] = ..., sample: _Optional[str] = ...) -> None: ...

class DescribeCutResponse(_message.Message):
    __slots__ = ("cost",)
    COST_FIELD_NUMBER: _ClassVar[int]
    cost: CutCost
    def __init__(self, cost: _Optional[_Union[CutCost, _Mapping]] = ...) -> None: ...

class FetchStemRequest(_message.Message):
    __slots__ = ("backbone", "cut", "input_size", "precision")
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    INPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    cut: str
    input_size: int
    precision: str
    def __init__(self, backbone: _Optional[str] = ..., cut: _Optional[str] = ..., input_size: _Optional[int] = ..., precision: _Optional[str] = ...) -> None: ...

class FetchStemResponse(_message.Message):
    __slots__ = ("seq", "header", "chunk", "end")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    seq: int
    header: StemHeader
    chunk: bytes
    end: _error_pb2.EndOfStream
    def __init__(self, seq: _Optional[int] = ..., header: _Optional[_Union[StemHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., end: _Optional[_Union[_error_pb2.EndOfStream, _Mapping]] = ...) -> None: ...

class StemHeader(_message.Message):
    __slots__ = ("space", "preprocessing", "feature_shape", "size_bytes", "sha256", "precision", "embedding_error")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    PREPROCESSING_FIELD_NUMBER: _ClassVar[int]
    FEATURE_SHAPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_ERROR_FIELD_NUMBER: _ClassVar[int]
    space: _tensor_pb2.FeatureSpace
    preprocessing: Preprocessing
    feature_shape: _containers.RepeatedScalarFieldContainer[int]
    size_bytes: int
    sha256: str
    precision: str
    embedding_error: float
    def __init__(self, space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., preprocessing: _Optional[_Union[Preprocessing, _Mapping]] = ..., feature_shape: _Optional[_Iterable[int]] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ..., precision: _Optional[str] = ..., embedding_error: _Optional[float] = ...) -> None: ...

class TuneBackboneRequest(_message.Message):
    __slots__ = ("backbone", "cut", "input_size", "again")
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    INPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    cut: str
    input_size: int
    again: bool
    def __init__(self, backbone: _Optional[str] = ..., cut: _Optional[str] = ..., input_size: _Optional[int] = ..., again: bool = ...) -> None: ...

class RuntimeSpeed(_message.Message):
    __slots__ = ("batch_rows", "rows_per_s")
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_S_FIELD_NUMBER: _ClassVar[int]
    batch_rows: int
    rows_per_s: float
    def __init__(self, batch_rows: _Optional[int] = ..., rows_per_s: _Optional[float] = ...) -> None: ...

class RuntimeResult(_message.Message):
    __slots__ = ("runtime", "error", "speeds", "load_s", "refused")
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SPEEDS_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    runtime: str
    error: float
    speeds: _containers.RepeatedCompositeFieldContainer[RuntimeSpeed]
    load_s: float
    refused: str
    def __init__(self, runtime: _Optional[str] = ..., error: _Optional[float] = ..., speeds: _Optional[_Iterable[_Union[RuntimeSpeed, _Mapping]]] = ..., load_s: _Optional[float] = ..., refused: _Optional[str] = ...) -> None: ...

class TuneBackboneResponse(_message.Message):
    __slots__ = ("backbone", "cut", "input_size", "device", "num_threads", "runtimes", "chosen", "batch_rows", "fixed", "libraries")
    class LibrariesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    INPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    RUNTIMES_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    FIXED_FIELD_NUMBER: _ClassVar[int]
    LIBRARIES_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    cut: str
    input_size: int
    device: str
    num_threads: int
    runtimes: _containers.RepeatedCompositeFieldContainer[RuntimeResult]
    chosen: str
    batch_rows: int
    fixed: bool
    libraries: _containers.ScalarMap[str, str]
    def __init__(self, backbone: _Optional[str] = ..., cut: _Optional[str] = ..., input_size: _Optional[int] = ..., device: _Optional[str] = ..., num_threads: _Optional[int] = ..., runtimes: _Optional[_Iterable[_Union[RuntimeResult, _Mapping]]] = ..., chosen: _Optional[str] = ..., batch_rows: _Optional[int] = ..., fixed: bool = ..., libraries: _Optional[_Mapping[str, str]] = ...) -> None: ...

class GetEndpointsRequest(_message.Message):
    __slots__ = ("backbone",)
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    def __init__(self, backbone: _Optional[str] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("address", "replica")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    address: str
    replica: str
    def __init__(self, address: _Optional[str] = ..., replica: _Optional[str] = ...) -> None: ...

class GetEndpointsResponse(_message.Message):
    __slots__ = ("endpoints", "ticket", "key", "valid_s", "tls", "tls_name")
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALID_S_FIELD_NUMBER: _ClassVar[int]
    TLS_FIELD_NUMBER: _ClassVar[int]
    TLS_NAME_FIELD_NUMBER: _ClassVar[int]
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    ticket: bytes
    key: bytes
    valid_s: float
    tls: bool
    tls_name: str
    def __init__(self, endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ..., ticket: _Optional[bytes] = ..., key: _Optional[bytes] = ..., valid_s: _Optional[float] = ..., tls: bool = ..., tls_name: _Optional[str] = ...) -> None: ...
