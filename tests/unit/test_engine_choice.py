"""The rule by which one of the measured runtimes is chosen, and what an error is."""

from __future__ import annotations

import pytest
import torch
from small_backbones import small_backbone
from trunkline_wire.specs import RuntimeResult, RuntimeSpeed, SliceSpec
from trunkline_worker.engine.choice import best_speed, choose, embedding_error, trunk_slices
from trunkline_worker.engine.runtimes import batch_sizes, rows_at

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _r(name: str, error: float, *speeds: float, refused: str = "") -> RuntimeResult:
    """Make a result, of speeds at 1, 8 and 32 rows."""
    sizes = zip((1, 8, 32), speeds, strict=False)
    return RuntimeResult(name, error, tuple(RuntimeSpeed(*one) for one in sizes), refused=refused)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([_r("fp32", 0, 10), _r("bf16", 0.01, 30), _r("onnx", 1e-6, 20)], "bf16"),
        ([_r("fp32", 0, 10), _r("bf16", 0.01, 24), _r("onnx", 1e-6, 20)], "onnx"),  # not by a clear margin
        ([_r("fp32", 0, 10), _r("bf16", 0.021, 99), _r("onnx", 1e-6, 5)], "fp32"),  # over the bound
        ([_r("fp32", 0, 10), _r("bf16", float("inf"), 99)], "fp32"),
        ([_r("fp32", 0, 10), _r("bf16", float("nan"), 99)], "fp32"),
        ([_r("fp32", 0, 10), _r("onnx", 1e-6, 99, refused="it crashed")], "fp32"),
        ([_r("fp32", 0, 10), _r("onnx", 1e-6)], "fp32"),  # not measured
        ([_r("fp32", 0, 10)], "fp32"),
        # Each by its own best size.
        ([_r("fp32", 0, 10, 11, 12), _r("onnx", 1e-6, 5, 9, 13)], "onnx"),
        # Equal but for three percent: the smaller batch, then the smaller error.
        ([_r("fp32", 0, 5, 9, 20), _r("onnx", 1e-6, 19.8, 19)], "onnx"),
        ([_r("fp32", 0, 19.5), _r("onnx", 1e-6, 20)], "fp32"),
        ([_r("fp32", 0, 19.3), _r("onnx", 1e-6, 20)], "onnx"),
    ],
)
def test_the_fastest_within_the_bound_is_chosen(results: list[RuntimeResult], expected: str) -> None:
    assert choose(results).runtime == expected


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ((10, 20, 30), 32),
        ((10, 29.5, 30), 8),
        ((29.8, 20, 30), 1),
        ((30, 20, 10), 1),
        ((10,), 1),
        # Rows that take no time: what each batch costs beside them decides.
        ((30_000, 30_000, 30_000), 32),
        ((300, 303, 303), 8),
    ],
)
def test_the_smallest_batch_that_is_about_as_fast_is_used(speeds: tuple[float, ...], expected: int) -> None:
    assert best_speed(_r("any", 0, *speeds)).batch_rows == expected


def test_the_error_is_that_of_the_worst_slice() -> None:
    slices = [SliceSpec("a", 5, 7), SliceSpec("b", 7, 8)]
    expected = torch.tensor([[30.0, 40.0, 1.0]])
    assert embedding_error(expected, expected, slices) == 0
    assert embedding_error(torch.tensor([[30.0, 40.0, 1.1]]), expected, slices) == pytest.approx(0.1, rel=1e-4)
    assert embedding_error(torch.tensor([[35.0, 40.0, 1.0]]), expected, slices) == pytest.approx(0.1, rel=1e-4)
    assert embedding_error(torch.tensor([[30.0, float("nan"), 1.0]]), expected, slices) == float("inf")


def test_the_error_of_a_map_is_measured_on_all_of_it() -> None:
    spec = small_backbone().describe()
    assert trunk_slices(spec, "norm", "blocks.3.map") == [SliceSpec("blocks.3.map", 0, 16 * 64)]
    assert [one.name for one in trunk_slices(spec, "blocks.3", "")] == [
        "blocks.3.mean",
        "blocks.3.std",
        "blocks.3.grid",
        "pooled",
    ]


def test_batches_are_measured_at_sizes_that_hold_as_many_pixels() -> None:
    assert batch_sizes(CPU, 32, 224) == (1, 8, 32)
    assert batch_sizes(CUDA, 256, 224) == (1, 32, 256)
    assert batch_sizes(CPU, 32, 448) == (1, 2, 8)
    assert batch_sizes(CPU, 32, 32) == (1, 32, 128)  # four times as many at most
    assert batch_sizes(CPU, 4, 224) == (1, 4)  # no more than the engine allows
    assert batch_sizes(CPU, 1, 1024) == (1,)
    assert rows_at(32, 1024) == 1
