"""What pictures do inside an ONNX graph: the ranges of its tensors, and what rounding takes from its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

# Shape suffix legend: B = pictures, C = channels

Pictures = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

_PREFIX = "int8/"


def measure_ranges(
    model: ModelProto, names: Sequence[str], pictures: Pictures, num_threads: int
) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Return the least and the largest value of each of the named tensors over the pictures."""
    probe = _without_outputs(model)
    for position, name in enumerate(names):
        for kind in ("Min", "Max"):
            _add_output(probe.graph, helper.make_node(f"Reduce{kind}", [name], [f"{_PREFIX}{kind}{position}"]))
    values = _run(probe, pictures, num_threads)
    return {
        name: (
            np.asarray(values[f"{_PREFIX}Min{position}"].min(), np.float32),
            np.asarray(values[f"{_PREFIX}Max{position}"].max(), np.float32),
        )
        for position, name in enumerate(names)
    }


def correct_biases(
    exact: ModelProto, quantised: ModelProto, layers: Sequence[NodeProto], pictures: Pictures, num_threads: int
) -> None:
    """Add to the bias of each quantised layer what rounding took from the mean of its output.

    Each layer is looked at alone, one pass for all of them: it and its quantised copy get the same exact input.

    Args:
        exact: Before quantisation.
        quantised: Changed in place.
        layers: Of ``exact``; in ``quantised`` they have the same names.
        pictures: To average over.
        num_threads: Of the CPU.
    """
    makers = {name: node for node in quantised.graph.node for name in node.output}
    by_name = {node.name: node for node in quantised.graph.node}
    constants = {one.name: one for one in quantised.graph.initializer}
    probe = _without_outputs(exact)
    stored_biases: dict[str, NodeProto] = {}
    for layer in layers:
        copy = by_name[layer.name]
        if len(copy.input) == 3:
            rounded, weight, bias = (makers[name] for name in copy.input)
            rank = len(constants[weight.input[0]].dims)
            name = _add_loss(probe.graph, layer, copy, (rounded, weight, bias), rank)
            stored_biases[name] = bias
    known = {one.name for one in probe.graph.initializer}
    needed = {name for node in probe.graph.node for name in node.input if name in constants} - known
    probe.graph.initializer.extend(constants[name] for name in sorted(needed))
    if not stored_biases:
        return
    losses = _run(probe, pictures, num_threads)
    limits = np.iinfo(np.int32)
    for name, stored in stored_biases.items():
        steps = constants[stored.input[0]]
        step_C = numpy_helper.to_array(constants[stored.input[1]]).astype(np.float64)
        steps_C = numpy_helper.to_array(steps) + np.round(losses[name].mean(0) / step_C)
        steps.CopyFrom(numpy_helper.from_array(steps_C.clip(limits.min, limits.max).astype(np.int32), steps.name))


def _add_loss(
    graph: GraphProto, layer: NodeProto, copy: NodeProto, inputs: tuple[NodeProto, NodeProto, NodeProto], rank: int
) -> str:
    """Add the quantised copy beside the exact layer, and an output: exact minus quantised, averaged per channel.

    Args:
        graph: The exact one.
        layer: Of it.
        copy: The same layer of the quantised graph.
        inputs: What dequantises the copy's three inputs: features, weight and bias.
        rank: Dimensions of the weight, and so of the output.
    """
    prefix = f"{_PREFIX}{layer.name}/"
    _, scale, zero = inputs[0].input
    graph.node.append(
        helper.make_node("QuantizeLinear", [layer.input[0], scale, zero], [f"{prefix}rounded"], f"{prefix}round")
    )
    graph.node.append(
        helper.make_node("DequantizeLinear", [f"{prefix}rounded", scale, zero], [f"{prefix}0"], f"{prefix}0")
    )
    for position in (1, 2):
        stored = graph.node.add()
        stored.CopyFrom(inputs[position])
        stored.name = stored.output[0] = f"{prefix}{position}"
    beside = graph.node.add()
    beside.CopyFrom(copy)
    beside.name = beside.output[0] = f"{prefix}output"
    for position in range(3):
        beside.input[position] = f"{prefix}{position}"
    axes = numpy_helper.from_array(np.array([0, *range(2, rank)], np.int64), f"{prefix}axes")
    graph.initializer.append(axes)
    graph.node.append(helper.make_node("Sub", [layer.output[0], beside.output[0]], [f"{prefix}lost"]))
    _add_output(graph, helper.make_node("ReduceMean", [f"{prefix}lost", axes.name], [f"{prefix}mean"], keepdims=0))
    return f"{prefix}mean"


def _without_outputs(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    return copy


def _add_output(graph: GraphProto, node: NodeProto) -> None:
    graph.node.append(node)
    graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))


def _run(model: ModelProto, pictures: Pictures, num_threads: int) -> Mapping[str, npt.NDArray[np.float64]]:
    """Run a graph on each picture alone: features of many at once need much memory.

    Returns:
        Each output by name, with the pictures as first axis.
    """
    session = open_session(model.SerializeToString(), num_threads)
    names = [one.name for one in session.get_outputs()]
    key = session.get_inputs()[0].name
    rows = [session.run(names, {key: pictures[i : i + 1]}) for i in range(len(pictures))]
    return {name: np.stack([row[i] for row in rows]).astype(np.float64) for i, name in enumerate(names)}


def open_session(data: bytes, num_threads: int) -> onnxruntime.InferenceSession:
    """Open a file on the CPU, without messages: what is wrong is in the exceptions."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Idle threads that spin take the cores from whatever else the process does.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
