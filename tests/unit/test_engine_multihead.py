"""Many heads on one embedding: each run once over its own rows, those of one structure in one pass."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from drawn_heads import drawn_head
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import SliceSpec
from trunkline_worker.engine import multihead
from trunkline_worker.engine.multihead import Columns, HeadRows, run_heads
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.stacking import PackedHead, pack

SLICES = (SliceSpec("a", 10, 12), SliceSpec("b", 12, 13), SliceSpec("c", 13, 17))


class Scale:
    """A head that multiplies its columns."""

    num_outputs = num_features = 2
    more_width = size_bytes = 0

    def __init__(self, factor: float, slices: tuple[str, ...], error: Exception | None = None) -> None:
        self.factor = factor
        self.slices = slices
        self.error = error
        self.calls: list[int] = []

    def predict(self, x_BD: Tensor) -> Tensor:
        self.calls.append(len(x_BD))
        if self.error is not None:
            raise self.error
        return x_BD * self.factor


@pytest.fixture
def embedding() -> Tensor:
    return torch.arange(6 * 7, dtype=torch.float32).reshape(6, 7)


def test_columns_are_found_behind_a_cut_in_any_order(embedding: Tensor) -> None:
    columns = Columns(SLICES)
    assert columns.select(embedding, ["a"]).tolist() == embedding[:, 0:2].tolist()
    assert (
        columns.select(embedding, ["c", "a"]).tolist() == torch.cat([embedding[:, 3:7], embedding[:, 0:2]], 1).tolist()
    )
    both = columns.select(embedding, ["a", "b"])
    assert both.tolist() == embedding[:, 0:3].tolist()
    assert both.data_ptr() == embedding.data_ptr()  # side by side: nothing is copied


def test_every_head_runs_once_on_its_own_rows(embedding: Tensor) -> None:
    one, two = Scale(10, ("a",)), Scale(100, ("c", "b"))
    rows = [
        HeadRows("one", one, 0, 1),
        HeadRows("two", two, 1, 3),
        HeadRows("one", one, 3, 5),
        HeadRows("two", two, 5, 6),
    ]
    results, num_heads, num_stacked = run_heads(embedding, rows, Columns(SLICES))
    assert (num_heads, num_stacked) == (2, 0)
    assert (one.calls, two.calls) == ([3], [3])
    for part, row in zip(results, rows, strict=True):
        mine = embedding[row.start : row.stop]
        expected = mine[:, 0:2] * 10 if row.key == "one" else torch.cat([mine[:, 3:7], mine[:, 2:3]], 1) * 100
        assert isinstance(part, Tensor)
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WireError(ErrorCode.SHAPE_MISMATCH, "wrong head"), ErrorCode.SHAPE_MISMATCH),
        (RuntimeError("secret"), ErrorCode.INTERNAL),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ErrorCode.WORKER_OOM),
        (MemoryError(), ErrorCode.WORKER_OOM),
    ],
)
def test_a_head_that_fails_takes_no_other_along(embedding: Tensor, error: Exception, code: ErrorCode) -> None:
    bad, good = Scale(1, ("a",), error), Scale(1, ("a",))
    rows = [HeadRows("bad", bad, 0, 1), HeadRows("good", good, 1, 2), HeadRows("bad", bad, 2, 3)]
    results = run_heads(embedding, rows, Columns(SLICES)).results
    assert isinstance(results[1], Tensor)
    for failed in (results[0], results[2]):
        assert isinstance(failed, WireError)
        assert failed.code is code
        assert "secret" not in failed.message


def test_a_slice_that_is_not_there_fails_its_own_rows(embedding: Tensor) -> None:
    rows = [HeadRows("bad", Scale(1, ("d",)), 0, 1), HeadRows("good", Scale(1, ("a",)), 1, 2)]
    bad, good = run_heads(embedding, rows, Columns(SLICES)).results
    assert isinstance(bad, WireError)
    assert isinstance(good, Tensor)


def test_columns_of_some_rows_only() -> None:
    embedding = torch.arange(6 * 7, dtype=torch.float32).reshape(6, 7)
    picked = Columns(SLICES).select(embedding, ["c", "a"], [4, 1])
    assert picked.tolist() == torch.cat([embedding[[4, 1], 3:7], embedding[[4, 1], 0:2]], 1).tolist()
    assert Columns(SLICES).select(embedding, ["b"], slice(2, 4)).tolist() == embedding[2:4, 2:3].tolist()


# -- heads of one structure ------------------------------------------------------------------------------------------

WIDE = (SliceSpec("layer3.mean", 0, 8), SliceSpec("layer4.mean", 8, 20), SliceSpec("pooled", 20, 57))
POOLED, LOCAL = HeadInput(("pooled",), (37,)), HeadInput(("edge",), (5,))
KINDS = {
    "linear": (HeadConfig(), (POOLED,)),
    "two slices": (HeadConfig(), (HeadInput(("pooled", "layer3.mean"), (37, 8)),)),
    "mlp": (HeadConfig("mlp", (9,), batch_norm=True), (POOLED,)),
    "prototype": (HeadConfig("prototype"), (HeadInput(("layer4.mean",), (12,)),)),
    "gate": (HeadConfig(fuse="gate"), (POOLED, LOCAL)),
    "local": (HeadConfig(), (POOLED, LOCAL)),
    "conv": (HeadConfig("conv", channels=(3,)), (HeadInput(("layer4.mean",), (12,), (3, 2, 2)),)),
}
TASK_OF = {"mlp": "regression", "gate": "multi_label"}


def _zoo(num_each: int) -> dict[str, PackedHead]:
    """Return heads of every kind by a key of their own."""
    return {
        f"{kind} {seed}": pack(drawn_head(config, inputs, task=TASK_OF.get(kind, "classification"), seed=seed))
        for kind, (config, inputs) in KINDS.items()
        for seed in range(num_each)
    }


def _batch(heads: dict[str, PackedHead], chosen: list[str], sizes: list[int], seed: int = 0) -> list[HeadRows]:
    draw = np.random.default_rng(seed)
    rows, start = [], 0
    for key, size in zip(chosen, sizes, strict=True):
        width = heads[key].more_width
        more = draw.normal(size=(size, width)).astype(np.float32) if width else None
        rows.append(HeadRows(key, heads[key], start, start + size, more))
        start += size
    return rows


def _embedding(num_rows: int) -> Tensor:
    return torch.randn(num_rows, 57, generator=torch.Generator().manual_seed(num_rows))


def _alone(embedding: Tensor, one: HeadRows) -> Tensor:
    """Return what a head says of one part, computed without what is tested here."""
    ranges = {part.name: slice(part.start, part.stop) for part in WIDE}
    parts = [embedding[one.start : one.stop, ranges[name]] for name in one.head.slices]
    return one.head.predict(torch.cat([*parts, *([] if one.more_BE is None else [torch.from_numpy(one.more_BE)])], 1))


def test_any_mix_of_heads_answers_as_each_alone() -> None:
    """Heads of all kinds, in any order, in requests of any size: within the bound that the docstring states."""
    heads, draw = _zoo(4), np.random.default_rng(5)
    num_stacked = 0
    for seed in range(40):
        chosen = draw.choice(sorted(heads), size=int(draw.integers(1, 40))).tolist()
        sizes = draw.choice([1, 1, 1, 2, 5], size=len(chosen)).tolist()
        rows, embedding = _batch(heads, chosen, sizes, seed), _embedding(sum(sizes))
        run = run_heads(embedding, rows, Columns(WIDE))
        assert run.num_heads == len(set(chosen))
        num_stacked += run.num_stacked
        for one, result in zip(rows, run.results, strict=True):
            assert isinstance(result, Tensor)
            expected = _alone(embedding, one)
            assert result.shape == expected.shape
            assert float((result - expected).abs().max()) <= 1e-6 * max(1.0, float(expected.abs().max()))
    assert num_stacked > 40


def test_heads_of_one_structure_and_as_many_rows_run_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = _zoo(3)
    passes: list[int] = []
    real = multihead.predict_stacked
    monkeypatch.setattr(multihead, "predict_stacked", lambda them, x: (passes.append(len(them)), real(them, x))[1])
    chosen = ["linear 0", "mlp 0", "linear 1", "conv 0", "mlp 1", "linear 2", "linear 0", "mlp 2"]
    sizes = [1, 2, 2, 1, 2, 1, 1, 1]  # linear: 0 and 1 have two rows, 2 has one; mlp: 0 and 1 have two, 2 has one
    embedding = _embedding(sum(sizes))
    run = run_heads(embedding, _batch(heads, chosen, sizes), Columns(WIDE))
    assert passes == [2, 2]
    assert (run.num_heads, run.num_stacked) == (7, 2)


def test_a_thousand_heads_answer_a_thousand_rows_in_one_pass() -> None:
    heads = {str(seed): pack(drawn_head(seed=seed)) for seed in range(1000)}
    order = np.random.default_rng(0).permutation(1000)
    rows, embedding = _batch(heads, [str(one) for one in order], [1] * 1000), _embedding(1000)
    run = run_heads(embedding, rows, Columns(WIDE))
    assert (run.num_heads, run.num_stacked) == (1000, 1)
    for one, result in zip(rows, run.results, strict=True):
        assert isinstance(result, Tensor)
        torch.testing.assert_close(result, _alone(embedding, one), rtol=0, atol=1e-6)


def test_a_head_that_yields_nan_spoils_no_other_heads_rows() -> None:
    heads = _zoo(3)
    chosen = sorted(heads)
    embedding = _embedding(len(chosen))
    before = run_heads(embedding, _batch(heads, chosen, [1] * len(chosen)), Columns(WIDE)).results
    heads["linear 1"].flat_P[0] = float("nan")
    heads["mlp 0"].flat_P.fill_(float("inf"))
    after = run_heads(embedding, _batch(heads, chosen, [1] * len(chosen)), Columns(WIDE)).results
    for key, was, one in zip(chosen, before, after, strict=True):
        assert isinstance(was, Tensor)
        assert isinstance(one, Tensor)
        if key in ("linear 1", "mlp 0"):
            assert one.isnan().all()
        else:
            assert torch.equal(one, was)


def test_rows_that_lack_columns_fail_alone_in_a_common_pass(caplog: pytest.LogCaptureFixture) -> None:
    heads = {f"local {seed}": pack(drawn_head(*KINDS["local"], seed=seed)) for seed in range(3)}
    rows, embedding = _batch(heads, sorted(heads), [1, 1, 1]), _embedding(3)
    rows[1] = HeadRows("local 1", heads["local 1"], 1, 2, None)
    with caplog.at_level(logging.WARNING):
        first, bad, last = run_heads(embedding, rows, Columns(WIDE)).results
    assert isinstance(bad, WireError)
    assert bad.code is ErrorCode.SHAPE_MISMATCH
    for one, result in ((rows[0], first), (rows[2], last)):
        assert isinstance(result, Tensor)
        torch.testing.assert_close(result, _alone(embedding, one), rtol=0, atol=1e-6)
    assert "3 heads run one by one" in caplog.text


def test_a_pass_that_runs_out_of_memory_is_tried_head_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = _zoo(2)
    rows, embedding = _batch(heads, ["linear 0", "linear 1"], [1, 1]), _embedding(2)

    def refuse(*_: object) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(multihead, "predict_stacked", refuse)
    run = run_heads(embedding, rows, Columns(WIDE))
    assert run.num_stacked == 0
    for one, result in zip(rows, run.results, strict=True):
        assert isinstance(result, Tensor)
        torch.testing.assert_close(result, _alone(embedding, one))
