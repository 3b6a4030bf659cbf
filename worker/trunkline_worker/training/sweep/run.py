"""Runs a sweep: sorts configurations into groups that can be computed together, computes and scores them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import CLASSIFICATION, REGRESSION, invalid
from trunkline_wire.specs import SliceSpec

from trunkline_worker.training.sources import Source
from trunkline_worker.training.split import FOLDS, Indices, folds, random_stream
from trunkline_worker.training.sweep.closed_form import ridge_outputs
from trunkline_worker.training.sweep.ensemble import ensemble_outputs
from trunkline_worker.training.sweep.linear import linear_outputs
from trunkline_worker.training.sweep.plan import Configuration, Trial, check_configuration
from trunkline_worker.training.sweep.rows import FoldedRows, Folds, HeldOut, Result, standardised_columns

# Shape suffix legend: N = rows, D = columns

Score = Callable[[Tensor, Tensor], float]
"""Logits, or values in the targets' own units, of held-out rows, and their truth, to a number: higher is better."""

_NAMED = 10
"""Failures that a message names."""


def run_sweep(
    x_ND: Tensor,
    slices: Sequence[SliceSpec],
    task: str,
    truth: Tensor,
    classes_N: Indices | None,
    configurations: Sequence[Configuration],
    *,
    num_folds: int,
    seed: int,
    score: Score,
    check: Callable[[], None],
    on_done: Callable[[float], None],
) -> list[Trial]:
    """Cross-validate configurations of a head on the training rows. All see the same folds.

    Linear heads run to convergence, others for as many epochs as a training job would run. A configuration that fails
    says why in its trial, and disturbs no other.

    Args:
        x_ND: Raw columns of the training rows. The work is done where they lie.
        slices: Which columns are which.
        task: ``classification``, ``multi_label`` or ``regression``.
        truth: Class indices, (N,), counted from 0; 0 and 1, (N, M); or values, (N, M). On the same device.
        classes_N: Class of each row, which the folds are even in; None unless there are classes.
        configurations: What to try.
        num_folds: Folds, at least 2.
        seed: Of the folds, the first weights, the order of the rows and the dropout.
        score: How good outputs are.
        check: Called between steps; what it raises to stop is let through.
        on_done: Called with the fraction done, which never falls.

    Returns:
        A trial for each configuration, in the order given. Equal arguments give equal trials, to the bit, on one
        machine with one number of threads.

    Raises:
        WireError: INVALID_ARGUMENT if there is nothing to try, or if all configurations fail: with the reasons.
            BAD_LABELS if there are fewer rows than folds.
    """
    _check_sizes(configurations, num_folds, len(x_ND))
    fold_N = torch.from_numpy(folds(classes_N, len(x_ND), num_folds, random_stream(seed, FOLDS)))
    of_rows = Folds.of(fold_N.to(x_ND.device), num_folds)
    num_outputs = int(truth.max()) + 1 if task == CLASSIFICATION else truth.shape[1]
    source = Source("", x_ND, tuple(slices))
    trials: dict[int, Trial] = {}
    groups: dict[tuple[SliceSpec, ...], list[int]] = {}
    for number, configuration in enumerate(configurations):
        try:
            groups.setdefault(tuple(check_configuration(configuration, source)), []).append(number)
        except WireError as error:
            trials[number] = _failed(configuration, error.message)

    for chosen, numbers in groups.items():
        rows = FoldedRows(standardised_columns(source, chosen), task, truth, num_outputs, of_rows)
        for some in _alike(configurations, numbers):
            start = len(trials)

            def tell(done: float, start: int = start, count: int = len(some)) -> None:
                on_done((start + count * done) / len(configurations))

            started = time.perf_counter()
            found = _run_group(rows, [configurations[one] for one in some], seed, score, check, tell)
            seconds = (time.perf_counter() - started) / len(some)
            for number, outcome in zip(some, found, strict=True):
                trials[number] = _trial(configurations[number], outcome, rows.x_ND.shape[1], seconds)
            on_done(len(trials) / len(configurations))
    ordered = [trials[number] for number in range(len(configurations))]
    _check_any(ordered)
    return ordered


def _check_sizes(configurations: Sequence[Configuration], num_folds: int, num_rows: int) -> None:
    if not configurations:
        raise invalid("a sweep needs at least one configuration")
    if num_folds < 2:
        raise invalid(f"a sweep needs at least 2 folds; got {num_folds}")
    if num_rows < num_folds:
        raise WireError(
            ErrorCode.BAD_LABELS,
            f"{num_rows} rows to train on cannot make {num_folds} folds; add rows, or ask for less",
        )


def _alike(configurations: Sequence[Configuration], numbers: Sequence[int]) -> list[list[int]]:
    """Return the configurations of one set of slices by what is computed together.

    Heads without dropout draw no random numbers for it: beside others they would see their rows in another order.
    """
    found: dict[tuple[object, ...], list[int]] = {}
    for number in numbers:
        one = configurations[number]
        found.setdefault((one.hidden, one.dropout > 0), []).append(number)
    return list(found.values())


def _run_group(
    rows: FoldedRows,
    configurations: Sequence[Configuration],
    seed: int,
    score: Score,
    check: Callable[[], None],
    tell: Callable[[float], None],
) -> list[tuple[float, ...] | str]:
    """Return the scores of each configuration, or why it failed."""
    outcomes: list[tuple[float, ...] | str] = [""] * len(configurations)
    try:
        for number, outputs in _outputs(rows, configurations, seed, check, tell):
            outcomes[number] = outputs if isinstance(outputs, str) else _scores(rows, outputs, score)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        reason = "its columns cannot be decomposed; look for values that are not finite"
        outcomes = [one or reason for one in outcomes]
    except torch.OutOfMemoryError:
        outcomes = [one or "memory ran out" for one in outcomes]
    return outcomes


def _outputs(
    rows: FoldedRows,
    configurations: Sequence[Configuration],
    seed: int,
    check: Callable[[], None],
    tell: Callable[[float], None],
) -> Iterator[Result]:
    if configurations[0].hidden:
        return ensemble_outputs(rows, configurations, seed, check=check, tell=tell)
    strengths = [one.l2 for one in configurations]
    if rows.task == REGRESSION:
        return ridge_outputs(rows, strengths, check=check, tell=tell)
    return linear_outputs(rows, strengths, check=check, tell=tell)


def _scores(rows: FoldedRows, outputs: HeldOut, score: Score) -> tuple[float, ...] | str:
    if not all(bool(one.isfinite().all()) for one in outputs):
        return "its outputs are not finite"
    scores = tuple(score(one, rows.truth[held]) for one, held in zip(outputs, rows.folds.held, strict=True))
    return scores if all(map(math.isfinite, scores)) else "its score is not finite"


def _trial(configuration: Configuration, outcome: tuple[float, ...] | str, num_columns: int, seconds: float) -> Trial:
    if isinstance(outcome, str):
        return _failed(configuration, outcome, num_columns, seconds)
    return Trial(configuration, outcome, math.fsum(outcome) / len(outcome), num_columns=num_columns, seconds=seconds)


def _failed(configuration: Configuration, error: str, num_columns: int = 0, seconds: float = 0.0) -> Trial:
    return Trial(configuration, (), -math.inf, error, num_columns, seconds)


def _check_any(trials: Sequence[Trial]) -> None:
    """Check that a configuration succeeded.

    Raises:
        WireError: INVALID_ARGUMENT, with the reasons.
    """
    if not all(one.error for one in trials):
        return
    alike: dict[str, list[Configuration]] = {}
    for one in trials:
        alike.setdefault(one.error, []).append(one.configuration)
    reasons = []
    for error, (first, *others) in list(alike.items())[:_NAMED]:
        reasons.append(f"({first}){f' and {len(others)} others' if others else ''}: {error}")
    if len(alike) > _NAMED:
        reasons.append(f"and {len(alike) - _NAMED} more")
    raise invalid(f"all configurations of the sweep failed: {'; '.join(reasons)}")
