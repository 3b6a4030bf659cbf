"""Pairs of conversions between plain descriptions and their messages. No logic."""

from __future__ import annotations

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import (
    BackboneSpec,
    CodecCost,
    CodecUse,
    CutCost,
    CutSpec,
    Endpoint,
    Endpoints,
    FeatureSpace,
    Preprocessing,
    RuntimeResult,
    RuntimeSpeed,
    SliceSpec,
    StemCost,
    Timings,
    Tuning,
)
from trunkline_wire.v1 import catalog_pb2, error_pb2, inference_pb2, tensor_pb2


def space_to_proto(space: FeatureSpace) -> tensor_pb2.FeatureSpace:
    """Return the message of a feature space."""
    return tensor_pb2.FeatureSpace(
        backbone=space.backbone,
        cut=space.cut,
        input_size=space.input_size,
        fingerprint=space.fingerprint,
        local_model=space.local_model,
        bottleneck=space.bottleneck,
    )


def space_from_proto(message: tensor_pb2.FeatureSpace) -> FeatureSpace:
    """Return the feature space of a message."""
    return FeatureSpace(
        message.backbone,
        message.cut,
        message.input_size,
        message.fingerprint,
        local_model=message.local_model,
        bottleneck=message.bottleneck,
    )


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


def cut_to_proto(cut: CutSpec) -> catalog_pb2.Cut:
    """Return the message of a cut."""
    return catalog_pb2.Cut(
        name=cut.name,
        feature_shape=cut.feature_shape,
        fingerprint=cut.fingerprint,
        slices=cut.slices,
        channel_axis=cut.channel_axis,
        is_stage=cut.is_stage,
        stem_macs=cut.stem_macs,
        stem_parameters=cut.stem_parameters,
        int8_fingerprint=cut.int8_fingerprint,
        map_shape=cut.map_shape,
    )


def cut_from_proto(message: catalog_pb2.Cut) -> CutSpec:
    """Return the cut of a message."""
    return CutSpec(
        name=message.name,
        feature_shape=tuple(message.feature_shape),
        fingerprint=message.fingerprint,
        slices=tuple(message.slices),
        channel_axis=message.channel_axis,
        is_stage=message.is_stage,
        stem_macs=message.stem_macs,
        stem_parameters=message.stem_parameters,
        int8_fingerprint=message.int8_fingerprint,
        map_shape=tuple(message.map_shape),
    )


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
        cuts=[cut_to_proto(cut) for cut in spec.cuts],
        slices=slices_to_proto(spec.slices),
        embedding_fingerprint=spec.embedding_fingerprint,
        runtime=spec.runtime,
        device=spec.device,
        runtime_error=spec.runtime_error,
        macs=spec.macs,
        class_names=spec.class_names,
        rows_per_s=spec.rows_per_s,
        batch_rows=spec.batch_rows,
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
        cuts=tuple(cut_from_proto(cut) for cut in message.cuts),
        slices=tuple(SliceSpec(one.name, one.start, one.stop) for one in message.slices),
        embedding_fingerprint=message.embedding_fingerprint,
        runtime=message.runtime,
        device=message.device,
        runtime_error=message.runtime_error,
        macs=message.macs,
        class_names=tuple(message.class_names),
        rows_per_s=message.rows_per_s,
        batch_rows=message.batch_rows,
    )


def cut_cost_to_proto(cost: CutCost) -> catalog_pb2.CutCost:
    """Return the message of what a cut costs."""
    return catalog_pb2.CutCost(
        cut=cut_to_proto(cost.cut),
        codecs=[
            catalog_pb2.CodecCost(codec=one.codec, bytes_per_row=one.bytes_per_row, embedding_error=one.embedding_error)
            for one in cost.codecs
        ],
        stems=[
            catalog_pb2.StemCost(
                precision=one.precision,
                size_bytes=one.size_bytes,
                embedding_error=one.embedding_error,
                refused=one.refused,
            )
            for one in cost.stems
        ],
        jpeg_bytes_per_row=cost.jpeg_bytes_per_row,
        sample=cost.sample,
    )


def cut_cost_from_proto(message: catalog_pb2.CutCost) -> CutCost:
    """Return what a cut costs, of its message."""
    return CutCost(
        cut=cut_from_proto(message.cut),
        codecs=tuple(CodecCost(one.codec, one.bytes_per_row, one.embedding_error) for one in message.codecs),
        stems=tuple(StemCost(one.precision, one.size_bytes, one.embedding_error, one.refused) for one in message.stems),
        jpeg_bytes_per_row=message.jpeg_bytes_per_row,
        sample=message.sample,
    )


def tuning_to_proto(tuning: Tuning) -> catalog_pb2.TuneBackboneResponse:
    """Return the message of a tuning."""
    return catalog_pb2.TuneBackboneResponse(
        backbone=tuning.backbone,
        cut=tuning.cut,
        input_size=tuning.input_size,
        device=tuning.device,
        num_threads=tuning.num_threads,
        runtimes=[
            catalog_pb2.RuntimeResult(
                runtime=one.runtime,
                error=one.error,
                speeds=[
                    catalog_pb2.RuntimeSpeed(batch_rows=speed.batch_rows, rows_per_s=speed.rows_per_s)
                    for speed in one.speeds
                ],
                load_s=one.load_s,
                refused=one.refused,
            )
            for one in tuning.runtimes
        ],
        chosen=tuning.chosen,
        batch_rows=tuning.batch_rows,
        fixed=tuning.fixed,
        libraries=dict(tuning.libraries),
    )


def tuning_from_proto(message: catalog_pb2.TuneBackboneResponse) -> Tuning:
    """Return the tuning of a message."""
    return Tuning(
        backbone=message.backbone,
        cut=message.cut,
        input_size=message.input_size,
        device=message.device,
        num_threads=message.num_threads,
        runtimes=tuple(
            RuntimeResult(
                one.runtime,
                one.error,
                tuple(RuntimeSpeed(speed.batch_rows, speed.rows_per_s) for speed in one.speeds),
                one.load_s,
                one.refused,
            )
            for one in message.runtimes
        ),
        chosen=message.chosen,
        batch_rows=message.batch_rows,
        fixed=message.fixed,
        libraries=tuple(sorted(message.libraries.items())),
    )


def endpoints_to_proto(endpoints: Endpoints) -> catalog_pb2.GetEndpointsResponse:
    """Return the message of a backbone's endpoints."""
    return catalog_pb2.GetEndpointsResponse(
        endpoints=[catalog_pb2.Endpoint(address=one.address, replica=one.replica) for one in endpoints.endpoints],
        ticket=endpoints.ticket,
        key=endpoints.key,
        valid_s=endpoints.valid_s,
        tls=endpoints.tls,
        tls_name=endpoints.tls_name,
    )


def endpoints_from_proto(message: catalog_pb2.GetEndpointsResponse) -> Endpoints:
    """Return the endpoints of a message."""
    return Endpoints(
        endpoints=tuple(Endpoint(one.address, one.replica) for one in message.endpoints),
        ticket=message.ticket,
        key=message.key,
        valid_s=message.valid_s,
        tls=message.tls,
        tls_name=message.tls_name,
    )


def codec_use_to_proto(use: CodecUse) -> inference_pb2.CodecUse:
    """Return the message of how features were sent."""
    return inference_pb2.CodecUse(
        codec=use.codec,
        embedding_error=use.embedding_error,
        trained_codec=use.trained_codec,
        trained_error=use.trained_error,
    )


def codec_use_from_proto(message: inference_pb2.CodecUse) -> CodecUse:
    """Return how features were sent, of its message."""
    return CodecUse(message.codec, message.embedding_error, message.trained_codec, message.trained_error)


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
