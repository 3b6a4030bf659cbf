"""What training minimises, how heads with layers of their own learn, and what a sweep tries."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from trunkline_wire.errors import WireError
from trunkline_wire.fits import AUTO, FLOAT32, LOSSES, LossConfig, OptimiserConfig, SweepConfig

from trunkline.errors import InvalidArgumentError, from_wire


@dataclass(frozen=True)
class Loss:
    """What is minimised.

    Attributes:
        kind: For classes ``cross_entropy``, or ``focal``, in which rows that are right already count little. For
            numbers ``mse``; ``huber``, on which a few wild targets have little effect; or ``quantile``. ``auto``: the
            first of these.
        huber_delta: From where on ``huber`` is linear, in standard deviations of a target.
        quantile: Which quantile ``quantile`` predicts, above 0 and below 1.
        focal_gamma: How little rows count that are right already. 0: as in the cross-entropy.
    """

    kind: str = AUTO
    huber_delta: float = 1.0
    quantile: float = 0.5
    focal_gamma: float = 2.0


@dataclass(frozen=True)
class Optimiser:
    """How heads with layers of their own learn: AdamW, in minibatches.

    Attributes:
        warmup: Share of the steps in which the learning rate rises; it falls along half a cosine then.
        clip_norm: Longest gradient; a longer one is shortened to it. 0: none is.
        ema: Decay of the moving average of the weights, which is what is kept. 0: the weights themselves are.
        precision: ``float32``, ``bfloat16`` or ``float16``, in which layers are multiplied.
        patience: Epochs without a better one after which training ends. 0: it goes on to the last. The best is kept
            either way.
        mixup: Rows are mixed in pairs, columns and labels alike, by shares from Beta(mixup, mixup): 0.2 mixes most of
            them a little, 1 evenly. 0: they are not.
    """

    warmup: float = 0.05
    clip_norm: float = 1.0
    ema: float = 0.0
    precision: str = FLOAT32
    patience: int = 0
    mixup: float = 0.0


ClassWeights = str | Mapping[str, float]
"""``balanced``, or how much the rows of each class count; 1 for those that are not named."""


def loss_config(
    loss: str | Loss,
    *,
    label_smoothing: float = 0.0,
    class_weights: ClassWeights | None = None,
    ordinal: bool | Sequence[str] = False,
    class_names: Sequence[str] | None = None,
) -> LossConfig:
    """Return a loss as it is sent. Arguments are those of ``Client.train``, and the classes of the dataset.

    Raises:
        InvalidArgumentError: Something is out of range, or names a class that is not there.
    """
    given = Loss(loss) if isinstance(loss, str) else loss
    if not isinstance(given, Loss):
        raise InvalidArgumentError(
            f"loss is {loss!r}; expected one of {', '.join(LOSSES)}, or one such as trunkline.Loss('huber')"
        )
    try:
        return LossConfig(
            **asdict(given),
            label_smoothing=label_smoothing,
            class_weights=_weights(class_weights, class_names),
            balanced=class_weights == "balanced",
            class_order=_order(ordinal, class_names),
        )
    except WireError as error:
        raise from_wire(error) from None
    except TypeError:
        raise InvalidArgumentError(f"{given} has a field of the wrong type: all but the kind are numbers") from None


def optimiser_config(optimiser: Optimiser | None) -> OptimiserConfig:
    """Return an optimiser as it is sent.

    Raises:
        InvalidArgumentError: Something is out of range.
    """
    given = optimiser or Optimiser()
    if not isinstance(given, Optimiser):
        raise InvalidArgumentError(f"optimiser is {optimiser!r}; expected one such as trunkline.Optimiser(ema=0.99)")
    try:
        return OptimiserConfig(**asdict(given))
    except WireError as error:
        raise from_wire(error) from None
    except TypeError:
        raise InvalidArgumentError(
            f"{given} has a field of the wrong type: all but the precision are numbers"
        ) from None


def sweep_config(
    l2: Sequence[float],
    hidden: Sequence[Sequence[int]],
    learning_rate: Sequence[float],
    dropout: Sequence[float],
    embeddings: Sequence[Sequence[str]],
    folds: int,
) -> SweepConfig:
    """Return what a sweep tries as it is sent. Arguments are those of ``Client.sweep``.

    Raises:
        InvalidArgumentError: Something is out of range, or there is nothing to try.
    """
    try:
        return SweepConfig(
            l2=tuple(map(float, l2)),
            learning_rate=tuple(map(float, learning_rate)),
            hidden=tuple(tuple(map(operator.index, one)) for one in hidden),
            dropout=tuple(map(float, dropout)),
            embeddings=tuple((one,) if isinstance(one, str) else tuple(one) for one in embeddings),
            folds=operator.index(folds),
        )
    except WireError as error:
        raise from_wire(error) from None
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            "a sweep takes lists of numbers, and lists of widths such as hidden=[(), (64,), (256, 64)]"
        ) from None


def needs_classes(class_weights: ClassWeights | None, ordinal: bool | Sequence[str]) -> bool:
    """Whether ``loss_config`` must know the dataset's classes."""
    return isinstance(class_weights, Mapping) or ordinal is True


def _weights(class_weights: ClassWeights | None, class_names: Sequence[str] | None) -> tuple[float, ...]:
    if class_weights is None or class_weights == "balanced":
        return ()
    if not isinstance(class_weights, Mapping):
        raise InvalidArgumentError(
            f"class_weights is {class_weights!r}; expected 'balanced' or a number for each class, such as {{'cat': 2}}"
        )
    names = list(class_names or ())
    unknown = next((one for one in class_weights if one not in names), None)
    if unknown is not None:
        raise InvalidArgumentError(
            f"class_weights names {str(unknown)[:80]!r}, which is none of the dataset's classes: "
            f"{', '.join(names)[:200] or 'it has none'}"
        )
    return tuple(float(class_weights.get(name, 1.0)) for name in names)


def _order(ordinal: bool | Sequence[str], class_names: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(ordinal, str):
        raise InvalidArgumentError(
            f"ordinal is {ordinal!r}; expected True, or the classes from the lowest to the highest"
        )
    if isinstance(ordinal, bool):
        return tuple(class_names or ()) if ordinal else ()
    return tuple(ordinal)
