"""Runtimes measured, chosen, remembered, checked and fixed; and what is done about those that fail."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import engines
import numpy as np
import pytest
import torch
from small_backbones import SIZE, small_backbone
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import RuntimeResult, RuntimeSpeed, SliceSpec, Tuning, map_slice
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.export import sample_images
from trunkline_worker.engine import trials, trunk_exports, tuning
from trunkline_worker.engine.building import Builder
from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.engine.notes import read_note, write_note
from trunkline_worker.engine.prepared import Runtimes
from trunkline_worker.engine.runtime_names import (
    COMPILE_BF16,
    COMPILE_FP32,
    ONNX_FP32,
    OPENVINO_FP32,
    RUNTIMES,
    SLOW_TO_MAKE,
    TORCH_BF16_PURE,
    TORCH_FP32,
    TORCH_FP32_LAST,
)
from trunkline_worker.engine.runtimes import Runtime
from trunkline_worker.engine.targets import TrunkKey
from trunkline_worker.engine.threads import Threads
from trunkline_worker.engine.trials import Refused, Trials
from trunkline_worker.engine.tuning import RuntimeChooser
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import ManualClock

CPU = torch.device("cpu")
KEY = TrunkKey("input", SIZE)
SAMPLE = np.ones((4, 3), np.float32)
SLICES = [SliceSpec("pooled", 0, 3)]

with_engine = functools.partial(engines.with_engine, runtime=None, use_onnx=True)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time real runtimes once at each size, and leave their few weights to Python."""
    monkeypatch.setattr(trials, "_MAX_RUNS", 1)
    monkeypatch.setattr(trials, "_free_memory", lambda: None)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(f"file://{tmp_path}/store")


@pytest.fixture(scope="module")
def small() -> Backbone:
    return small_backbone()


class Fake:
    """A runtime whose batches take ``first_s`` and ``row_s`` a row of a clock that it moves itself."""

    def __init__(self, name: str, clock: ManualClock, *, row_s: float, first_s: float = 0.0, error: float = 0.0):
        self.name, self._clock, self._row_s, self._first_s, self._error = name, clock, row_s, first_s, error
        self.batches: list[int] = []

    def run(self, features: np.ndarray) -> Tensor:
        self.batches.append(len(features))
        self._clock.advance(self._first_s + self._row_s * len(features))
        return torch.from_numpy(features * (1 + self._error))


class Broken:
    """A runtime that does not run."""

    name = OPENVINO_FP32

    def run(self, features: np.ndarray) -> Tensor:
        raise RuntimeError("illegal instruction")


def _trials(clock: ManualClock, made: dict[str, Callable[[], Runtime]], **options: Any) -> Trials:
    settings: dict[str, Any] = {"batch_sizes": (1, 8, 32), "budget_s": 100.0, **options}
    return Trials(lambda name: made[name](), sample=SAMPLE, slices=SLICES, clock=clock, label="the trunk", **settings)


@pytest.fixture
def _seven_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_MAX_RUNS", 7)


@pytest.mark.usefixtures("_seven_runs")
class TestTrials:
    def test_each_runtime_is_timed_at_each_size(self) -> None:
        clock = ManualClock()
        fp32 = Fake(TORCH_FP32, clock, row_s=0.01, first_s=0.1)
        onnx = Fake(ONNX_FP32, clock, row_s=0.01)
        tried = _trials(clock, {TORCH_FP32: lambda: fp32, ONNX_FP32: lambda: onnx})
        tried.attempt(TORCH_FP32)
        tried.attempt(ONNX_FP32)
        first, second = tried.results
        assert [(one.batch_rows, round(one.rows_per_s, 1)) for one in first.speeds] == [
            (1, round(1 / 0.11, 1)),
            (8, round(8 / 0.18, 1)),
            (32, round(32 / 0.42, 1)),
        ]
        assert [round(one.rows_per_s) for one in second.speeds] == [100, 100, 100]
        assert first.load_s == pytest.approx(0.14) and first.error == 0
        runtime, result = tried.finish()
        assert runtime is onnx and result.runtime == ONNX_FP32

    def test_what_is_far_behind_is_given_up(self) -> None:
        clock = ManualClock()
        made = {
            TORCH_FP32: Fake(TORCH_FP32, clock, row_s=0.01),
            ONNX_FP32: Fake(ONNX_FP32, clock, row_s=0.031),  # 3.1 times slower at once
            OPENVINO_FP32: Fake(OPENVINO_FP32, clock, row_s=0.016),  # 1.6 times slower at 8
            COMPILE_FP32: Fake(COMPILE_FP32, clock, row_s=0.031),  # making it was the larger part
        }
        tried = _trials(clock, {name: lambda one=one: one for name, one in made.items()})  # type: ignore[misc]
        for name in made:
            tried.attempt(name)
        assert [[one.batch_rows for one in result.speeds] for result in tried.results] == [
            [1, 8, 32],
            [1],
            [1, 8],
            [1, 8, 32],
        ]

    def test_one_that_was_slow_for_a_moment_is_not_given_up(self) -> None:
        clock = ManualClock()

        class Disturbed(Fake):
            def run(self, features: np.ndarray) -> Tensor:
                self._row_s = 0.1 if len(self.batches) < 1 + 1 + 4 else 0.005
                return super().run(features)

        made: dict[str, Callable[[], Runtime]] = {
            TORCH_FP32: lambda: Fake(TORCH_FP32, clock, row_s=0.01),
            ONNX_FP32: lambda: Disturbed(ONNX_FP32, clock, row_s=0.1),
        }
        tried = _trials(clock, made)
        for name in made:
            tried.attempt(name)
        assert [round(one.rows_per_s) for one in tried.results[1].speeds] == [200, 200, 200]
        assert tried.finish()[1].runtime == ONNX_FP32

    def test_what_computes_alike_and_was_too_inexact_is_not_compiled(self) -> None:
        clock = ManualClock()
        made: dict[str, Callable[[], Runtime]] = {
            TORCH_FP32: lambda: Fake(TORCH_FP32, clock, row_s=0.01),
            TORCH_BF16_PURE: lambda: Fake(TORCH_BF16_PURE, clock, row_s=0.001, error=0.1),
            COMPILE_BF16: lambda: pytest.fail("compiled"),
        }
        tried = _trials(clock, made)
        for name in made:
            tried.attempt(name)
        assert TORCH_BF16_PURE in tried.results[2].refused

    def test_batches_that_take_seconds_are_not_tried(self) -> None:
        clock = ManualClock()
        tried = _trials(clock, {TORCH_FP32: lambda: Fake(TORCH_FP32, clock, row_s=0.2)})
        tried.attempt(TORCH_FP32)
        assert [one.batch_rows for one in tried.results[0].speeds] == [1, 8]

    def test_the_time_for_measuring_is_bounded(self) -> None:
        clock = ManualClock()
        made = {name: lambda name=name: Fake(name, clock, row_s=0.1) for name in (TORCH_FP32, ONNX_FP32)}
        tried = _trials(clock, made, budget_s=1.0)
        for name in made:
            tried.attempt(name)
        assert not tried.results[0].refused and "time" in tried.results[1].refused
        assert tried.finish()[1].runtime == TORCH_FP32

    @pytest.mark.parametrize("when", ["load", "run", "later"])
    def test_one_that_fails_is_named_and_the_others_go_on(self, when: str, caplog: pytest.LogCaptureFixture) -> None:
        clock = ManualClock()

        class Later(Fake):
            def run(self, features: np.ndarray) -> Tensor:
                if len(features) > len(SAMPLE):
                    raise RuntimeError("illegal instruction")
                return super().run(features)

        def load() -> Runtime:
            if when == "load":
                raise OSError("illegal instruction")
            return Broken() if when == "run" else Later(OPENVINO_FP32, clock, row_s=0.001)

        made: dict[str, Callable[[], Runtime]] = {
            TORCH_FP32: lambda: Fake(TORCH_FP32, clock, row_s=0.01),
            OPENVINO_FP32: load,
            ONNX_FP32: lambda: Fake(ONNX_FP32, clock, row_s=0.005),
        }
        tried = _trials(clock, made)
        for name in made:
            tried.attempt(name)
        assert "illegal instruction" in tried.results[1].refused and not tried.results[1].speeds
        assert f"{OPENVINO_FP32} of the trunk is not used" in caplog.text
        assert tried.finish()[1].runtime == ONNX_FP32

    def test_float32_torch_that_fails_is_an_error(self) -> None:
        def load() -> Runtime:
            raise MemoryError

        with pytest.raises(MemoryError):
            _trials(ManualClock(), {TORCH_FP32: load}).attempt(TORCH_FP32)

    @pytest.mark.parametrize("error", [0.021, float("nan"), float("inf")])
    def test_one_whose_answers_differ_is_not_chosen_however_fast(self, error: float) -> None:
        clock = ManualClock()
        made: dict[str, Callable[[], Runtime]] = {
            TORCH_FP32: lambda: Fake(TORCH_FP32, clock, row_s=0.01),
            ONNX_FP32: lambda: Fake(ONNX_FP32, clock, row_s=0.0001, error=error),
        }
        tried = _trials(clock, made)
        for name in made:
            tried.attempt(name)
        assert "differs" in tried.results[1].refused and not tried.results[1].speeds
        assert tried.finish()[1].runtime == TORCH_FP32

    def test_the_two_best_are_timed_once_more_in_turn(self) -> None:
        """The machine was slow while the better one was measured first."""
        clock = ManualClock()
        fp32, onnx = Fake(TORCH_FP32, clock, row_s=0.01), Fake(ONNX_FP32, clock, row_s=0.0105)
        tried = _trials(clock, {TORCH_FP32: lambda: fp32, ONNX_FP32: lambda: onnx}, batch_sizes=(8,))
        tried.attempt(TORCH_FP32)
        tried.attempt(ONNX_FP32)
        onnx._row_s = 0.005
        runtime, result = tried.finish()
        assert runtime is onnx and result.best.rows_per_s == pytest.approx(200)
        assert [len(one.batches) for one in (fp32, onnx)] == [1 + 1 + 5 + 1 + 3] * 2

    def test_the_two_best_need_not_fit_side_by_side(self, caplog: pytest.LogCaptureFixture) -> None:
        clock = ManualClock()
        left = {TORCH_FP32: 1, ONNX_FP32: 1}

        def make(name: str, row_s: float) -> Runtime:
            left[name] -= 1
            if left[name] < 0:
                raise MemoryError
            return Fake(name, clock, row_s=row_s)

        made = {TORCH_FP32: lambda: make(TORCH_FP32, 0.01), ONNX_FP32: lambda: make(ONNX_FP32, 0.009)}
        tried = _trials(clock, made)
        for name in made:
            tried.attempt(name)
        assert tried.finish()[1].runtime == ONNX_FP32
        assert "MemoryError" in caplog.text

    def test_only_the_best_so_far_is_kept(self) -> None:
        clock = ManualClock()
        alive: list[weakref.ref[Fake]] = []
        at_a_time: list[int] = []

        def make(name: str, row_s: float) -> Runtime:
            gc.collect()
            at_a_time.append(sum(one() is not None for one in alive))
            runtime = Fake(name, clock, row_s=row_s)
            alive.append(weakref.ref(runtime))
            return runtime

        paces = dict(zip(RUNTIMES, (0.01, 0.02, 0.001, 0.1, 0.002), strict=False))
        tried = _trials(clock, {name: functools.partial(make, name, pace) for name, pace in paces.items()})
        for name in paces:
            tried.attempt(name)
        runtime, _ = tried.finish()
        gc.collect()
        assert [one() for one in alive if one() is not None] == [runtime]
        assert max(at_a_time) == 1


class Bench:
    """Engines' parts on one storage; runtimes that a test puts in the place of real ones."""

    def __init__(self, backbone: Backbone, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self._backbone, self.blobs = backbone, blobs
        self.instead: dict[str, Callable[[], Runtime]] = {}
        self.built: list[str] = []
        build = Builder.build

        def built(builder: Builder, name: str, *args: Any, **options: Any) -> Runtime:
            self.built.append(name)
            return self.instead[name]() if name in self.instead else build(builder, name, *args, **options)

        monkeypatch.setattr(Builder, "build", built)

    def chooser(self, *, fixed: str = "", use_onnx: bool = False, num_threads: int = 1) -> RuntimeChooser:
        return RuntimeChooser(
            self._backbone,
            self._backbone,
            self.blobs,
            device=CPU,
            num_threads=num_threads,
            most_rows=8,
            clock=engines.SystemClock(),
            use_onnx=use_onnx,
            fixed=fixed,
        )

    def do(self, test: Callable[[Runtimes], Any], **options: Any) -> Any:
        """Await ``test`` with runtimes that start from what storage has; then nothing is left of them."""
        self.built.clear()

        async def main() -> Any:
            threads = Threads(1)
            runtimes = Runtimes(self.chooser(**options), threads)
            try:
                return await test(runtimes)
            finally:
                runtimes.close()
                await threads.close()

        return asyncio.run(main())

    def tune(self, again: bool = False, key: TrunkKey = KEY, **options: Any) -> Tuning:
        return self.do(lambda runtimes: runtimes.tune(key, again=again), **options)

    def path(self, **options: Any) -> str:
        return self.chooser(**options)._note_path(KEY)


@pytest.fixture
def bench(small: Backbone, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(small, blobs, monkeypatch)


class Differs:
    """Float32 torch, but for a factor."""

    name = TORCH_FP32_LAST

    def __init__(self, backbone: Backbone, factor: float) -> None:
        self._trunk, self._factor = backbone.trunk("input"), factor

    @torch.inference_mode()
    def run(self, features: np.ndarray) -> Tensor:
        return self._trunk(torch.from_numpy(features.copy())) * self._factor


def _note(bench: Bench, chosen: str, error: float = 0.0) -> Tuning:
    """Keep a note that a runtime was chosen."""
    tuning = Tuning(
        backbone="places",
        cut="input",
        input_size=SIZE,
        device="cpu",
        num_threads=1,
        runtimes=(RuntimeResult(chosen, error, (RuntimeSpeed(1, 50.0), RuntimeSpeed(8, 99.0)), 0.1),),
        chosen=chosen,
        batch_rows=8,
    )
    write_note(bench.blobs, bench.path(), tuning)
    return tuning


def test_the_choice_is_measured_once_and_answered_from_storage(bench: Bench) -> None:
    found = bench.tune()
    assert {TORCH_FP32, TORCH_FP32_LAST} <= set(bench.built)
    assert found.chosen and found.runtime(found.chosen) and not found.fixed and found.num_threads == 1
    assert dict(found.libraries)["torch"] == torch.__version__.split("+")[0]
    assert all(one.refused for one in found.runtimes if one.runtime in SLOW_TO_MAKE)
    assert not SLOW_TO_MAKE & set(bench.built)
    assert [one.runtime for one in found.runtimes] == sorted(
        (one.runtime for one in found.runtimes), key=RUNTIMES.index
    )
    assert bench.tune() == found
    assert set(bench.built) <= {found.chosen, TORCH_FP32}  # loaded and checked, not measured
    # Another number of threads, or another size, is another machine or network.
    for options in ({"num_threads": 2}, {"key": TrunkKey("norm", SIZE)}):
        bench.tune(**options)
        assert TORCH_FP32_LAST in bench.built


def test_the_runtime_of_a_map_is_chosen_by_its_tap(bench: Bench, small: Backbone) -> None:
    with torch.inference_mode():
        features = small.stem("norm")(sample_images(3, SIZE, seed=7))
    for tap in ("blocks.1", "blocks.3", ""):

        async def test(runtimes: Runtimes, tap: str = tap) -> Tensor:
            prepared = await runtimes.get(TrunkKey("norm", SIZE, tap and map_slice(tap)))
            return await runtimes._threads.compute(prepared.runtime.run, features.contiguous().numpy())

        for _ in range(2):
            got, expected = bench.do(test), small.trunk("norm", tap and map_slice(tap))(features)
            torch.testing.assert_close(got, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_measuring_again_tries_what_is_slow_to_make_and_what_it_finds_is_used(bench: Bench) -> None:
    class Instant:
        """Says at once what float32 torch would say of the sample."""

        def __init__(self, name: str) -> None:
            self.name = name
            self._known: dict[int, Tensor] = {}

        def run(self, features: np.ndarray) -> Tensor:
            if len(features) not in self._known:
                with torch.inference_mode():
                    trunk = bench._backbone.trunk("input")
                    self._known[len(features)] = trunk(torch.from_numpy(features.copy()))
            return self._known[len(features)]

    bench.instead = {name: functools.partial(Instant, name) for name in SLOW_TO_MAKE}

    async def test(runtimes: Runtimes) -> tuple[Tuning, Tuning, str]:
        first = await runtimes.tune(KEY)
        before = await runtimes.get(KEY)
        both = await asyncio.gather(*(runtimes.tune(KEY, again=True) for _ in range(2)))
        after = await runtimes.get(KEY)
        assert both[0] is both[1] is after.tuning and before is not after
        return first, both[0], after.runtime.name

    first, second, used = bench.do(test)
    assert first.chosen not in SLOW_TO_MAKE
    assert second.chosen in SLOW_TO_MAKE and second.chosen == used
    assert bench.built.count(COMPILE_FP32) == 1  # two who ask at a time share it
    assert bench.tune() == second


@pytest.mark.parametrize(
    "note",
    [
        b"\x00not json",
        b"[]",
        b"{}",
        b'{"format": 1, "tuning": {}}',
        b'{"format": 2}',
    ],
)
def test_a_damaged_note_is_measured_anew(bench: Bench, note: bytes) -> None:
    bench.blobs.put(bench.path(), note)
    assert bench.tune().chosen
    assert TORCH_FP32_LAST in bench.built


@pytest.mark.parametrize(
    "change",
    [
        {"chosen": "tpu"},
        {"batch_rows": 0},
        {"batch_rows": 10**9},
        {"runtimes": ()},
        {"runtimes": (RuntimeResult(TORCH_FP32, 0.0, ()),)},
        {"runtimes": (RuntimeResult(TORCH_FP32, 0.5, (RuntimeSpeed(8, 1.0),)),)},
        {"runtimes": (RuntimeResult(TORCH_FP32, float("nan"), (RuntimeSpeed(8, 1.0),)),)},
        {"runtimes": (RuntimeResult(TORCH_FP32, 0.0, (RuntimeSpeed(8, float("inf")),)),)},
        {"runtimes": (RuntimeResult(TORCH_FP32, 0.0, (RuntimeSpeed(8, 1.0),), 0.0, "refused"),)},
    ],
)
def test_a_note_that_makes_no_sense_is_not_read(
    bench: Bench, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tuning = _note(bench, TORCH_FP32)
    assert read_note(bench.blobs, bench.path()) == tuning
    write_note(bench.blobs, bench.path(), replace(tuning, **change))
    assert read_note(bench.blobs, bench.path()) is None
    assert "damaged" in caplog.text


def test_one_that_was_chosen_and_is_gone_is_measured_anew(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    for chosen, build in (
        (ONNX_FP32, None),  # not available: exports are switched off
        (TORCH_FP32_LAST, lambda: (_ for _ in ()).throw(OSError("library gone"))),
    ):
        _note(bench, chosen)
        bench.instead = {chosen: build} if build else {}
        found = bench.tune()
        assert found.chosen != chosen and found.runtime(TORCH_FP32).speeds  # type: ignore[union-attr]
        assert f"{chosen}, which was chosen" in caplog.text
        assert read_note(bench.blobs, bench.path()) == found


def test_one_whose_answers_have_changed_since_is_not_used(
    bench: Bench, small: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    noted = _note(bench, TORCH_FP32_LAST)
    bench.instead[TORCH_FP32_LAST] = lambda: Differs(small, 1.01)
    assert bench.tune() == noted  # within the bound
    bench.instead[TORCH_FP32_LAST] = lambda: Differs(small, 1.1)
    found = bench.tune()
    assert found.chosen != TORCH_FP32_LAST
    assert "differs" in found.runtime(TORCH_FP32_LAST).refused  # type: ignore[union-attr]
    assert "0.1; at most 0.02" in caplog.text
    # Nor where it answers rightly when it is asked once more.
    _note(bench, TORCH_FP32_LAST)
    answers = [Differs(small, 1.1), Differs(small, 1.0), Differs(small, 1.0)]
    bench.instead[TORCH_FP32_LAST] = lambda: answers.pop(0)
    assert bench.tune().chosen != TORCH_FP32_LAST


def test_a_fixed_runtime_is_used_and_timed_when_asked(bench: Bench) -> None:
    async def test(runtimes: Runtimes) -> tuple[str, int, Tuning, int]:
        started = await runtimes.get(KEY)
        tuning = await runtimes.tune(KEY)
        after = await runtimes.get(KEY)
        return started.runtime.name, started.batch_rows, tuning, after.batch_rows

    for fixed in (TORCH_FP32_LAST, TORCH_FP32):
        name, before, tuning, after = bench.do(test, fixed=fixed)
        assert (name, before, tuning.chosen, tuning.fixed) == (fixed, 0, fixed, True)
        assert after == tuning.batch_rows > 0
        assert tuning.runtime(fixed).speeds and tuning.runtime(TORCH_FP32).speeds  # type: ignore[union-attr]
        assert bench.do(test, fixed=fixed)[1:] == (after, tuning, after)  # remembered
    assert not bench.tune().fixed  # and apart from what is chosen freely


def test_a_fixed_runtime_starts_without_measuring(bench: Bench) -> None:
    async def test(runtimes: Runtimes) -> float:
        return (await runtimes.get(KEY)).error

    assert bench.do(test, fixed=TORCH_FP32) == 0 and bench.built == [TORCH_FP32]
    assert 0 <= bench.do(test, fixed=TORCH_FP32_LAST) < 1e-4
    assert sorted(bench.built) == [TORCH_FP32, TORCH_FP32_LAST]


@pytest.mark.parametrize("why", ["unavailable", "load", "run", "answers"])
def test_a_fixed_runtime_that_cannot_be_used_is_an_error_that_says_why(bench: Bench, small: Backbone, why: str) -> None:
    fixed = ONNX_FP32 if why == "unavailable" else TORCH_FP32_LAST
    if why == "load":
        bench.instead[fixed] = lambda: (_ for _ in ()).throw(OSError("library gone"))
    elif why == "run":
        bench.instead[fixed] = Broken
    elif why == "answers":
        bench.instead[fixed] = lambda: Differs(small, 1.1)
    reason = {"unavailable": "switched off", "load": "gone", "run": "illegal", "answers": "differs"}[why]
    for call in (lambda runtimes: runtimes.get(KEY), lambda runtimes: runtimes.tune(KEY, again=False)):
        with pytest.raises(WireError, match=reason) as caught:
            bench.do(call, fixed=fixed)
        assert caught.value.code is ErrorCode.UNSUPPORTED
        assert fixed in caught.value.message and TORCH_FP32 in caught.value.message


def test_a_runtime_that_does_not_exist_cannot_be_fixed(bench: Bench) -> None:
    with pytest.raises(WireError, match="tpu") as caught:
        bench.chooser(fixed="tpu")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_without_an_export_torch_serves(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_args: object, **_options: object) -> bytes:
        raise WireError(ErrorCode.UNSUPPORTED, "no such operator")

    monkeypatch.setattr(trunk_exports, "export_module", fails)
    found = bench.tune(use_onnx=True)
    assert found.chosen.startswith("torch-")
    for name in (ONNX_FP32, OPENVINO_FP32):
        assert found.runtime(name).refused == "no such operator"  # type: ignore[union-attr]
    assert "no such operator" in caplog.text


def test_a_trunk_is_exported_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench.tune(use_onnx=True)
    for name in (ONNX_FP32, OPENVINO_FP32):
        assert found.runtime(name).error < 1e-4 and found.runtime(name).speeds  # type: ignore[union-attr]
    monkeypatch.setattr(trunk_exports, "export_module", lambda *_args, **_options: pytest.fail("exported again"))
    bench.blobs.put(bench.path(use_onnx=True), b"lost")
    assert bench.tune(use_onnx=True).runtime(ONNX_FP32).speeds  # type: ignore[union-attr]


def test_a_full_storage_costs_the_note_not_the_service(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise WireError(ErrorCode.STORAGE_FULL, "full")

    monkeypatch.setattr(BlobStore, "put", full)
    assert bench.tune().chosen


def test_runtimes_are_made_and_run_on_one_thread(bench: Bench) -> None:
    import threading

    seen = set()

    class Watched(Differs):
        def run(self, features: np.ndarray) -> Tensor:
            seen.add(threading.current_thread().name)
            return super().run(features)

    def make() -> Runtime:
        seen.add(threading.current_thread().name)
        return Watched(bench._backbone, 1.0)

    bench.instead[TORCH_FP32_LAST] = make
    bench.tune()
    assert len(seen) == 1 and "trunk" in seen.pop()


def test_trials_refuse_what_was_refused_before() -> None:
    clock = ManualClock()
    tried = _trials(clock, {TORCH_FP32: lambda: Fake(TORCH_FP32, clock, row_s=0.01)})
    tried.attempt(TORCH_FP32)
    tried.refuse({ONNX_FP32: "it drifted"})
    tried.attempt(ONNX_FP32)
    assert tried.results[1].refused == "it drifted"
    with pytest.raises(Refused, match="drifted"):
        tried.finish(ONNX_FP32)


class TestEngine:
    def test_what_is_measured_is_described_and_bounds_the_batches(
        self, small: Backbone, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tuning, "best_speed", lambda result: result.speeds[1])  # of three
        spec = small.describe()
        images = sample_images(40, SIZE).numpy()

        async def test(engine: LocalEngine) -> None:
            assert (await engine.describe()).rows_per_s == 0
            found = await engine.tune()
            assert (found.cut, found.input_size, found.fixed) == ("input", SIZE, False)
            assert {ONNX_FP32, OPENVINO_FP32} <= {one.runtime for one in found.runtimes}
            described = await engine.describe()
            assert (described.runtime, described.batch_rows) == (found.chosen, found.batch_rows)
            speeds = {one.batch_rows: one.rows_per_s for one in found.runtime(found.chosen).speeds}  # type: ignore[union-attr]
            assert described.rows_per_s == speeds[found.batch_rows]
            before = (await engine.stats()).trunk_calls
            await engine.extract(spec.space(spec.cuts[0]), images)
            assert (await engine.stats()).trunk_calls - before == -(-len(images) // found.batch_rows)
            assert found.batch_rows == 32  # of 64 that the engine allows

        with_engine(small, blobs, test, max_rows=16)

    def test_an_unknown_cut_or_size_is_refused(self, small: Backbone, blobs: BlobStore) -> None:
        async def test(engine: LocalEngine) -> None:
            for call, code in (
                (engine.tune("nowhere"), ErrorCode.NOT_FOUND),
                (engine.tune("norm", 5), ErrorCode.INVALID_ARGUMENT),
            ):
                with pytest.raises(WireError) as caught:
                    await call
                assert caught.value.code is code
            assert (await engine.tune("norm")).cut == "norm"

        with_engine(small, blobs, test, runtime=TORCH_FP32, use_onnx=False)

    def test_a_fixed_runtime_that_cannot_be_used_fails_the_start(self, small: Backbone, blobs: BlobStore) -> None:
        engine = LocalEngine(
            small, blobs, clock=engines.SystemClock(), device="cpu", num_threads=1, runtime="cuda-graph-fp16"
        )

        async def start() -> None:
            try:
                await engine.start()
            finally:
                await engine.close()

        with pytest.raises(WireError, match=r"cuda-graph-fp16.*CUDA only"):
            asyncio.run(start())
        with pytest.raises(WireError, match="not a runtime"):
            LocalEngine(small, blobs, clock=engines.SystemClock(), device="cpu", num_threads=1, runtime="warp")

    def test_rows_are_answered_while_runtimes_are_measured_again(
        self, small: Backbone, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        why_not = Builder.why_not
        monkeypatch.setattr(
            Builder, "why_not", lambda self, name: "not here" if name in SLOW_TO_MAKE else why_not(self, name)
        )
        spec = small.describe()
        images = sample_images(2, SIZE).numpy()

        async def test(engine: LocalEngine) -> None:
            await engine.tune()
            tuning = asyncio.ensure_future(engine.tune(again=True))
            answered = 0
            while not tuning.done():
                await engine.extract(spec.space(spec.cuts[0]), images)
                answered += 1
            assert answered > 1 and not (await tuning).fixed

        with_engine(small, blobs, test, use_onnx=False)


def test_a_note_holds_a_refusal_without_a_number(blobs: BlobStore) -> None:
    refused = RuntimeResult("torch-bf16", float("inf"), refused="it differs by inf")
    good = RuntimeResult(TORCH_FP32, 0.0, (RuntimeSpeed(1, 5.0),), 0.5)
    tuning = Tuning("any", "input", 32, "cpu", 1, (good, refused), TORCH_FP32, 1, libraries=(("torch", "2"),))
    write_note(blobs, "runtimes/one.json", tuning)
    assert read_note(blobs, "runtimes/one.json") == tuning
    assert json.loads(blobs.get("runtimes/one.json"))["format"] == 1
    assert read_note(blobs, "runtimes/other.json") is None
