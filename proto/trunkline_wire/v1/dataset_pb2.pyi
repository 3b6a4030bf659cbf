from google.protobuf import timestamp_pb2 as _timestamp_pb2
from trunkline_wire.v1 import error_pb2 as _error_pb2
from trunkline_wire.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FindMissingRowsRequest(_message.Message):
    __slots__ = ("row_ids",)
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    row_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, row_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class FindMissingRowsResponse(_message.Message):
    __slots__ = ("missing",)
    MISSING_FIELD_NUMBER: _ClassVar[int]
    missing: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, missing: _Optional[_Iterable[int]] = ...) -> None: ...

class RowChunk(_message.Message):
    __slots__ = ("space", "row_ids", "rows", "sha256")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    space: _tensor_pb2.FeatureSpace
    row_ids: _containers.RepeatedScalarFieldContainer[bytes]
    rows: _tensor_pb2.Tensor
    sha256: bytes
    def __init__(self, space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., row_ids: _Optional[_Iterable[bytes]] = ..., rows: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class UploadRowsRequest(_message.Message):
    __slots__ = ("seq", "chunk", "end")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    seq: int
    chunk: RowChunk
    end: _error_pb2.EndOfStream
    def __init__(self, seq: _Optional[int] = ..., chunk: _Optional[_Union[RowChunk, _Mapping]] = ..., end: _Optional[_Union[_error_pb2.EndOfStream, _Mapping]] = ...) -> None: ...

class ChunkAck(_message.Message):
    __slots__ = ("num_new_rows",)
    NUM_NEW_ROWS_FIELD_NUMBER: _ClassVar[int]
    num_new_rows: int
    def __init__(self, num_new_rows: _Optional[int] = ...) -> None: ...

class UploadRowsResponse(_message.Message):
    __slots__ = ("seq", "ack", "error", "end")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    seq: int
    ack: ChunkAck
    error: _error_pb2.Error
    end: _error_pb2.EndOfStream
    def __init__(self, seq: _Optional[int] = ..., ack: _Optional[_Union[ChunkAck, _Mapping]] = ..., error: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., end: _Optional[_Union[_error_pb2.EndOfStream, _Mapping]] = ...) -> None: ...

class ClassLabels(_message.Message):
    __slots__ = ("names", "indices")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, names: _Optional[_Iterable[str]] = ..., indices: _Optional[_Iterable[int]] = ...) -> None: ...

class RegressionTargets(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _tensor_pb2.Tensor
    def __init__(self, values: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class MultiLabels(_message.Message):
    __slots__ = ("names", "values")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    values: _tensor_pb2.Tensor
    def __init__(self, names: _Optional[_Iterable[str]] = ..., values: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class DatasetInput(_message.Message):
    __slots__ = ("space", "row_ids")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    space: _tensor_pb2.FeatureSpace
    row_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., row_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class CommitDatasetRequest(_message.Message):
    __slots__ = ("name", "space", "row_ids", "classes", "targets", "multi_labels", "idempotency_key", "more_inputs", "groups", "views")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    MULTI_LABELS_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    MORE_INPUTS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    space: _tensor_pb2.FeatureSpace
    row_ids: _containers.RepeatedScalarFieldContainer[bytes]
    classes: ClassLabels
    targets: RegressionTargets
    multi_labels: MultiLabels
    idempotency_key: str
    more_inputs: _containers.RepeatedCompositeFieldContainer[DatasetInput]
    groups: _containers.RepeatedScalarFieldContainer[int]
    views: int
    def __init__(self, name: _Optional[str] = ..., space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., row_ids: _Optional[_Iterable[bytes]] = ..., classes: _Optional[_Union[ClassLabels, _Mapping]] = ..., targets: _Optional[_Union[RegressionTargets, _Mapping]] = ..., multi_labels: _Optional[_Union[MultiLabels, _Mapping]] = ..., idempotency_key: _Optional[str] = ..., more_inputs: _Optional[_Iterable[_Union[DatasetInput, _Mapping]]] = ..., groups: _Optional[_Iterable[int]] = ..., views: _Optional[int] = ...) -> None: ...

class CommitDatasetResponse(_message.Message):
    __slots__ = ("dataset",)
    DATASET_FIELD_NUMBER: _ClassVar[int]
    dataset: Dataset
    def __init__(self, dataset: _Optional[_Union[Dataset, _Mapping]] = ...) -> None: ...

class Dataset(_message.Message):
    __slots__ = ("name", "version", "num_rows", "digest", "space", "class_names", "num_targets", "create_time", "codec", "more_inputs", "num_groups", "views")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAMES_FIELD_NUMBER: _ClassVar[int]
    NUM_TARGETS_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    MORE_INPUTS_FIELD_NUMBER: _ClassVar[int]
    NUM_GROUPS_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    num_rows: int
    digest: str
    space: _tensor_pb2.FeatureSpace
    class_names: _containers.RepeatedScalarFieldContainer[str]
    num_targets: int
    create_time: _timestamp_pb2.Timestamp
    codec: str
    more_inputs: _containers.RepeatedCompositeFieldContainer[DatasetSource]
    num_groups: int
    views: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., num_rows: _Optional[int] = ..., digest: _Optional[str] = ..., space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., class_names: _Optional[_Iterable[str]] = ..., num_targets: _Optional[int] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., codec: _Optional[str] = ..., more_inputs: _Optional[_Iterable[_Union[DatasetSource, _Mapping]]] = ..., num_groups: _Optional[int] = ..., views: _Optional[int] = ...) -> None: ...

class DatasetSource(_message.Message):
    __slots__ = ("space", "codec")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    space: _tensor_pb2.FeatureSpace
    codec: str
    def __init__(self, space: _Optional[_Union[_tensor_pb2.FeatureSpace, _Mapping]] = ..., codec: _Optional[str] = ...) -> None: ...

class GetDatasetRequest(_message.Message):
    __slots__ = ("dataset",)
    DATASET_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    def __init__(self, dataset: _Optional[str] = ...) -> None: ...

class GetDatasetResponse(_message.Message):
    __slots__ = ("dataset",)
    DATASET_FIELD_NUMBER: _ClassVar[int]
    dataset: Dataset
    def __init__(self, dataset: _Optional[_Union[Dataset, _Mapping]] = ...) -> None: ...

class ListDatasetsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDatasetsResponse(_message.Message):
    __slots__ = ("datasets",)
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    datasets: _containers.RepeatedCompositeFieldContainer[Dataset]
    def __init__(self, datasets: _Optional[_Iterable[_Union[Dataset, _Mapping]]] = ...) -> None: ...
