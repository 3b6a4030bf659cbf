"""Stems whose layers compute in int8: a smaller file and more pictures a second, at a small error.

Three things keep the error small. The first, narrow layers stay in float32: they gain nothing, and what they do wrong
grows in every later layer. Each output channel of a layer has its own scale. And after rounding each layer's bias is
set so that the mean of its output over the calibration pictures is again that of the exact stem.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_STEM_BYTES

from trunkline_worker.backbones.int8_calibration import (
    FloatArray,
    Pictures,
    correct_biases,
    measure_ranges,
    open_session,
)
from trunkline_worker.backbones.onnx_safety import check_onnx
from trunkline_worker.backbones.quiet import quiet

# Shape suffix legend: B = pictures, H = height, W = width, C = channels, O = output channels, I = input channels,
# P = places of the kernel, K = all that one output sums over

NARROW_CHANNELS = 32
"""Leading convolutions with at most so many output channels stay in float32, and the very first in any case."""

_LAYERS = ("Conv", "Gemm", "MatMul")
_FOLLOWING = ("Relu", "Clip", "MaxPool", "Add")
_LARGEST_STEP = 127


def quantise_stem(data: bytes, pictures: Pictures, *, num_threads: int = 1) -> bytes:
    """Turn an exported float32 stem into one of int8. On one machine equal arguments give equal bytes.

    Input and output stay as they are: uint8 pictures, float32 features, any number of rows. The file holds standard
    operators only, between pairs of QuantizeLinear and DequantizeLinear.

    Args:
        data: As ``export_stem`` writes it.
        pictures: To calibrate on.
        num_threads: Of the CPU.

    Shape:
        pictures (B, H, W, C): (B, input_size, input_size, 3), uint8.

    Raises:
        WireError: SHAPE_MISMATCH for other pictures than the stem takes; UNSUPPORTED where the stem has no layer that
            gains from int8, or where ONNX Runtime cannot quantise it; else as ``check_onnx``.
    """
    exact = check_onnx(data)
    try:
        _check_pictures(exact.graph, pictures)
        _prepare(exact)
        layers, following = _choose_nodes(exact.graph)
        if not layers:
            raise WireError(
                ErrorCode.UNSUPPORTED,
                "no layer of this stem gains from int8: none comes after the first, narrow ones. Use the float32 stem",
            )
        model = _quantised(exact, [*layers, *following], pictures, num_threads)
        correct_biases(exact, model, layers, pictures, num_threads)
        _strip(model)
        quantised: bytes = model.SerializeToString(deterministic=True)
        _check_same_kind(data, quantised, pictures[:1])
    except WireError:
        raise
    except Exception as error:  # ONNX, its quantiser and its runtime raise whatever their layers do
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise WireError(ErrorCode.UNSUPPORTED, f"this stem cannot be quantised: {text}") from error
    check_onnx(quantised, MAX_STEM_BYTES)
    return quantised


def _check_pictures(graph: GraphProto, pictures: Pictures) -> None:
    shape = tuple(one.dim_value for one in graph.input[0].type.tensor_type.shape.dim)[1:]
    if pictures.shape[1:] != shape or not len(pictures):
        raise WireError(
            ErrorCode.SHAPE_MISMATCH,
            f"a stem for pictures of shape {shape} is calibrated on at least one of them; got {pictures.shape}",
        )


def _prepare(model: ModelProto) -> None:
    """Name every node, give every convolution a bias that can be corrected, and note every tensor's shape."""
    graph = model.graph
    constants = {one.name: one for one in graph.initializer}
    for position, node in enumerate(graph.node):
        node.name = f"node{position}"
        if node.op_type == "Conv" and len(node.input) == 2 and node.input[1] in constants:
            bias = f"{node.output[0]}_bias"
            channels = constants[node.input[1]].dims[0]
            graph.initializer.append(numpy_helper.from_array(np.zeros(channels, np.float32), bias))
            node.input.append(bias)
    model.CopyFrom(onnx.shape_inference.infer_shapes(model))


def _choose_nodes(graph: GraphProto) -> tuple[list[NodeProto], list[NodeProto]]:
    """Return the layers that are quantised, and the operators between them that then compute in int8 as well."""
    constants = {one.name: one for one in graph.initializer}
    layers: list[NodeProto] = []
    rounded: set[str] = set()
    seen_first, leading = False, True
    for node in graph.node:
        if node.op_type not in _LAYERS or node.input[1] not in constants:
            continue
        channels = constants[node.input[1]].dims[0]
        leading = leading and (not seen_first or (node.op_type == "Conv" and channels <= NARROW_CHANNELS))
        seen_first = True
        if not leading:
            layers.append(node)
            rounded.add(node.input[0])
            # Transformers add what a product gives to a sum of wide range. Both stay in float32.
            if node.op_type == "Conv":
                rounded.add(node.output[0])
    following = []
    for node in graph.node:
        inputs = node.input if node.op_type == "Add" else node.input[:1]
        # Where a sum is the stem's last operator, the features need not be rounded.
        last = node.op_type == "Add" and node.output[0] == graph.output[0].name
        if node.op_type in _FOLLOWING and not last and rounded.issuperset(inputs):
            following.append(node)
            rounded.add(node.output[0])
    return layers, following


def _quantised(model: ModelProto, nodes: Sequence[NodeProto], pictures: Pictures, num_threads: int) -> ModelProto:
    """Let ONNX Runtime's own quantiser rewrite the graph, with ranges and scales from here."""
    # Imported on first use: it reaches into many modules that nothing else here needs.
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData

    constants = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    overrides = {}
    for node in nodes:
        if node.op_type in _LAYERS:
            axis = _output_axis(node)
            zero = np.array(0, np.int8)
            overrides[node.input[1]] = [
                {"quant_type": QuantType.QInt8, "scale": scale, "zero_point": zero, "axis": axis}
                for scale in channel_scales(constants[node.input[1]], axis)
            ]
    touched = {name for node in nodes for name in (*node.input[:2], node.output[0]) if name not in constants}
    ranges = measure_ranges(model, sorted(touched), pictures, num_threads)
    copy = ModelProto()
    copy.CopyFrom(model)
    with _silence():
        quantiser = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
            nodes_to_quantize=[node.name for node in nodes],
            nodes_to_exclude=[],
            op_types_to_quantize=sorted({node.op_type for node in nodes}),
            extra_options={
                "TensorQuantOverrides": overrides,
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
            },
        )
        quantiser.quantize_model()
    return quantiser.model.model


def _output_axis(node: NodeProto) -> int:
    """Return which axis of a layer's weight counts its output channels."""
    if node.op_type == "Conv":
        return 0
    return 0 if any(one.name == "transB" and one.i for one in node.attribute) else 1


def channel_scales(weight: npt.NDArray[np.generic], axis: int) -> FloatArray:
    """Return what one step of int8 stands for, per output channel.

    Processors without dot products of bytes add two neighbouring products in 16 bits and cut off what does not fit: 255
    times the sum of two weights must stay below 2**15. With the usual scale, the largest weight over 127, it does not,
    and the features would depend on the processor. So the sum of two neighbours of one sign, too, is at most 127 steps.
    Neighbours are two input channels at one place of the kernel, or two places of one input channel.

    Args:
        weight: Of a layer.
        axis: Of the output channels.

    Shape:
        returns (O,).
    """
    weight_OIP = np.moveaxis(weight.astype(np.float32), axis, 0)
    weight_OIP = weight_OIP.reshape(*weight_OIP.shape[:2], -1)
    largest_O = np.abs(weight_OIP).max((1, 2))
    for ordered in (weight_OIP, weight_OIP.transpose(0, 2, 1)):
        weight_OK = ordered.reshape(len(largest_O), -1)
        for part_OK in (weight_OK.clip(0, None), (-weight_OK).clip(0, None)):
            pairs_OK = part_OK[:, 1:] + part_OK[:, :-1]
            largest_O = np.maximum(largest_O, pairs_OK.max(1, initial=0))
    return np.where(largest_O > 0, largest_O / _LARGEST_STEP, 1).astype(np.float32)


def _strip(model: ModelProto) -> None:
    """Leave in the file what is needed to run it, in a fixed order, and nothing about the tools that wrote it."""
    graph = model.graph
    del model.metadata_props[:]
    del graph.metadata_props[:]
    del graph.value_info[:]
    model.doc_string = graph.doc_string = model.producer_name = model.producer_version = ""
    needed = {name for node in graph.node for name in node.input}
    kept = sorted((one for one in graph.initializer if one.name in needed), key=lambda one: one.name)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    items: tuple[Any, ...] = (*graph.node, *graph.input, *graph.output, *graph.initializer)
    for item in items:
        item.doc_string = ""
        del item.metadata_props[:]
    used = {node.domain for node in graph.node}
    for opset in [one for one in model.opset_import if one.domain and one.domain not in used]:
        model.opset_import.remove(opset)


def _check_same_kind(exact: bytes, quantised: bytes, pictures: Pictures) -> None:
    """Check that names, types and shapes of input and output are those of the exact stem, and the features numbers."""
    kinds = []
    for data in (exact, quantised):
        session = open_session(data, num_threads=1)
        (images,), (features,) = session.get_inputs(), session.get_outputs()
        (rows,) = session.run(None, {images.name: pictures})
        kinds.append((images.name, images.type, images.shape, features.name, features.type, rows.shape))
        if not np.isfinite(rows).all():
            raise WireError(ErrorCode.UNSUPPORTED, "this stem gives features that are not finite numbers")
    if kinds[0] != kinds[1]:
        raise WireError(ErrorCode.UNSUPPORTED, "this stem cannot be quantised: what it returns would change its kind")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the quantiser from logging, and from configuring the process's logging with its first message."""
    root = logging.getLogger()
    handler = logging.NullHandler()
    root.addHandler(handler)
    try:
        with quiet("", "onnxruntime"):
            yield
    finally:
        root.removeHandler(handler)
