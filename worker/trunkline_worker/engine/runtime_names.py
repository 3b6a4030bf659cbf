"""The names of the runtimes. No torch here: settings are checked against them where there is none."""

from __future__ import annotations

from trunkline_wire.errors import ErrorCode, WireError

TORCH_FP32 = "torch-fp32"
"""Eager, float32, weights and features laid out as PyTorch does by default: what the others are compared with."""

TORCH_FP32_LAST = "torch-fp32-channels-last"
TORCH_BF16 = "torch-bf16"
TORCH_FP16 = "torch-fp16"
TORCH_BF16_PURE = "torch-bf16-pure"
TORCH_FP16_PURE = "torch-fp16-pure"
COMPILE_FP32 = "torch-compile-fp32"
COMPILE_BF16 = "torch-compile-bf16"
COMPILE_FP16 = "torch-compile-fp16"
ONNX_FP32 = "onnxruntime-fp32"
ONNX_FP32_ROWS = "onnxruntime-fp32-rows"
"""Each row by itself on one thread, rows side by side: what a core works on then stays in its own cache."""

OPENVINO_FP32 = "openvino-fp32"
OPENVINO_BF16 = "openvino-bf16"
OPENVINO_FP16 = "openvino-fp16"
OPENVINO_FP32_ROWS = "openvino-fp32-rows"
OPENVINO_BF16_ROWS = "openvino-bf16-rows"
GRAPH_FP32 = "cuda-graph-fp32"
GRAPH_BF16 = "cuda-graph-bf16"
GRAPH_FP16 = "cuda-graph-fp16"
TENSORRT_FP32 = "tensorrt-fp32"
TENSORRT_FP16 = "tensorrt-fp16"

RUNTIMES = (
    TORCH_FP32,
    ONNX_FP32,
    ONNX_FP32_ROWS,
    OPENVINO_FP32,
    OPENVINO_BF16,
    OPENVINO_FP16,
    OPENVINO_FP32_ROWS,
    OPENVINO_BF16_ROWS,
    TORCH_FP32_LAST,
    TORCH_BF16,
    TORCH_FP16,
    TORCH_BF16_PURE,
    TORCH_FP16_PURE,
    GRAPH_FP32,
    GRAPH_BF16,
    GRAPH_FP16,
    TENSORRT_FP32,
    TENSORRT_FP16,
    COMPILE_FP32,
    COMPILE_BF16,
    COMPILE_FP16,
)
"""All that there are, in the order in which they are tried. Those that are often fast come early, for what is far
slower than the fastest so far is not measured to the end; those that take long to make come last."""

SLOW_TO_MAKE = frozenset({COMPILE_FP32, COMPILE_BF16, COMPILE_FP16, TENSORRT_FP32, TENSORRT_FP16})
"""Take up to minutes to compile, so they are tried only when ``tune`` is told to measure again."""

SAME_ARITHMETIC = {
    COMPILE_BF16: TORCH_BF16_PURE,
    COMPILE_FP16: TORCH_FP16_PURE,
    TENSORRT_FP16: TORCH_FP16_PURE,
    OPENVINO_BF16_ROWS: OPENVINO_BF16,
}
"""No more exact than another one that is tried before."""

ROWWISE = frozenset({ONNX_FP32_ROWS, OPENVINO_FP32_ROWS, OPENVINO_BF16_ROWS})
"""Run the rows of a batch side by side, one to a thread."""

FROM_ONNX = frozenset({ONNX_FP32, OPENVINO_FP32, OPENVINO_BF16, OPENVINO_FP16}) | ROWWISE
"""Read the exported trunk."""


def check_runtime(name: str) -> None:
    """Check that there is a runtime of that name, on whatever machine.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    if name not in RUNTIMES:
        raise WireError(
            ErrorCode.INVALID_ARGUMENT, f"{name[:60]!r} is not a runtime; there are {', '.join(sorted(RUNTIMES))}"
        )
