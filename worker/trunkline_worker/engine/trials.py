"""Runtimes made, compared with float32 torch and timed, one after another; at the end one of them is left.

At any time there is one in trial and one that is the best so far, so that weights are not kept more often than that.
"""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from trunkline_wire.specs import RuntimeResult, RuntimeSpeed, SliceSpec

from trunkline_worker.engine.batcher import Monotonic
from trunkline_worker.engine.building import reason_of
from trunkline_worker.engine.choice import EXACT_ERROR, MAX_RUNTIME_ERROR, best_speed, choose, embedding_error, score
from trunkline_worker.engine.runtime_names import SAME_ARITHMETIC, SLOW_TO_MAKE, TORCH_FP32
from trunkline_worker.engine.runtimes import Runtime

logger = logging.getLogger(__name__)

_SIZE_BUDGET_S = 0.4
"""Seconds for timing one runtime at one size; one run at least."""

_MAX_RUNS = 7

_LONGEST_RUN_S = 2.0
"""A batch that would take longer is not tried: at such a pace larger batches gain nothing and keep others waiting."""

_LOST_AT_ONCE, _LOST = 3.0, 1.5
"""How many times slower than the best so far a runtime is at the first size, or at a later one, to be given up."""

_FINALISTS = 0.8
"""The second best is measured against the best once more, in turn, if it reaches this fraction of its speed."""

_ROUNDS = 3
"""How often runtimes that are compared in turn run."""

QUICK_BUDGET_S, FULL_BUDGET_S = 20.0, 400.0
"""Seconds after which no other runtime is tried: without those that are slow to make, and with them."""


class Trials:
    """The runtimes of one trunk. Every method runs on the thread that batches run on."""

    def __init__(
        self,
        build: Callable[[str], Runtime],
        *,
        sample: npt.NDArray[np.generic],
        slices: Sequence[SliceSpec],
        batch_sizes: Sequence[int],
        budget_s: float,
        clock: Monotonic,
        label: str,
    ) -> None:
        """Prepare.

        Args:
            build: Makes a runtime by its name, or raises.
            sample: Rows that errors are measured on.
            slices: What the trunk gives.
            batch_sizes: Rows of the batches that are timed, rising.
            budget_s: Seconds after which no further runtime is tried.
            clock: Measures.
            label: Of the trunk, for the log.
        """
        self._build = build
        self._sample = sample
        self._slices = slices
        self._batch_sizes = batch_sizes
        self._budget_s = budget_s
        self._clock = clock
        self._label = label
        self._start = clock.monotonic()
        self._expected_BD: Tensor | None = None
        self._kept: dict[str, Runtime] = {}
        self._results: dict[str, RuntimeResult] = {}

    @property
    def results(self) -> tuple[RuntimeResult, ...]:
        """What was found out, in the order of the trials."""
        return tuple(self._results.values())

    def refuse(self, refused: Mapping[str, str]) -> None:
        """Note runtimes that are not tried, and why."""
        for name, reason in refused.items():
            self._results[name] = RuntimeResult(name, refused=reason)

    def check(self, name: str) -> tuple[Runtime, RuntimeResult]:
        """Make a runtime and compare it with float32 torch, without timing it.

        Raises:
            Refused: It cannot be used.
        """
        runtime, result = self._made(name)
        if runtime is None:
            raise Refused(result.refused)
        return runtime, result

    def attempt(self, name: str) -> None:
        """Make a runtime, compare and time it. The first is float32 torch, and what it raises is raised here."""
        if name in self._results:
            return
        if self._clock.monotonic() - self._start > self._budget_s:
            self._results[name] = RuntimeResult(name, refused="not tried: the time for measuring was over")
            return
        twin = self._results.get(SAME_ARITHMETIC.get(name, ""))
        if twin is not None and not twin.error <= MAX_RUNTIME_ERROR:
            self._results[name] = RuntimeResult(name, refused=f"not tried: it would be as inexact as {twin.runtime}")
            return
        runtime, result = self._made(name)
        if runtime is not None:
            try:
                result = replace(result, speeds=tuple(self._timed(runtime)))
            except Exception as error:  # whatever a library raises, the others can still be used
                if name == TORCH_FP32:
                    raise
                runtime, result = None, self._failed(name, error)
        self._results[name] = result
        if runtime is not None:
            self._kept[name] = runtime
        self._keep_only(choose(self.results).runtime)

    def finish(self, fixed: str = "") -> tuple[Runtime, RuntimeResult]:
        """Return the runtime to use and what was found out about it.

        Args:
            fixed: The one to use whatever the others do. Empty: the best.

        Raises:
            Refused: The fixed one cannot be used.
        """
        if fixed:
            result = self._results[fixed]
            if result.refused:
                raise Refused(result.refused)
        else:
            self._compare_finalists()
            result = choose(self.results)
        runtime = self._kept.pop(result.runtime, None)
        self._keep_only()
        return runtime or self._build(result.runtime), result

    def _made(self, name: str) -> tuple[Runtime | None, RuntimeResult]:
        start = self._clock.monotonic()
        try:
            runtime = self._build(name)
            got_BD = runtime.run(self._sample)
        except Exception as failure:  # whatever a library raises, the others can still be used
            if name == TORCH_FP32:
                raise
            return None, self._failed(name, failure)
        load_s = self._clock.monotonic() - start
        error = self._error(name, got_BD)
        if error <= MAX_RUNTIME_ERROR:
            return runtime, RuntimeResult(name, error, load_s=load_s)
        reason = f"its embedding differs from float32 torch by {error:.2g}; at most {MAX_RUNTIME_ERROR:g}"
        logger.info("runtime %s of %s is not used: %s", name, self._label, reason)
        return None, RuntimeResult(name, error, load_s=load_s, refused=reason)

    def _error(self, name: str, got_BD: Tensor) -> float:
        if name == TORCH_FP32:
            self._expected_BD = got_BD.clone()  # a trunk that only passes features on shares their memory
            return 0.0
        if self._expected_BD is None:
            self._expected_BD = self._build(TORCH_FP32).run(self._sample).clone()
        return embedding_error(got_BD, self._expected_BD, self._slices)

    def _failed(self, name: str, error: Exception) -> RuntimeResult:
        reason = reason_of(error)
        logger.warning("runtime %s of %s is not used: %s", name, self._label, reason)
        return RuntimeResult(name, refused=reason)

    def _timed(self, runtime: Runtime) -> list[RuntimeSpeed]:
        speeds: list[RuntimeSpeed] = []
        for size in self._batch_sizes:
            # A compiled trunk runs a row alone as two, so its pace at one row says less; and making it took longer.
            longest_s = _LONGEST_RUN_S * (3 if runtime.name in SLOW_TO_MAKE else 1)
            if speeds and size / speeds[-1].rows_per_s > longest_s:
                break
            rows = self._rows(size)
            if size != len(self._sample):  # of that size it has run already
                runtime.run(rows)
            seconds: list[float] = []
            while not seconds or (len(seconds) < _MAX_RUNS and sum(seconds) < _SIZE_BUDGET_S):
                seconds.append(self._seconds(runtime, rows))
            speeds.append(RuntimeSpeed(size, size / statistics.median(seconds)))
            if runtime.name in SLOW_TO_MAKE:  # making it cost more than timing it will
                continue
            factor = _LOST_AT_ONCE if len(speeds) == 1 else _LOST
            if self._is_behind(speeds[-1], factor):
                # Once more, in turn: the machine may have been busy.
                speeds[-1] = RuntimeSpeed(size, self._in_turn([runtime, *self._kept.values()], [rows, rows])[0])
                if self._is_behind(speeds[-1], factor):
                    break
        return speeds

    def _is_behind(self, speed: RuntimeSpeed, factor: float) -> bool:
        """Whether the best so far is so many times as fast with as many rows."""
        best = [one for name in self._kept for one in self._results[name].speeds]
        return any(one.batch_rows == speed.batch_rows and speed.rows_per_s * factor < one.rows_per_s for one in best)

    def _in_turn(self, runtimes: Sequence[Runtime], rows: Sequence[npt.NDArray[np.generic]]) -> list[float]:
        """Return rows a second of runtimes that run one after the other, several times, each on its rows."""
        seconds: list[list[float]] = [[] for _ in runtimes]
        for _ in range(_ROUNDS):
            for one, runtime, batch in zip(seconds, runtimes, rows, strict=True):
                one.append(self._seconds(runtime, batch))
        return [len(batch) / statistics.median(one) for one, batch in zip(seconds, rows, strict=True)]

    def _compare_finalists(self) -> None:
        """Time the two best in turn, so that what the machine did meanwhile does not decide between them."""
        first = choose(self.results)
        others = [one for one in self.results if one.runtime != first.runtime and one.speeds and not one.refused]
        if not any(one.error <= EXACT_ERROR for one in others):
            return  # the best is the only one that is exact, and none of the others is fast enough to replace it
        second = choose(others)
        if score(second) < _FINALISTS * score(first):
            return
        if second.runtime in SLOW_TO_MAKE and second.runtime not in self._kept:
            return
        pair = (first, second)
        try:
            runtimes = [self._kept.get(one.runtime) or self._build(one.runtime) for one in pair]
            rows = [self._rows(best_speed(one).batch_rows) for one in pair]
            for runtime, batch in zip(runtimes, rows, strict=True):
                runtime.run(batch)
            found = self._in_turn(runtimes, rows)
        except Exception as error:  # there may not be room for both
            logger.warning("the two best runtimes of %s are not compared: %s", self._label, reason_of(error))
            return
        for result, runtime, batch, rows_per_s in zip(pair, runtimes, rows, found, strict=True):
            again = RuntimeSpeed(len(batch), rows_per_s)
            speeds = tuple(again if one.batch_rows == again.batch_rows else one for one in result.speeds)
            self._results[result.runtime] = replace(result, speeds=speeds)
            self._kept[result.runtime] = runtime

    def _rows(self, num_rows: int) -> npt.NDArray[np.generic]:
        return np.resize(self._sample, (num_rows, *self._sample.shape[1:]))  # repeats the sample

    def _seconds(self, runtime: Runtime, rows: npt.NDArray[np.generic]) -> float:
        start = self._clock.monotonic()
        runtime.run(rows)
        return max(self._clock.monotonic() - start, 1e-9)

    def _keep_only(self, *names: str) -> None:
        for name in [name for name in self._kept if name not in names]:
            del self._kept[name]
        _free_memory()


class Refused(Exception):
    """A runtime cannot be used, with the reason in words."""


def _free_memory() -> None:
    # The graphs of torch refer to themselves, and hold weights.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
