"""Pairs of conversions between what a job is asked to minimise, to learn by and to try, and their messages."""

from __future__ import annotations

from trunkline_wire import fits
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import (
    BATCH_NORM_ADAPT,
    BATCH_NORM_FROZEN,
    FineTuneConfig,
    LossConfig,
    OptimiserConfig,
    SweepConfig,
)
from trunkline_wire.v1 import training_pb2

_LOSSES = {
    fits.AUTO: training_pb2.LOSS_UNSPECIFIED,
    fits.MSE: training_pb2.LOSS_MSE,
    fits.HUBER: training_pb2.LOSS_HUBER,
    fits.QUANTILE: training_pb2.LOSS_QUANTILE,
    fits.CROSS_ENTROPY: training_pb2.LOSS_CROSS_ENTROPY,
    fits.FOCAL: training_pb2.LOSS_FOCAL,
}
_PRECISIONS = {
    fits.FLOAT32: training_pb2.PRECISION_FLOAT32,
    fits.BFLOAT16: training_pb2.PRECISION_BFLOAT16,
    fits.FLOAT16: training_pb2.PRECISION_FLOAT16,
}
_LOSS_NAMES: dict[int, str] = {value: name for name, value in _LOSSES.items()}
_PRECISION_NAMES: dict[int, str] = {
    training_pb2.PRECISION_UNSPECIFIED: fits.FLOAT32,
    **{value: name for name, value in _PRECISIONS.items()},
}
_BATCH_NORMS = {BATCH_NORM_FROZEN: training_pb2.BATCH_NORM_FROZEN, BATCH_NORM_ADAPT: training_pb2.BATCH_NORM_ADAPT}
_BATCH_NORM_NAMES: dict[int, str] = {
    training_pb2.BATCH_NORM_UNSPECIFIED: BATCH_NORM_FROZEN,
    **{value: name for name, value in _BATCH_NORMS.items()},
}


def write_loss(loss: LossConfig, fit: training_pb2.FitConfig) -> None:
    """Write a loss into a message."""
    fit.loss = _LOSSES[loss.kind]
    fit.huber_delta = loss.huber_delta
    fit.quantile = loss.quantile
    fit.focal_gamma = loss.focal_gamma
    fit.label_smoothing = loss.label_smoothing
    fit.class_weights[:] = loss.class_weights
    fit.balanced = loss.balanced
    fit.class_order[:] = loss.class_order


def loss_from_proto(fit: training_pb2.FitConfig) -> LossConfig:
    """Return the loss of a message; what is unspecified takes the default.

    Raises:
        WireError: UNSUPPORTED for a value from a newer wire; INVALID_ARGUMENT for numbers out of range.
    """
    default = LossConfig()
    return LossConfig(
        kind=_name(_LOSS_NAMES, fit.loss, "loss"),
        huber_delta=fit.huber_delta or default.huber_delta,
        quantile=fit.quantile or default.quantile,
        focal_gamma=fit.focal_gamma if fit.HasField("focal_gamma") else default.focal_gamma,
        label_smoothing=fit.label_smoothing,
        class_weights=tuple(fit.class_weights),
        balanced=fit.balanced,
        class_order=tuple(fit.class_order),
    )


def write_optimiser(optimiser: OptimiserConfig, fit: training_pb2.FitConfig) -> None:
    """Write an optimiser into a message."""
    fit.warmup = optimiser.warmup
    fit.clip_norm = optimiser.clip_norm
    fit.ema = optimiser.ema
    fit.precision = _PRECISIONS[optimiser.precision]
    fit.patience = optimiser.patience
    fit.mixup = optimiser.mixup


def optimiser_from_proto(fit: training_pb2.FitConfig) -> OptimiserConfig:
    """Return the optimiser of a message; what is unspecified takes the default.

    Raises:
        WireError: UNSUPPORTED for a value from a newer wire; INVALID_ARGUMENT for numbers out of range.
    """
    default = OptimiserConfig()
    return OptimiserConfig(
        warmup=fit.warmup if fit.HasField("warmup") else default.warmup,
        clip_norm=fit.clip_norm if fit.HasField("clip_norm") else default.clip_norm,
        ema=fit.ema,
        precision=_name(_PRECISION_NAMES, fit.precision, "precision"),
        patience=fit.patience,
        mixup=fit.mixup,
    )


def sweep_to_proto(sweep: SweepConfig) -> training_pb2.SweepConfig:
    """Return the message of a sweep."""
    return training_pb2.SweepConfig(
        l2=sweep.l2,
        learning_rate=sweep.learning_rate,
        hidden=[training_pb2.Layers(widths=one) for one in sweep.hidden],
        dropout=sweep.dropout,
        embeddings=[training_pb2.SliceSet(slices=one) for one in sweep.embeddings],
        folds=sweep.folds,
    )


def sweep_from_proto(message: training_pb2.SweepConfig) -> SweepConfig:
    """Return the sweep of a message; what is unspecified takes the default.

    Raises:
        WireError: INVALID_ARGUMENT where there is nothing to try, or too much.
    """
    return SweepConfig(
        l2=tuple(message.l2),
        learning_rate=tuple(message.learning_rate),
        hidden=tuple(tuple(one.widths) for one in message.hidden),
        dropout=tuple(message.dropout),
        embeddings=tuple(tuple(one.slices) for one in message.embeddings),
        folds=message.folds or SweepConfig.folds,
    )


def _name(names: dict[int, str], value: int, what: str) -> str:
    name = names.get(value)
    if name is None:
        raise WireError(ErrorCode.UNSUPPORTED, f"{what} {value} is not known here")
    return name


def fine_tune_to_proto(config: FineTuneConfig | None) -> training_pb2.FineTuneConfig | None:
    """Return the message of a config."""
    if config is None:
        return None
    return training_pb2.FineTuneConfig(
        cut=config.cut,
        lora_rank=config.lora_rank,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        layer_decay=config.layer_decay,
        weight_decay=config.weight_decay,
        batch_norm=_BATCH_NORMS[config.batch_norm],
        min_workers=config.min_workers,
        max_workers=config.max_workers,
    )


def fine_tune_from_proto(message: training_pb2.FineTuneConfig) -> FineTuneConfig:
    """Return the config that a message asks for; what is unspecified takes the default.

    Raises:
        WireError: UNSUPPORTED for a value from a newer wire; INVALID_ARGUMENT for numbers out of range.
    """
    batch_norm = _BATCH_NORM_NAMES.get(message.batch_norm)
    if batch_norm is None:
        raise WireError(ErrorCode.UNSUPPORTED, f"batch normalisation {message.batch_norm} is not known here")
    least = message.min_workers or 1
    return FineTuneConfig(
        cut=message.cut,
        lora_rank=message.lora_rank,
        epochs=message.epochs,
        batch_size=message.batch_size,
        learning_rate=message.learning_rate,
        layer_decay=message.layer_decay,
        weight_decay=message.weight_decay,
        batch_norm=batch_norm,
        min_workers=least,
        max_workers=message.max_workers or least,
    )
