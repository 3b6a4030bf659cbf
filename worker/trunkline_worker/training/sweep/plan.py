"""What a sweep tries, what came of it, and which of it wins."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from trunkline_wire.fits import FOCAL, QUANTILE
from trunkline_wire.heads import CONCAT, LINEAR, MLP, PROTOTYPE, invalid
from trunkline_wire.specs import SliceSpec

from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.sources import Source
from trunkline_worker.training.spec import check_spec

PLAIN = JobSpec(model="", dataset="", backbone="", input_size=0)
"""A job that leaves all to us: what configurations vary where nothing else is said."""


@dataclass(frozen=True)
class Configuration:
    """What is tried: a job whose values take the place of another's, see ``spec``.

    Attributes:
        slices: Names of the slices whose columns it reads. Their order means nothing.
        l2: Penalty on the sum of the rows' losses, scikit-learn's 1 / C; with layers of its own AdamW's weight decay.
        hidden: Widths of the hidden layers. Empty: none.
        learning_rate: Of heads that learn in steps, at its highest. 0: the trainer's own.
        dropout: Fraction of each hidden layer's units, or of pooled channels, that a training step leaves out.
    """

    slices: tuple[str, ...]
    l2: float
    hidden: tuple[int, ...] = ()
    learning_rate: float = 0.0
    dropout: float = 0.0

    def __str__(self) -> str:
        """Say it in a few words, for messages."""
        words = [f"slices {', '.join(self.slices)[:80] or 'none'}", f"l2 {self.l2:g}"]
        if self.hidden:
            words.append(f"hidden {', '.join(map(str, self.hidden))}")
        if self.learning_rate:
            words.append(f"learning rate {self.learning_rate:g}")
        if self.dropout:
            words.append(f"dropout {self.dropout:g}")
        return "; ".join(words)

    def spec(self, around: JobSpec = PLAIN) -> JobSpec:
        """Return the training job that it stands for. What it does not vary is that of another.

        Args:
            around: Whose head, loss, solver and the like it varies.

        Raises:
            WireError: INVALID_ARGUMENT for a head that cannot be.
        """
        kind = kind_of(around, self.hidden)
        # A linear head beside MLPs has nothing that could be normalised.
        batch_norm = around.head.batch_norm and kind != LINEAR
        return replace(
            around,
            sweep=None,
            head=replace(around.head, kind=kind, hidden=self.hidden, dropout=self.dropout, batch_norm=batch_norm),
            solver=solver_of(around, self.hidden),
            learning_rate=self.learning_rate,
            l2=self.l2,
        )


def kind_of(around: JobSpec, hidden: Sequence[int]) -> str:
    """Return the kind of head that hidden layers make of a job's: linear ones and MLPs become each other."""
    if around.head.kind not in (LINEAR, MLP):
        return around.head.kind
    return MLP if hidden else LINEAR


def solver_of(around: JobSpec, hidden: Sequence[int]) -> str:
    """Return how a head is trained: as was asked for where that fits it, otherwise as ``auto`` has it."""
    kind = kind_of(around, hidden)
    if kind not in (LINEAR, PROTOTYPE):
        return "adamw"
    if around.head.kind == kind:
        return around.solver
    return "adamw" if around.head.fuse != CONCAT or around.loss.kind in (FOCAL, QUANTILE) else "lbfgs"


@dataclass(frozen=True)
class Trial:
    """What came of a configuration.

    Attributes:
        configuration: What was tried.
        scores: One a fold; higher is better. Empty if it failed. Of one that was dropped early, what it was dropped by.
        score: Their mean; minus infinity if it failed.
        error: Why it failed.
        num_columns: Columns that it reads. 0 if its slices are not known.
        seconds: Its share of the time of those that were computed with it. No part of what makes trials equal.
        dropped: Whether it was left behind before the cross-validation: its score is no match for the others'.
    """

    configuration: Configuration
    scores: tuple[float, ...]
    score: float
    error: str = ""
    num_columns: int = 0
    seconds: float = field(default=0.0, compare=False)
    dropped: bool = False


def check_configuration(configuration: Configuration, source: Source, around: JobSpec = PLAIN) -> list[SliceSpec]:
    """Return the slices that a configuration reads, in the embedding's order.

    Raises:
        WireError: INVALID_ARGUMENT; NOT_FOUND for a slice that the embedding does not have.
    """
    if configuration.l2 < 0:
        raise invalid(f"a sweep needs L2 strengths of at least 0; got {configuration.l2:g}")
    spec = replace(configuration.spec(around), embedding="slices", slices=configuration.slices)
    check_spec(spec)
    return source.take(configuration.slices)


def winner(trials: Sequence[Trial]) -> Trial:
    """Return the simplest of the trials that are as good as the best one.

    As good is a mean within one standard error of the best one's: what lies closer is told apart by the draw of the
    folds. Simpler is, in this order: fewer columns, no hidden layers, fewer weights in them, a stronger penalty; of
    equals the better one.

    Source: the one-standard-error rule of Hastie, Tibshirani and Friedman 2009, "The Elements of Statistical Learning",
    2nd edition, section 7.10.1.

    Raises:
        WireError: INVALID_ARGUMENT if there is none that did not fail.
    """
    done = [one for one in trials if not one.error and not one.dropped]
    if not done:
        raise invalid("none of the trials succeeded, so there is no best one")
    best = max(done, key=lambda one: one.score)
    error = statistics.stdev(best.scores) / math.sqrt(len(best.scores)) if len(best.scores) > 1 else 0.0
    return min((one for one in done if one.score >= best.score - error), key=_complexity)


def _complexity(trial: Trial) -> tuple[float, ...]:
    hidden = trial.configuration.hidden
    weights = sum(before * behind for before, behind in pairwise((trial.num_columns, *hidden)))
    return trial.num_columns, bool(hidden), weights, -trial.configuration.l2, -trial.score
