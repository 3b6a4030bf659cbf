"""Torch modules to ONNX files: dynamic batch, self-contained, compared with torch before anyone gets them."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import MAX_STEM_BYTES

from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.onnx_safety import check_onnx
from trunkline_worker.backbones.quiet import quiet

STEM_INPUT = "images"
STEM_OUTPUT = "features"

MAX_STEM_ERROR = 1e-4
"""Largest difference of an exported stem to torch, float32 both, over the largest feature of the sample."""

_CHECKED_ROWS = 3
"""Sample pictures that this is measured on: another number than the exporter saw."""

MAX_EXPORT_BYTES = 2**31 - 2**20
"""A file of more than 2 GiB cannot be self-contained."""

_CHATTER = (
    "torch.onnx",
    "torch.onnx._internal",
    "onnxscript",
    "onnx_ir",
    "torch.export",
    "torch._subclasses.fake_tensor",
)
# The exporter patches torch while it works: one at a time in a process.
_EXPORT_LOCK = threading.Lock()


def export_stem(backbone: Backbone, cut: str, input_size: int = 0) -> bytes:
    """Export the stem before a cut.

    The input is ``images``, (B, H, W, 3) uint8; the output is ``features``, (B, ...) float32, one row as
    ``CutSpec.feature_shape`` says; B is free.

    Raises:
        WireError: As ``Backbone.stem`` and ``Backbone.preprocessing_at`` do; UNSUPPORTED where the exporter cannot
            write the stem or what it wrote differs from torch by more than ``MAX_STEM_ERROR``.
    """
    stem = backbone.stem(cut)
    preprocessing = backbone.describe(input_size).preprocessing
    example = sample_images(2, preprocessing.input_size)
    data = export_module(stem, example, STEM_INPUT, STEM_OUTPUT, max_bytes=MAX_STEM_BYTES)
    error = relative_error(data, stem, torch.from_numpy(backbone.samples.held_out(preprocessing, _CHECKED_ROWS)))
    if not error <= MAX_STEM_ERROR:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            f"the exported stem {backbone.name}/{cut} differs from torch by {error:.1e}; at most {MAX_STEM_ERROR:.0e}",
        )
    return data


def export_module(
    module: nn.Module, example: Tensor, input_name: str, output_name: str, *, max_bytes: int = MAX_EXPORT_BYTES
) -> bytes:
    """Export a module of one input and one output whose first dimension is free.

    The module itself is left alone: a copy is traced, so others may run it meanwhile.

    Raises:
        WireError: UNSUPPORTED, PAYLOAD_TOO_LARGE.
    """
    with _EXPORT_LOCK, quiet(*_CHATTER):
        try:
            program = torch.onnx.export(
                copy.deepcopy(module).cpu().eval(),
                (example,),
                dynamo=True,
                verbose=False,
                input_names=[input_name],
                output_names=[output_name],
                dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=65536)},),
            )
            assert program is not None
            model = program.model_proto
            _strip(model)
            data: bytes = model.SerializeToString(deterministic=True)
        except Exception as error:  # the exporter raises whatever its many layers do
            raise WireError(
                ErrorCode.UNSUPPORTED, f"this network cannot be exported to ONNX: {_first_line(error)}"
            ) from error
    check_onnx(data, max_bytes)
    return data


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter noted about its own work: source lines and paths of this machine."""
    del model.metadata_props[:]
    model.doc_string = ""
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    items: tuple[Any, ...] = (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for item in items:
        item.doc_string = ""
        del item.metadata_props[:]
    used = {node.domain for node in graph.node}
    for opset in [one for one in model.opset_import if one.domain and one.domain not in used]:
        model.opset_import.remove(opset)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def sample_images(num_rows: int, size: int, seed: int = 0) -> Tensor:
    """Return pictures with structure at several scales, the same ones every time.

    Shape:
        returns (B, H, W, 3): (num_rows, size, size, 3), uint8.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(num_rows, 3, size, size)
    for cells in (3, 8, 24, 64):
        noise = torch.rand(num_rows, 3, cells, cells, generator=generator) - 0.5
        total += nn.functional.interpolate(noise, size=(size, size), mode="bilinear", align_corners=False) / cells**0.5
    low, high = total.amin((1, 2, 3), keepdim=True), total.amax((1, 2, 3), keepdim=True)
    return ((total - low) / (high - low) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def relative_error(data: bytes, module: nn.Module, sample: Tensor) -> float:
    """Run a file and the module it was made from: the largest difference over the module's largest value."""
    with torch.inference_mode():
        expected = module(sample).numpy()
    session = onnxruntime.InferenceSession(data, session_options(num_threads=1), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: sample.numpy()})
    return float(np.abs(got - expected).max() / max(float(np.abs(expected).max()), 1e-12))


def session_options(num_threads: int) -> onnxruntime.SessionOptions:
    """Return quiet options for a session on the CPU that leaves the other cores alone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Idle threads that spin take the cores from gRPC and from other replicas.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
