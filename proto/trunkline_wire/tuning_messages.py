"""What fine-tuning is asked for, to its message and back. Both sides use it."""

from __future__ import annotations

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import BATCH_NORM_ADAPT, BATCH_NORM_FROZEN, FineTuneConfig
from trunkline_wire.v1 import training_pb2 as pb

_BATCH_NORMS = {BATCH_NORM_FROZEN: pb.BATCH_NORM_FROZEN, BATCH_NORM_ADAPT: pb.BATCH_NORM_ADAPT}
_BATCH_NORM_NAMES: dict[int, str] = {
    pb.BATCH_NORM_UNSPECIFIED: BATCH_NORM_FROZEN,
    **{value: name for name, value in _BATCH_NORMS.items()},
}


def fine_tune_to_proto(config: FineTuneConfig | None) -> pb.FineTuneConfig | None:
    """Return the message of a config."""
    if config is None:
        return None
    return pb.FineTuneConfig(
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


def fine_tune_from_proto(message: pb.FineTuneConfig) -> FineTuneConfig:
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
