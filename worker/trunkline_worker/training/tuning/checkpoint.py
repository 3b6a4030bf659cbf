"""How far a fine-tuning run is, as bytes and back: safetensors with one JSON text. Never pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import safetensors
import safetensors.torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError

_METADATA_KEY = "trunkline_tuning"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Steps taken.
        tensors: The head's, the optimiser's, the average's.
        curves: By epoch, of the epochs that are over.
        open_epoch: What was summed up in the epoch that is not.
        num_resumed: How often it went on from a checkpoint so far.
    """

    step: int
    tensors: dict[str, Tensor]
    curves: dict[str, list[float]]
    open_epoch: float
    num_resumed: int = 0


class Checkpoints(Protocol):
    """Where a run keeps how far it is."""

    def latest(self) -> bytes | None:
        """Return what was saved last, or None at the beginning."""

    def save(self, make: Callable[[], bytes], step: int) -> None:
        """Save: every worker calls it, one of them makes the bytes.

        Raises:
            WireError: STORAGE_FULL.
        """


class NoCheckpoints:
    """Keeps nothing: a run that is lost starts anew."""

    def latest(self) -> bytes | None:
        """Return None."""
        return None

    def save(self, make: Callable[[], bytes], step: int) -> None:
        """Do nothing."""


def progress_to_bytes(progress: Progress) -> bytes:
    """Return the bytes of a checkpoint."""
    text = json.dumps(
        {
            "step": progress.step,
            "curves": progress.curves,
            "open_epoch": progress.open_epoch,
            "num_resumed": progress.num_resumed,
        }
    )
    tensors = {name: one.detach().to("cpu").contiguous() for name, one in progress.tensors.items()}
    return safetensors.torch.save(tensors, metadata={_METADATA_KEY: text})


def progress_from_bytes(data: bytes) -> Progress:
    """Read what ``progress_to_bytes`` wrote.

    Raises:
        WireError: CORRUPT_DATA.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        said = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_METADATA_KEY])
        tensors = safetensors.torch.load(data)
        return Progress(int(said["step"]), tensors, said["curves"], said["open_epoch"], int(said["num_resumed"]))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WireError(
            ErrorCode.CORRUPT_DATA, "a checkpoint of the fine-tuning run is damaged; submit the job again"
        ) from error
