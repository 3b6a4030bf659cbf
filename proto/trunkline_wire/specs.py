"""Plain descriptions of backbones, cuts and feature spaces, shared by both sides. No protobuf here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

INPUT_CUT = "input"
"""The cut before the whole network: the rows are images."""


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the numbers that enter the network.

    Attributes:
        input_size: Side of the square after the crop, in pixels.
        crop_fraction: Fraction of the resized picture's shorter side that the crop keeps.
        interpolation: ``bicubic``, ``bilinear`` or ``nearest``.
        mean: Per channel (red, green, blue), on the scale 0 to 1. Applied inside the stem.
        std: Likewise.
    """

    input_size: int
    crop_fraction: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class FeatureSpace:
    """Decides whether two features are comparable. See ``FeatureSpace`` in tensor.proto."""

    backbone: str
    cut: str
    input_size: int
    fingerprint: str

    @property
    def is_input(self) -> bool:
        """Whether the rows are images."""
        return self.cut == INPUT_CUT


IMAGES = FeatureSpace("", INPUT_CUT, 0, "")
"""The space of images that no backbone has been chosen for yet."""


@dataclass(frozen=True)
class CutSpec:
    """A point where exactly one tensor crosses. ``feature_shape`` is one row's, without the batch dimension."""

    name: str
    feature_shape: tuple[int, ...]
    fingerprint: str
    slices: tuple[str, ...]


@dataclass(frozen=True)
class SliceSpec:
    """A named range of the embedding's columns."""

    name: str
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.stop - self.start


@dataclass(frozen=True)
class BackboneSpec:
    """What ``describe`` answers about a backbone at one input size. See ``Backbone`` in catalog.proto."""

    name: str
    pretrained: bool
    weights: str
    weights_sha256: str
    num_parameters: int
    preprocessing: Preprocessing
    resizable: bool
    cuts: tuple[CutSpec, ...]
    slices: tuple[SliceSpec, ...]
    embedding_fingerprint: str
    runtime: str = ""
    device: str = ""
    runtime_error: float = 0.0

    def cut(self, name: str) -> CutSpec | None:
        """Return the cut of that name, or None."""
        return next((cut for cut in self.cuts if cut.name == name), None)

    def space(self, cut: CutSpec) -> FeatureSpace:
        """Return the feature space at a cut."""
        return FeatureSpace(self.name, cut.name, self.preprocessing.input_size, cut.fingerprint)


@dataclass(frozen=True)
class Timings:
    """Where the time of one batch went, in seconds."""

    queue_s: float = 0.0
    decode_s: float = 0.0
    trunk_s: float = 0.0
    head_s: float = 0.0
    total_s: float = 0.0


def feature_fingerprint(weights_sha256: str, cut: str, preprocessing: Preprocessing) -> str:
    """Return the hex SHA-256 that decides whether two features are comparable."""
    return _hash("features-v1", weights_sha256, cut, preprocessing)


def embedding_fingerprint(weights_sha256: str, preprocessing: Preprocessing) -> str:
    """Return the hex SHA-256 that decides whether two embeddings are comparable, whatever the cut."""
    return _hash("embedding-v1", weights_sha256, "", preprocessing)


def _hash(kind: str, weights_sha256: str, cut: str, preprocessing: Preprocessing) -> str:
    text = json.dumps([kind, weights_sha256, cut, asdict(preprocessing)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
