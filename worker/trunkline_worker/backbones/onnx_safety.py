"""What an ONNX file must be before it is run or handed to anyone: self-contained, standard operators, bounded."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_STEM_BYTES

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
"""Operators of other domains need libraries that the reader would have to load."""


def check_onnx(data: bytes, max_bytes: int = MAX_STEM_BYTES) -> onnx.ModelProto:
    """Check a file before it is given to a runtime.

    Refused are files over the size, files that name other files, operators of other domains, functions and training
    graphs of the file's own.

    Returns:
        The parsed file.

    Raises:
        WireError: PAYLOAD_TOO_LARGE, CORRUPT_DATA, or UNSUPPORTED for what is refused.
    """
    if len(data) > max_bytes:
        raise WireError(ErrorCode.PAYLOAD_TOO_LARGE, f"ONNX file of {len(data)} bytes; at most {max_bytes}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # the parser's own error type belongs to protobuf
        raise WireError(ErrorCode.CORRUPT_DATA, "not an ONNX file") from error
    if not model.graph.node:
        raise WireError(ErrorCode.CORRUPT_DATA, "not an ONNX file, or one without operators")
    domains = {opset.domain for opset in model.opset_import}
    domains.update(node.domain for graph in _graphs(model.graph) for node in graph.node)
    if not domains <= STANDARD_DOMAINS:
        strange = ", ".join(sorted(domains - STANDARD_DOMAINS))[:200]
        raise WireError(ErrorCode.UNSUPPORTED, f"ONNX file with operators of other domains: {strange}")
    if model.functions or model.training_info:
        raise WireError(ErrorCode.UNSUPPORTED, "ONNX file with functions or a training graph of its own")
    if any(_is_external(tensor) for graph in _graphs(model.graph) for tensor in _tensors(graph)):
        raise WireError(ErrorCode.UNSUPPORTED, "ONNX file whose weights lie in other files")
    return model


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and those inside its operators."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that a graph carries: weights, sparse weights, constants of its operators."""
    yield from graph.initializer
    sparse = list(graph.sparse_initializer)
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            sparse.extend(attribute.sparse_tensors)
            if attribute.HasField("sparse_tensor"):
                sparse.append(attribute.sparse_tensor)
    for one in sparse:
        yield one.values
        yield one.indices
