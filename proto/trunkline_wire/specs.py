"""Plain descriptions of backbones, cuts and feature spaces, shared by both sides. No protobuf here."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field

INPUT_CUT = "input"
"""The cut before the whole network: the rows are images."""

MAP_KIND = "map"
"""Slices of this kind, ``TAP.map``, are the features at a tap themselves, unpooled. No embedding holds them: they are
asked for alone, for any cut that is a map and is not before the one where rows enter."""

TOKENS_KIND = "tokens"
"""Slices of this kind, ``TAP.tokens``, are such features with the tokens that stand for no place, which a map lacks."""

POOLED = "pooled"
"""The slice of the last layer: what enters the network's own classifier."""

FLOAT32 = "float32"
INT8 = "int8"
PRECISIONS = (FLOAT32, INT8)
"""Precisions of stems."""


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
    local_model: str = ""
    bottleneck: str = ""

    @property
    def is_input(self) -> bool:
        """Whether the rows are images."""
        return self.cut == INPUT_CUT

    @property
    def is_local(self) -> bool:
        """Whether the rows are local features, which no backbone reads."""
        return bool(self.local_model) and not self.backbone

    @property
    def is_own(self) -> bool:
        """Whether the client's own model or a bottleneck made the rows: no others are comparable."""
        return bool(self.local_model or self.bottleneck)

    @property
    def source(self) -> str:
        """What tells a dataset's inputs apart: the backbone, or the local model."""
        return self.backbone or self.local_model


IMAGES = FeatureSpace("", INPUT_CUT, 0, "")
"""The space of images that no backbone has been chosen for yet."""


def local_space(name: str, fingerprint: str) -> FeatureSpace:
    """Return the space of local features.

    Args:
        name: Of the local model.
        fingerprint: Hex SHA-256 over the model and what goes into it, as ``local_fingerprint`` makes it.
    """
    return FeatureSpace("", "", 0, fingerprint, local_model=name)


@dataclass(frozen=True)
class CutSpec:
    """A point where exactly one tensor crosses.

    Attributes:
        name: By module path.
        feature_shape: Of one row, without the batch dimension.
        fingerprint: Of features that the exact stem makes.
        slices: Names of the embedding's slices that can still be computed behind it.
        channel_axis: Which axis of a row counts channels.
        is_stage: Whether a stage of the network ends here; such cuts are also taps.
        stem_macs: Multiply-adds per row of the stem.
        stem_parameters: Trained numbers of the stem.
        int8_fingerprint: Of features that the quantised stem makes. Empty at ``input``.
        map_shape: Channels, height and width of the features as a map; empty where their places form none, and at
            ``input``.
    """

    name: str
    feature_shape: tuple[int, ...]
    fingerprint: str
    slices: tuple[str, ...]
    channel_axis: int = 0
    is_stage: bool = False
    stem_macs: int = 0
    stem_parameters: int = 0
    int8_fingerprint: str = ""
    map_shape: tuple[int, ...] = ()

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of all of the features, channels first: the map's, where all is in it.

        Tokens that stand for no place, such as a class token, are in no map: with them it is channels, tokens and 1.
        Empty where the places form no map.
        """
        if self.map_shape and len(self.feature_shape) == 2:
            tokens, channels = self.feature_shape
            if tokens > math.prod(self.map_shape[1:]):
                return (channels, tokens, 1)
        return self.map_shape

    @property
    def whole_slice(self) -> str:
        """Name of the slice that is all of the features: the map, or the tokens."""
        return map_slice(self.name) if self.whole_shape == self.map_shape else tokens_slice(self.name)

    def precision_of(self, fingerprint: str) -> str | None:
        """Return which stem makes features of that fingerprint: ``float32``, ``int8``, or None for no stem of this."""
        if fingerprint == self.fingerprint:
            return FLOAT32
        return INT8 if fingerprint and fingerprint == self.int8_fingerprint else None

    def precision_in(self, space: FeatureSpace) -> str | None:
        """Return the precision of the stem that made features of a space at this cut, or None if they are not its own.

        A stem of the client's own counts as exact: what it makes is by definition what it should.
        """
        if space.bottleneck:
            expected = bottleneck_fingerprint(self.fingerprint, space.bottleneck)
            return FLOAT32 if space.fingerprint == expected and not space.local_model else None
        if space.local_model:
            return FLOAT32
        return self.precision_of(space.fingerprint)


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
    macs: int = 0
    class_names: tuple[str, ...] = ()
    rows_per_s: float = 0.0
    batch_rows: int = 0

    def cut(self, name: str) -> CutSpec | None:
        """Return the cut of that name, or None."""
        return next((cut for cut in self.cuts if cut.name == name), None)

    def slice_width(self, name: str) -> int | None:
        """Return the columns of a slice, maps included, or None if there is none of that name."""
        if map_tap(name) is not None:
            shape = self.map_shape(name)
            return math.prod(shape) if shape else None
        return next((one.width for one in self.slices if one.name == name), None)

    def map_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a slice that is the map at a tap, or its tokens; empty where there is none such."""
        cut = self.cut(map_tap(name) or "")
        if cut is None:
            return ()
        if name == map_slice(cut.name):
            return cut.map_shape
        return cut.whole_shape if name == cut.whole_slice else ()

    def space(self, cut: CutSpec, precision: str = "float32") -> FeatureSpace:
        """Return the feature space at a cut, of features that the stem of that precision makes."""
        fingerprint = cut.fingerprint if precision == FLOAT32 else cut.int8_fingerprint
        return FeatureSpace(self.name, cut.name, self.preprocessing.input_size, fingerprint)


@dataclass(frozen=True)
class RuntimeSpeed:
    """How fast a runtime is with batches of some rows."""

    batch_rows: int
    rows_per_s: float


@dataclass(frozen=True)
class RuntimeResult:
    """What was measured of one runtime. See ``RuntimeResult`` in catalog.proto."""

    runtime: str
    error: float = 0.0
    speeds: tuple[RuntimeSpeed, ...] = ()
    load_s: float = 0.0
    refused: str = ""

    @property
    def best(self) -> RuntimeSpeed:
        """The batch size at which it is fastest; zeros where nothing was measured."""
        return max(self.speeds, key=lambda one: one.rows_per_s, default=RuntimeSpeed(0, 0.0))


@dataclass(frozen=True)
class Tuning:
    """How the runtime behind a cut was chosen. See ``TuneBackboneResponse`` in catalog.proto."""

    backbone: str
    cut: str
    input_size: int
    device: str
    num_threads: int
    runtimes: tuple[RuntimeResult, ...]
    chosen: str
    batch_rows: int
    fixed: bool = False
    libraries: tuple[tuple[str, str], ...] = ()

    def runtime(self, name: str) -> RuntimeResult | None:
        """Return the runtime of that name, or None."""
        return next((one for one in self.runtimes if one.runtime == name), None)


@dataclass(frozen=True)
class Endpoint:
    """A replica that listens itself. See ``Endpoint`` in catalog.proto."""

    address: str
    replica: str


@dataclass(frozen=True)
class Endpoints:
    """The replicas of a backbone and how to get in. See ``GetEndpointsResponse`` in catalog.proto."""

    endpoints: tuple[Endpoint, ...] = ()
    ticket: bytes = b""
    key: bytes = field(default=b"", repr=False)
    valid_s: float = 0.0
    tls: bool = False
    tls_name: str = ""


@dataclass(frozen=True)
class CodecCost:
    """How rows at a cut may travel. See ``CodecCost`` in catalog.proto."""

    codec: str
    bytes_per_row: float
    embedding_error: float


@dataclass(frozen=True)
class StemCost:
    """A stem that the cluster offers, or says why not. See ``StemCost`` in catalog.proto."""

    precision: str
    size_bytes: int
    embedding_error: float
    refused: str = ""


@dataclass(frozen=True)
class CutCost:
    """What sending features at a cut costs. See ``CutCost`` in catalog.proto."""

    cut: CutSpec
    codecs: tuple[CodecCost, ...]
    stems: tuple[StemCost, ...]
    jpeg_bytes_per_row: float
    sample: str

    def codec(self, name: str) -> CodecCost | None:
        """Return the codec of that name, or None."""
        return next((one for one in self.codecs if one.codec == name), None)

    def stem(self, precision: str) -> StemCost | None:
        """Return the stem of that precision, or None."""
        return next((one for one in self.stems if one.precision == precision), None)


@dataclass(frozen=True)
class CodecUse:
    """How features were made and sent, and what that does to the embedding. See ``CodecUse`` in inference.proto."""

    codec: str = ""
    embedding_error: float = 0.0
    trained_codec: str = ""
    trained_error: float = 0.0


def codec_label(codec: str, precision: str) -> str:
    """Return how rows were made and sent, in one word: their codec, followed by ``@int8`` after a quantised stem.

    Args:
        codec: As ``quantise.codec_of`` names it.
        precision: Of the stem that made them.
    """
    return codec if precision == FLOAT32 else f"{codec}@{precision}"


@dataclass(frozen=True)
class Timings:
    """Where the time of one batch went, in seconds."""

    queue_s: float = 0.0
    decode_s: float = 0.0
    trunk_s: float = 0.0
    head_s: float = 0.0
    total_s: float = 0.0


def map_slice(tap: str) -> str:
    """Return the name of the slice that is the map at a tap."""
    return f"{tap}.{MAP_KIND}"


def tokens_slice(tap: str) -> str:
    """Return the name of the slice that is all tokens at a tap, those included that stand for no place."""
    return f"{tap}.{TOKENS_KIND}"


def map_tap(name: str) -> str | None:
    """Return the tap whose map, or tokens, a slice is, or None if it is a pooled one."""
    tap, dot, kind = name.rpartition(".")
    return tap if dot and kind in (MAP_KIND, TOKENS_KIND) else None


def local_fingerprint(model_sha256: str, inputs: str, width: int) -> str:
    """Return the hex SHA-256 that decides whether two rows of local features are comparable.

    Args:
        model_sha256: Of the local model: its file, or its weights and code.
        inputs: What goes into it, in words that say all that the numbers depend on.
        width: Numbers a row.
    """
    return hashlib.sha256(f"local-v1\0{model_sha256}\0{inputs}\0{width}".encode()).hexdigest()


def bottleneck_fingerprint(fingerprint: str, bottleneck: str) -> str:
    """Return the hex SHA-256 for codes of a bottleneck.

    Args:
        fingerprint: Of the features that its encoder reads.
        bottleneck: Hex SHA-256 of its file.
    """
    return hashlib.sha256(f"bottleneck-v1\0{fingerprint}\0{bottleneck}".encode()).hexdigest()


def feature_fingerprint(weights_sha256: str, cut: str, preprocessing: Preprocessing) -> str:
    """Return the hex SHA-256 that decides whether two features are comparable."""
    return _hash("features-v1", weights_sha256, cut, preprocessing)


def int8_fingerprint(fingerprint: str, calibration: str) -> str:
    """Return the hex SHA-256 for features that a quantised stem makes.

    Args:
        fingerprint: Of the exact stem's features.
        calibration: Digest of the pictures that the stem was calibrated on, and of how.
    """
    return hashlib.sha256(f"int8-v1\0{fingerprint}\0{calibration}".encode()).hexdigest()


def embedding_fingerprint(weights_sha256: str, preprocessing: Preprocessing) -> str:
    """Return the hex SHA-256 that decides whether two embeddings are comparable, whatever the cut."""
    return _hash("embedding-v1", weights_sha256, "", preprocessing)


def _hash(kind: str, weights_sha256: str, cut: str, preprocessing: Preprocessing) -> str:
    text = json.dumps([kind, weights_sha256, cut, asdict(preprocessing)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
