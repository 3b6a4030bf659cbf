"""What training minimises and how it goes about it: declared by whoever trains, checked on both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trunkline_wire.heads import (
    CLASSIFICATION,
    CONV,
    MAX_LORA_RANK,
    MULTI_LABEL,
    ORDINAL,
    PROTOTYPE,
    REGRESSION,
    HeadConfig,
    invalid,
)

AUTO = "auto"
MSE, HUBER, QUANTILE = "mse", "huber", "quantile"
CROSS_ENTROPY, FOCAL = "cross_entropy", "focal"
LOSSES = (AUTO, CROSS_ENTROPY, FOCAL, MSE, HUBER, QUANTILE)
"""What a head can minimise. ``auto``: the cross-entropy, or the squared error where numbers are predicted."""

_LOSSES_OF = {
    CLASSIFICATION: (CROSS_ENTROPY, FOCAL),
    MULTI_LABEL: (CROSS_ENTROPY, FOCAL),
    ORDINAL: (CROSS_ENTROPY,),
    REGRESSION: (MSE, HUBER, QUANTILE),
}
_WHAT = {
    CLASSIFICATION: "classes",
    MULTI_LABEL: "classes, any number a row",
    ORDINAL: "classes in order",
    REGRESSION: "numbers",
}

FLOAT32, BFLOAT16, FLOAT16 = PRECISIONS = ("float32", "bfloat16", "float16")
"""Numbers in which hidden layers are multiplied while they learn. The weights themselves stay float32."""

MAX_MIXUP = 100.0
"""Largest parameter of the shares: with it rows are mixed half and half nearly always."""

HIGHER_IS_BETTER = {
    CLASSIFICATION: ("accuracy", "balanced_accuracy", "f1_macro", "roc_auc", "average_precision"),
    MULTI_LABEL: ("subset_accuracy", "f1_micro", "f1_macro", "roc_auc", "average_precision"),
    ORDINAL: ("accuracy", "balanced_accuracy", "f1_macro", "kappa"),
    REGRESSION: ("r2",),
}
LOWER_IS_BETTER = {
    CLASSIFICATION: ("cross_entropy",),
    MULTI_LABEL: ("binary_cross_entropy",),
    ORDINAL: ("cross_entropy", "mae_steps"),
    REGRESSION: ("rmse", "mse", "mae", "pinball"),
}
"""The metrics of a task. Any of them may be the one to choose by."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    Attributes:
        kind: One of ``LOSSES``.
        huber_delta: Up to where Huber's loss is squared, in standard deviations of a target.
        quantile: Which quantile of a target is predicted, above 0 and below 1.
        focal_gamma: How little rows count that are right already: 0 is the cross-entropy.
        label_smoothing: Share of each row's label that is spread over all classes.
        class_weights: How much the rows of a class count, in the order of the dataset's classes; where a row may be of
            several, how much a row that is of the class does. Empty: all alike.
        balanced: Weigh classes so that each counts the same in all.
        class_order: The classes from the lowest to the highest, where they have an order. Empty: they have none.

    Raises:
        WireError: INVALID_ARGUMENT.
    """

    kind: str = AUTO
    huber_delta: float = 1.0
    quantile: float = 0.5
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    balanced: bool = False
    class_order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check each number."""
        if self.kind not in LOSSES:
            raise invalid(f"loss {str(self.kind)[:40]!r} is not known; one of {', '.join(LOSSES)} is needed")
        if not 0.0 < self.huber_delta < 1e6:
            raise invalid(f"the delta of Huber's loss is above 0, in standard deviations; got {self.huber_delta}")
        if not 0.0 < self.quantile < 1.0:
            raise invalid(f"a quantile is above 0 and below 1; got {self.quantile}")
        if not 0.0 <= self.focal_gamma <= 10.0:
            raise invalid(f"the gamma of the focal loss is 0 to 10; got {self.focal_gamma}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise invalid(f"label smoothing is at least 0 and below 1; got {self.label_smoothing}")
        self._check_weights()
        if len(set(self.class_order)) < len(self.class_order):
            raise invalid("a class stands twice in the order")
        if len(self.class_order) in (1, 2):
            raise invalid("two classes have no order that could matter; at least 3 are needed")
        if self.class_order and (self.kind == FOCAL or self.label_smoothing):
            raise invalid("classes in order have no focal loss and no label smoothing; leave them out")

    def _check_weights(self) -> None:
        if self.balanced and self.class_weights:
            raise invalid("classes are weighed by numbers or balanced, not both")
        if not all(math.isfinite(one) and one >= 0.0 for one in self.class_weights):
            bad = next(one for one in self.class_weights if not (math.isfinite(one) and one >= 0.0))
            raise invalid(f"class weights are numbers of at least 0; got {bad}")
        if self.class_weights and not any(self.class_weights):
            raise invalid("all class weights are 0: no row would count")

    @property
    def is_weighted(self) -> bool:
        """Whether classes count differently."""
        return self.balanced or bool(self.class_weights)

    def kind_for(self, task: str) -> str:
        """Return the loss of a task.

        Raises:
            WireError: INVALID_ARGUMENT where they do not go together.
        """
        known = _LOSSES_OF[task]
        if self.kind == AUTO:
            kind = known[0]
        elif self.kind in known:
            kind = self.kind
        else:
            raise invalid(f"loss {self.kind!r} is not one for {_WHAT[task]}; one of {', '.join(known)} is needed")
        if task == REGRESSION and (self.is_weighted or self.label_smoothing or self.class_order):
            raise invalid(
                "class weights, label smoothing and an order of classes are for classes; the targets are numbers"
            )
        if task == MULTI_LABEL and self.class_order:
            raise invalid("classes in order need rows of one class each; these may be of several")
        return kind


@dataclass(frozen=True)
class OptimiserConfig:
    """How heads with layers of their own learn: AdamW, in minibatches.

    Attributes:
        warmup: Share of the steps in which the learning rate rises; it falls along half a cosine then.
        clip_norm: Longest gradient; a longer one is shortened to it. 0: none is.
        ema: Decay of the moving average of the weights, which is what is kept. 0: the weights themselves are.
        precision: One of ``PRECISIONS``.
        patience: Epochs without a better one after which training ends. 0: it goes on to the last.
        mixup: Rows are mixed in pairs, columns and labels alike, by shares from Beta(mixup, mixup). 0: they are not.

    Raises:
        WireError: INVALID_ARGUMENT.
    """

    warmup: float = 0.05
    clip_norm: float = 1.0
    ema: float = 0.0
    precision: str = FLOAT32
    patience: int = 0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        """Check each number."""
        if not 0.0 <= self.warmup < 1.0:
            raise invalid(f"the warm-up is a share of the steps, at least 0 and below 1; got {self.warmup}")
        if not 0.0 <= self.clip_norm < 1e6:
            raise invalid(f"the longest gradient is above 0, or 0 for any; got {self.clip_norm}")
        if not 0.0 <= self.ema < 1.0:
            raise invalid(f"the decay of the moving average is at least 0 and below 1; got {self.ema}")
        if self.precision not in PRECISIONS:
            raise invalid(
                f"precision {str(self.precision)[:40]!r} is not known; one of {', '.join(PRECISIONS)} is needed"
            )
        if self.patience < 0:
            raise invalid(f"patience is a number of epochs, or 0 for any; got {self.patience}")
        if not 0.0 <= self.mixup <= MAX_MIXUP:
            raise invalid(f"mixup is the parameter of a Beta distribution, 0 to {MAX_MIXUP:g}; got {self.mixup}")


BATCH_NORM_FROZEN, BATCH_NORM_ADAPT = BATCH_NORMS = ("frozen", "adapt")
"""What batch normalisation does in blocks that are trained: keep the statistics it has, or go on averaging."""

MAX_TUNING_EPOCHS = 10_000
MAX_TUNING_BATCH = 65_536
MAX_TUNING_WORKERS = 1024


@dataclass(frozen=True)
class FineTuneConfig:
    """How the last blocks of a backbone are trained behind a fitted head. Every 0 leaves a number to the cluster.

    Attributes:
        cut: Name of the cut behind which blocks are trained. Empty: the one before the last stage.
        lora_rank: 0: all their weights. Otherwise the rank of what is added to those of linear layers and 1x1
            convolutions, alone.
        epochs: Passes over the rows.
        batch_size: Rows per step, of all workers together.
        learning_rate: Of the last stage's blocks.
        layer_decay: By what it is multiplied from one stage to the one before it.
        weight_decay: AdamW's.
        batch_norm: One of ``BATCH_NORMS``.
        min_workers: Least workers with which the run goes on.
        max_workers: Most of them.

    Raises:
        WireError: INVALID_ARGUMENT.
    """

    cut: str = ""
    lora_rank: int = 0
    epochs: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    layer_decay: float = 0.0
    weight_decay: float = 0.0
    batch_norm: str = BATCH_NORM_FROZEN
    min_workers: int = 1
    max_workers: int = 1

    def __post_init__(self) -> None:
        """Check each number."""
        if not 0 <= self.lora_rank <= MAX_LORA_RANK:
            raise invalid(f"the rank is 1 to {MAX_LORA_RANK}, or 0 for all weights; got {self.lora_rank}")
        if not 0 <= self.epochs <= MAX_TUNING_EPOCHS or not 0 <= self.batch_size <= MAX_TUNING_BATCH:
            raise invalid(
                f"fine-tuning has 1 to {MAX_TUNING_EPOCHS} epochs and batches of 1 to {MAX_TUNING_BATCH} rows, or "
                f"0; got {self.epochs} and {self.batch_size}"
            )
        if not 0.0 <= self.learning_rate <= 1.0:
            raise invalid(f"fine-tuning's learning rate is above 0 and at most 1, or 0; got {self.learning_rate}")
        if not 0.0 <= self.layer_decay <= 1.0:
            raise invalid(f"the decay from stage to stage is above 0 and at most 1, or 0; got {self.layer_decay}")
        if not 0.0 <= self.weight_decay < 10.0:
            raise invalid(f"fine-tuning's weight decay is at least 0 and below 10; got {self.weight_decay}")
        if self.batch_norm not in BATCH_NORMS:
            raise invalid(
                f"batch normalisation {str(self.batch_norm)[:40]!r} is not known; one of {', '.join(BATCH_NORMS)} is "
                "needed"
            )
        if not 1 <= self.min_workers <= self.max_workers <= MAX_TUNING_WORKERS:
            raise invalid(
                f"a run has 1 to {MAX_TUNING_WORKERS} workers, and no fewer at most than at least; got "
                f"{self.min_workers} to {self.max_workers}"
            )


MAX_CONFIGURATIONS = 1024
"""Most configurations of a sweep."""


@dataclass(frozen=True)
class SweepConfig:
    """Values to try, every one with every other. Where there is none, the job's own is used.

    Attributes:
        l2: As that of a job. None here, and a negative one there: a grid for linear heads.
        learning_rate: Of heads that learn in steps.
        hidden: Widths of the hidden layers, in place of those of the job's head; none makes an MLP a linear head.
        dropout: Of heads with layers of their own.
        embeddings: Sets of slices of the only input.
        folds: Of the cross-validation.

    Raises:
        WireError: INVALID_ARGUMENT.
    """

    l2: tuple[float, ...] = ()
    learning_rate: tuple[float, ...] = ()
    hidden: tuple[tuple[int, ...], ...] = ()
    dropout: tuple[float, ...] = ()
    embeddings: tuple[tuple[str, ...], ...] = ()
    folds: int = 5

    def __post_init__(self) -> None:
        """Check each axis; what a configuration must be for itself is checked when it is tried."""
        if not any(self._axes.values()):
            raise invalid("a sweep needs values to try: l2, learning_rate, hidden, dropout or embeddings")
        for name, axis in self._axes.items():
            if len(set(axis)) < len(axis):
                raise invalid(f"the sweep tries a value of {name} twice")
        if not 2 <= self.folds <= 50:
            raise invalid(f"a sweep has 2 to 50 folds; got {self.folds}")
        if self.num_configurations > MAX_CONFIGURATIONS:
            raise invalid(f"{self.num_configurations} configurations; a sweep has at most {MAX_CONFIGURATIONS}")

    @property
    def num_configurations(self) -> int:
        """How many there are at most: learning rates and dropout mean nothing to linear heads."""
        return math.prod(max(1, len(one)) for one in self._axes.values())

    @property
    def _axes(self) -> dict[str, Sequence[object]]:
        names = ("l2", "learning_rate", "hidden", "dropout", "embeddings")
        return {name: getattr(self, name) for name in names}


def check_sweep(sweep: SweepConfig, head: HeadConfig, loss: LossConfig) -> None:
    """Check that the values to try mean something to the head that they vary, and to the loss.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    if head.kind == PROTOTYPE and (any(sweep.hidden) or sweep.learning_rate or sweep.dropout):
        raise invalid(
            "a prototype head has no hidden layers, learning rate or dropout; a sweep of it tries l2 and embeddings"
        )
    if head.kind == CONV and sweep.embeddings:
        raise invalid("a convolutional head reads a map, not slices of the embedding; leave the embeddings to try out")
    if loss.class_order and any(sweep.hidden):
        raise invalid("classes in order are learnt by linear heads; leave hidden layers to try out")


def check_metric(name: str, task: str) -> None:
    """Check that a task has a metric to choose by; the empty name leaves it to us.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    known = (*HIGHER_IS_BETTER[task], *LOWER_IS_BETTER[task])
    if name and name not in known:
        raise invalid(f"{name[:40]!r} is not a metric of {_WHAT[task]}; one of {', '.join(known)} is needed")


def is_metric(name: str) -> bool:
    """Whether some task has a metric of that name."""
    return any(name in names for table in (HIGHER_IS_BETTER, LOWER_IS_BETTER) for names in table.values())


def goodness(name: str, task: str, value: float) -> float:
    """Return a metric so that higher is better."""
    return value if name in HIGHER_IS_BETTER[task] else -value
