"""Stems: what makes the features at a cut here. The part of a backbone before it, on ONNX Runtime, is the usual one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from trunkline_wire import quantise
from trunkline_wire.specs import FLOAT32, FeatureSpace, Preprocessing

from trunkline._codecs import check_codec, packed
from trunkline._onnx import check_threads, open_session, require_onnxruntime
from trunkline.errors import IncompatibleModelError, InvalidArgumentError, NotFiniteError, UnsupportedError

if TYPE_CHECKING:
    from trunkline._calls import Rows
    from trunkline.images import Picture

# Shape suffix legend: N, B = rows, H = height, W = width, C = channels

RUN_ROWS = 32
"""Rows that go through a stem at once."""


class AnyStem(ABC):
    """A function from pictures to features at a cut, and how these travel.

    Attributes:
        space: Which network, cut where, fed with what, through which stem.
        preprocessing: How a picture becomes the pixels that enter.
        feature_shape: Shape of one row of features.
        channel_axis: Which axis of a row counts channels.
        codec: How its features travel: ``float16``, ``int8+zstd`` ...
    """

    def __init__(
        self,
        space: FeatureSpace,
        preprocessing: Preprocessing,
        feature_shape: tuple[int, ...],
        *,
        channel_axis: int,
        codec: str,
    ) -> None:
        """Keep what all stems have.

        Raises:
            UnsupportedError: There is no such codec.
        """
        self._choice = check_codec(codec)
        self.space = space
        self.preprocessing = preprocessing
        self.feature_shape = feature_shape
        self.channel_axis = channel_axis
        self.codec = str(self._choice)

    @property
    def row_codec(self) -> str:
        """The codec as row ids name it: without zstd, which loses nothing."""
        return self._choice.codec

    @property
    def compress(self) -> bool:
        """Whether zstd is applied on the way."""
        return self._choice.zstd

    @property
    def row_bytes(self) -> int:
        """Size of one row in its codec, in bytes, before zstd."""
        return quantise.row_bytes(self.feature_shape, self.row_codec, self.channel_axis)

    def __call__(self, images: Any) -> npt.NDArray[np.floating[Any]]:
        """Return the features of pictures. ``pack`` brings them into the codec.

        Args:
            images: As in ``trunkline.Client.upload``.

        Shape:
            returns (N, ...): ``feature_shape`` for each row; float16 if that is the codec, else float32.

        Raises:
            CorruptImageError: One cannot be decoded.
            NotFiniteError: A feature is NaN or infinite, or beyond float16 if that is the codec.
        """
        from trunkline.images import pictures

        rows = pictures(images)
        parts = [self.run(rows[start : start + RUN_ROWS]) for start in range(0, len(rows), RUN_ROWS)]
        return np.concatenate(parts)

    def run(self, rows: Sequence[Picture]) -> npt.NDArray[np.floating[Any]]:
        """Return the features of a batch of rows, in one pass."""
        return self.run_pixels(np.stack([row.preprocessed(self.preprocessing) for row in rows]))

    def run_pixels(self, pixels_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.floating[Any]]:
        """Return the features of pictures that are already resized and cropped."""
        features = self._compute(pixels_BHWC)
        if features.shape[1:] != self.feature_shape:
            raise IncompatibleModelError(f"the stem gave {features.shape[1:]}; {self.feature_shape} was announced")
        dtype = np.float16 if self.row_codec == quantise.FLOAT16 else np.float32
        with np.errstate(over="ignore"):
            result: npt.NDArray[np.floating[Any]] = features.astype(dtype, copy=False)
        if not np.isfinite(result).all():
            raise NotFiniteError(
                f"features hold NaN, or values beyond {np.dtype(dtype).name}",
                hint="Make the stem with codec='float32'",
            )
        return result

    @abstractmethod
    def _compute(self, pixels_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return what the network makes of pictures."""

    def pack(self, features: npt.NDArray[np.floating[Any]]) -> Rows:
        """Return features in the stem's codec, as they travel (zstd left out).

        Shape:
            features: (N, ...), as the stem gives them. Returns an array for ``float16`` and ``float32``, else
            ``trunkline_wire.quantise.PackedRows``.

        Raises:
            NotFiniteError: One is NaN, infinite, or beyond what the codec can hold.
        """
        return packed(features, self.row_codec, self.channel_axis)


class Stem(AnyStem):
    """The part of a backbone before a cut, as a function from pictures to features.

    Attributes:
        precision: ``float32``, or ``int8`` for the quantised network.
        stem_error: Embedding error of its features: 0 for ``float32``, None if the cluster never told.
        codec_error: Embedding error of the codec alone. None where nobody asked: it was named, not chosen.
        threads: Threads of ONNX Runtime; None leaves it the choice.
        size_bytes: Of the file.
    """

    def __init__(
        self,
        data: bytes,
        space: FeatureSpace,
        preprocessing: Preprocessing,
        feature_shape: tuple[int, ...],
        *,
        channel_axis: int = 0,
        precision: str = FLOAT32,
        stem_error: float | None = None,
        codec: str = quantise.FLOAT16,
        codec_error: float | None = None,
        threads: int | None = None,
    ) -> None:
        """Keep the checked file. The session is made at the first use.

        Raises:
            MissingExtraError: ONNX Runtime is not installed.
            InvalidArgumentError: ``threads`` is out of range.
            UnsupportedError: There is no such codec.
        """
        super().__init__(space, preprocessing, feature_shape, channel_axis=channel_axis, codec=codec)
        check_threads(threads)
        require_onnxruntime()
        self.precision = precision
        self.stem_error = 0.0 if precision == FLOAT32 else stem_error
        self.codec_error = codec_error
        self.threads = threads
        self.size_bytes = len(data)
        self._data = data
        self._session: Any = None

    def _compute(self, pixels_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self.load()
        entry = self._session.get_inputs()[0]
        (features,) = self._session.run(None, {entry.name: np.ascontiguousarray(pixels_BHWC)})
        made: npt.NDArray[np.float32] = features
        return made

    def load(self) -> None:
        """Make the session of ONNX Runtime now rather than at the first use.

        Raises:
            UnsupportedError: The version that is installed cannot load the file.
        """
        if self._session is not None:
            return
        try:
            self._session = open_session(self._data, self.threads)
        except Exception as error:  # ONNX Runtime's exceptions share no base
            import onnxruntime

            raise UnsupportedError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load the stem of {self.space.backbone} at "
                f"{self.space.cut}: {error}",
                hint="Update it: pip install -U onnxruntime",
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave the session behind: the other process makes its own."""
        return {**self.__dict__, "_session": None}

    def __repr__(self) -> str:
        """Return backbone, cut, shape, and how features are made and sent."""
        space = self.space
        return (
            f"Stem({space.backbone!r}, cut={space.cut!r}, input_size={space.input_size}, shape={self.feature_shape}, "
            f"precision={self.precision!r}, codec={self.codec!r})"
        )


def stem_list(given: AnyStem | Sequence[AnyStem] | None) -> list[AnyStem]:
    """Return the stems that a caller gave: none, one or several.

    Raises:
        InvalidArgumentError: Something else is among them.
    """
    if given is None:
        return []
    chosen: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    for one in chosen:
        if not isinstance(one, AnyStem):
            raise InvalidArgumentError(
                f"stem is a {type(one).__name__}; expected a stem",
                hint="Use client.stem(...), client.own_stem(local, ...) for a model of your own, or local= beside it",
            )
    return chosen
