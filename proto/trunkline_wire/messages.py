"""Pairs of conversions between plain descriptions and their messages. No logic."""

from __future__ import annotations

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import BackboneSpec, CutSpec, FeatureSpace, Preprocessing, SliceSpec, Timings
from trunkline_wire.v1 import catalog_pb2, error_pb2, tensor_pb2


def space_to_proto(space: FeatureSpace) -> tensor_pb2.FeatureSpace:
    """Return the message of a feature space."""
    return tensor_pb2.FeatureSpace(
        backbone=space.backbone, cut=space.cut, input_size=space.input_size, fingerprint=space.fingerprint
    )


def space_from_proto(message: tensor_pb2.FeatureSpace) -> FeatureSpace:
    """Return the feature space of a message."""
    return FeatureSpace(message.backbone, message.cut, message.input_size, message.fingerprint)


def preprocessing_to_proto(preprocessing: Preprocessing) -> catalog_pb2.Preprocessing:
    """Return the message of a preprocessing."""
    return catalog_pb2.Preprocessing(
        input_size=preprocessing.input_size,
        crop_fraction=preprocessing.crop_fraction,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )


def preprocessing_from_proto(message: catalog_pb2.Preprocessing) -> Preprocessing:
    """Return the preprocessing of a message."""
    red, green, blue = message.mean
    std_red, std_green, std_blue = message.std
    return Preprocessing(
        message.input_size,
        message.crop_fraction,
        message.interpolation,
        (red, green, blue),
        (std_red, std_green, std_blue),
    )


def slices_to_proto(slices: tuple[SliceSpec, ...]) -> list[catalog_pb2.Slice]:
    """Return the messages of slices."""
    return [catalog_pb2.Slice(name=one.name, start=one.start, stop=one.stop) for one in slices]


def backbone_to_proto(spec: BackboneSpec) -> catalog_pb2.Backbone:
    """Return the message of a backbone's description."""
    return catalog_pb2.Backbone(
        name=spec.name,
        pretrained=spec.pretrained,
        weights=spec.weights,
        weights_sha256=spec.weights_sha256,
        num_parameters=spec.num_parameters,
        preprocessing=preprocessing_to_proto(spec.preprocessing),
        resizable=spec.resizable,
        cuts=[
            catalog_pb2.Cut(
                name=cut.name, feature_shape=cut.feature_shape, fingerprint=cut.fingerprint, slices=cut.slices
            )
            for cut in spec.cuts
        ],
        slices=slices_to_proto(spec.slices),
        embedding_fingerprint=spec.embedding_fingerprint,
        runtime=spec.runtime,
        device=spec.device,
        runtime_error=spec.runtime_error,
    )


def backbone_from_proto(message: catalog_pb2.Backbone) -> BackboneSpec:
    """Return the description of a backbone's message."""
    return BackboneSpec(
        name=message.name,
        pretrained=message.pretrained,
        weights=message.weights,
        weights_sha256=message.weights_sha256,
        num_parameters=message.num_parameters,
        preprocessing=preprocessing_from_proto(message.preprocessing),
        resizable=message.resizable,
        cuts=tuple(
            CutSpec(cut.name, tuple(cut.feature_shape), cut.fingerprint, tuple(cut.slices)) for cut in message.cuts
        ),
        slices=tuple(SliceSpec(one.name, one.start, one.stop) for one in message.slices),
        embedding_fingerprint=message.embedding_fingerprint,
        runtime=message.runtime,
        device=message.device,
        runtime_error=message.runtime_error,
    )


def timings_to_proto(timings: Timings) -> tensor_pb2.Timings:
    """Return the message of timings."""
    return tensor_pb2.Timings(
        queue_s=timings.queue_s,
        decode_s=timings.decode_s,
        trunk_s=timings.trunk_s,
        head_s=timings.head_s,
        total_s=timings.total_s,
    )


def timings_from_proto(message: tensor_pb2.Timings) -> Timings:
    """Return the timings of a message."""
    return Timings(message.queue_s, message.decode_s, message.trunk_s, message.head_s, message.total_s)


def error_to_proto(error: WireError, request_id: str) -> error_pb2.Error:
    """Return the message of an error."""
    return error_pb2.Error(
        code=error_pb2.ErrorCode.Name(error.code.value),
        message=error.message,
        request_id=request_id,
        retry_delay_s=error.retry_delay_s,
    )


def error_from_proto(message: error_pb2.Error) -> WireError:
    """Return the error of a message. A code from a newer wire becomes INTERNAL."""
    try:
        code = ErrorCode(message.code)
    except ValueError:
        code = ErrorCode.INTERNAL
    return WireError(code, message.message, retry_delay_s=message.retry_delay_s)
