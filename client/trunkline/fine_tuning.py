"""Training the last blocks of a backbone for one model alone."""

from __future__ import annotations

from dataclasses import dataclass

from trunkline_wire.errors import WireError
from trunkline_wire.fits import BATCH_NORM_FROZEN, FineTuneConfig

from trunkline.errors import InvalidArgumentError, from_wire


@dataclass(frozen=True)
class FineTune:
    """How the last blocks of the backbone are trained, behind a head that is fitted first.

    They belong to the model alone: everyone else goes on with the backbone as it is. They are kept only where they are
    better on held-out rows beyond what chance explains; ``Model.fine_tuning`` says so, and why. Every 0 leaves a number
    to the cluster.

    Attributes:
        cut: Name of the cut behind which blocks are trained; it must be a map, at or behind where the dataset's rows
            enter. Empty: the one before the last stage. One further ahead trains more, and takes longer.
        lora_rank: 0: all weights of these blocks. Otherwise only what is added to their linear layers and 1x1
            convolutions, of that rank: a model of a few KiB instead of MiB. Hu et al. 2021, "LoRA".
        epochs: Passes over the rows.
        batch_size: Rows per step, of all workers together.
        learning_rate: Of the last stage's blocks.
        layer_decay: By what it is multiplied from one stage to the one before it, above 0 and at most 1.
        weight_decay: AdamW's.
        batch_norm: ``frozen``: it keeps the statistics of the pretraining. ``adapt``: they become those of these rows.
        workers: How many work on it together; or the least and the most, where the run goes on with fewer if some are
            lost. Any number takes the same steps.
    """

    cut: str = ""
    lora_rank: int = 0
    epochs: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    layer_decay: float = 0.0
    weight_decay: float = 0.0
    batch_norm: str = BATCH_NORM_FROZEN
    workers: int | tuple[int, int] = 1


def fine_tune_config(given: bool | FineTune) -> FineTuneConfig | None:
    """Return what is asked for as it is sent; None where nothing is.

    Raises:
        InvalidArgumentError: Something is out of range.
    """
    if given is False or given is None:
        return None
    wanted = FineTune() if given is True else given
    if not isinstance(wanted, FineTune):
        raise InvalidArgumentError(
            f"fine_tune is {given!r}; expected True, or one such as trunkline.FineTune(lora_rank=8)"
        )
    workers = wanted.workers
    try:
        least, most = (workers, workers) if isinstance(workers, int) else workers
        return FineTuneConfig(
            cut=wanted.cut,
            lora_rank=wanted.lora_rank,
            epochs=wanted.epochs,
            batch_size=wanted.batch_size,
            learning_rate=wanted.learning_rate,
            layer_decay=wanted.layer_decay,
            weight_decay=wanted.weight_decay,
            batch_norm=wanted.batch_norm,
            min_workers=least,
            max_workers=most,
        )
    except WireError as error:
        raise from_wire(error) from None
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            f"{wanted} has a field of the wrong type: workers is a number or two, cut and batch_norm are texts"
        ) from None
