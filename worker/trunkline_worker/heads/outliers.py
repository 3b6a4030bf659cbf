"""How unlike a model's training rows a row is: the numbers that say so, and the file they are kept in.

``training.trust.outliers`` fits them. A detector runs where heads run, on the same columns, so it has a head's face.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError

# Shape suffix legend: B = rows, D = columns of all inputs side by side, P = directions, C = centres, Q = quantiles

FORMAT_VERSION = 1
"""Raised when an older worker could not read, or would misread, what this one writes."""

_FARTHEST = 1e6
"""Standard deviations beyond which no more are told apart: squares of them, summed up, are still numbers."""

_METADATA_KEY = "trunkline_outliers"
_MAX_HEADER_BYTES = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class Detector:
    """The training rows of a model, as centres with one covariance, and how far from them rows held out were.

    Attributes:
        slices: Names of the first input's slices, in the order of their columns.
        more_width: Columns of the inputs behind the first.
        mean_D: Subtracted from raw columns.
        scale_D: What they are then divided by.
        directions_PD: Orthonormal: those in which the training rows vary most.
        whitening_PP: Makes the covariance of rows of one class, in these directions, the identity.
        centres_CP: Mean of each class, or of all rows, in whitened directions.
        residual: Root mean square length, over the training rows, of what is outside of the directions. 0: nothing is.
        distances_Q: Quantiles of the distances of rows that took no part in the above, ascending.
        shares_R: Share of these rows that is nearer than a distance between two quantiles; R is Q + 1.
        num_rows: Rows that the quantiles stand for.
        is_held_out: Whether these were held out from the whole training; else they are cross-validated training rows.
    """

    slices: tuple[str, ...]
    more_width: int
    mean_D: Tensor
    scale_D: Tensor
    directions_PD: Tensor
    whitening_PP: Tensor
    centres_CP: Tensor
    residual: float
    distances_Q: Tensor
    shares_R: Tensor
    num_rows: int
    is_held_out: bool

    @property
    def num_features(self) -> int:
        """Columns that go in."""
        return len(self.mean_D)

    @property
    def num_outputs(self) -> int:
        """A distance and a share."""
        return 2

    @property
    def size_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(one.numel() * one.element_size() for one in self._tensors().values())

    def predict(self, x_BD: Tensor) -> Tensor:
        """Return the distance of each row, and the share of rows held out that were nearer.

        Args:
            x_BD: The columns of all inputs, side by side, raw. Any floating-point type, any device.

        Shape:
            x_BD: (B, D); returns (B, 2), float32, on the CPU.

        Raises:
            WireError: SHAPE_MISMATCH.
        """
        distance_B = self.distance(x_BD)
        share_B = self.shares_R[torch.bucketize(distance_B, self.distances_Q)]
        return torch.stack([distance_B, share_B], dim=1)

    @torch.inference_mode()
    def distance(self, x_BD: Tensor) -> Tensor:
        """Return how far each row is from the nearest centre, (B,), float32: finite, but for NaN.

        Its square is the mean of two parts, each 1 on average over the training rows: the square of the Mahalanobis
        distance within the directions, by their number, and that of the length outside of them, by ``residual``.

        Args:
            x_BD: As for ``predict``.

        Raises:
            WireError: SHAPE_MISMATCH.
        """
        if x_BD.ndim != 2 or x_BD.shape[1] != self.num_features:
            raise WireError(
                ErrorCode.SHAPE_MISMATCH,
                f"the outlier scores of this model take (rows, {self.num_features}); got {tuple(x_BD.shape)}",
            )
        z_BD = ((x_BD.to(self.mean_D) - self.mean_D) / self.scale_D).clamp(-_FARTHEST, _FARTHEST)
        p_BP = z_BD @ self.directions_PD.t()
        squares: list[Tensor] = []
        if len(self.directions_PD):
            nearest_B = torch.cdist(p_BP @ self.whitening_PP.t(), self.centres_CP).amin(dim=1)
            squares.append(nearest_B.square() / len(self.directions_PD))
        if self.residual:
            # By Pythagoras: what is not within the directions.
            outside_B = (z_BD.square().sum(dim=1) - p_BP.square().sum(dim=1)).clamp(min=0.0).sqrt()
            squares.append((outside_B / self.residual).square())
        return torch.stack(squares).mean(dim=0).sqrt()

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "mean": self.mean_D,
            "scale": self.scale_D,
            "directions": self.directions_PD,
            "whitening": self.whitening_PP,
            "centres": self.centres_CP,
            "distances": self.distances_Q,
            "shares": self.shares_R,
        }


def outliers_path(sha256: str) -> str:
    """Return where the detector of that hex SHA-256 lies in storage.

    Raises:
        WireError: INVALID_ARGUMENT if it is no hex SHA-256.
    """
    if not _SHA256.fullmatch(sha256):
        raise WireError(ErrorCode.INVALID_ARGUMENT, f"{sha256[:80]!r} is not a SHA-256 in lower-case hex")
    return f"outliers/{sha256[:2]}/{sha256}.safetensors"


def detector_to_bytes(detector: Detector) -> bytes:
    """Return the detector's bytes. Equal ones give equal bytes, in any process."""
    metadata = {
        "format": FORMAT_VERSION,
        "slices": list(detector.slices),
        "more_width": detector.more_width,
        "residual": detector.residual,
        "num_rows": detector.num_rows,
        "is_held_out": detector.is_held_out,
    }
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
    tensors = {name: one.to("cpu", torch.float32).contiguous() for name, one in detector._tensors().items()}
    return safetensors.torch.save(tensors, metadata={_METADATA_KEY: text})


def detector_from_bytes(data: bytes) -> Detector:
    """Return the detector that ``detector_to_bytes`` wrote.

    The caller has checked the bytes against their SHA-256; here everything inside is checked too.

    Raises:
        WireError: UNSUPPORTED for another format version, CORRUPT_DATA for anything else that is wrong.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        if not 2 <= size <= min(_MAX_HEADER_BYTES, len(data) - 8):
            raise _corrupt("its header has a wrong length")
        metadata = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_METADATA_KEY])
        version = _whole(metadata["format"])
        if version != FORMAT_VERSION:
            raise WireError(
                ErrorCode.UNSUPPORTED,
                f"outlier scores of format {version}; this worker reads {FORMAT_VERSION}. Upgrade the worker",
            )
        tensors = safetensors.torch.load(data)
        detector = Detector(
            slices=tuple(str(one) for one in metadata["slices"]),
            more_width=_whole(metadata["more_width"]),
            mean_D=tensors["mean"],
            scale_D=tensors["scale"],
            directions_PD=tensors["directions"],
            whitening_PP=tensors["whitening"],
            centres_CP=tensors["centres"],
            residual=float(metadata["residual"]),
            distances_Q=tensors["distances"],
            shares_R=tensors["shares"],
            num_rows=_whole(metadata["num_rows"]),
            is_held_out=bool(metadata["is_held_out"]),
        )
        _check(detector)
    except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise _corrupt("it cannot be read") from error
    return detector


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a whole number was expected")
    return value


def _check(detector: Detector) -> None:
    for name, one in detector._tensors().items():
        if one.dtype != torch.float32 or not bool(torch.isfinite(one).all()):
            raise _corrupt(f"tensor {name} is not of finite numbers in float32")
    columns, directions = detector.mean_D.numel(), len(detector.directions_PD)
    fits = (
        detector.mean_D.shape == detector.scale_D.shape == (columns,)
        and detector.directions_PD.shape == (directions, columns)
        and detector.whitening_PP.shape == (directions, directions)
        and detector.centres_CP.shape == (len(detector.centres_CP), directions)
        and len(detector.centres_CP) > 0
        and detector.distances_Q.shape == (len(detector.distances_Q),)
        and detector.shares_R.shape == (len(detector.distances_Q) + 1,)
        and columns > detector.more_width
        and bool(detector.slices)
    )
    if not fits:
        raise _corrupt("its tensors do not fit each other")
    if not bool((detector.scale_D > 0).all()) or not 0 <= detector.residual < float("inf"):
        raise _corrupt("a scale is not above 0")
    if not directions and not detector.residual:
        raise _corrupt("it measures nothing")
    if not bool((detector.distances_Q.diff() >= 0).all()) or not bool((detector.shares_R.diff() >= 0).all()):
        raise _corrupt("its quantiles are out of order")


def _corrupt(what: str) -> WireError:
    return WireError(
        ErrorCode.CORRUPT_DATA, f"the outlier scores of this model are damaged: {what}. Train the model again"
    )
