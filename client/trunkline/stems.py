"""Stems: the part of a backbone that runs here, on ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from trunkline_wire import quantise
from trunkline_wire.specs import FLOAT32, FeatureSpace, Preprocessing

from trunkline._codecs import check_codec, packed
from trunkline.errors import (
    IncompatibleModelError,
    InvalidArgumentError,
    MissingExtraError,
    NotFiniteError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from trunkline._calls import Rows
    from trunkline.images import Picture

# Shape suffix legend: N, B = rows, H = height, W = width, C = channels

RUN_ROWS = 32
"""Rows that go through a stem at once."""


class Stem:
    """The part of a backbone before a cut, as a function from pictures to features.

    Attributes:
        space: Which network, cut where, fed with what, through which stem.
        preprocessing: How a picture becomes the numbers that enter.
        feature_shape: Shape of one row of features.
        channel_axis: Which axis of a row counts channels.
        precision: ``float32``, or ``int8`` for the quantised network.
        stem_error: Embedding error of its features: 0 for ``float32``, None if the cluster never told.
        codec: How its features travel: ``float16``, ``int8+zstd`` ...
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
        choice = check_codec(codec)
        check_threads(threads)
        require_onnxruntime()
        self.space = space
        self.preprocessing = preprocessing
        self.feature_shape = feature_shape
        self.channel_axis = channel_axis
        self.precision = precision
        self.stem_error = 0.0 if precision == FLOAT32 else stem_error
        self.codec = str(choice)
        self.codec_error = codec_error
        self.threads = threads
        self.size_bytes = len(data)
        self._choice = choice
        self._data = data
        self._session: Any = None

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
        self.load()
        entry = self._session.get_inputs()[0]
        (features,) = self._session.run(None, {entry.name: np.ascontiguousarray(pixels_BHWC)})
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

    def pack(self, features: npt.NDArray[np.floating[Any]]) -> Rows:
        """Return features in the stem's codec, as they travel (zstd left out).

        Shape:
            features: (N, ...), as the stem gives them. Returns an array for ``float16`` and ``float32``, else
            ``trunkline_wire.quantise.PackedRows``.

        Raises:
            NotFiniteError: One is NaN, infinite, or beyond what the codec can hold.
        """
        return packed(features, self.row_codec, self.channel_axis)

    def load(self) -> None:
        """Make the session of ONNX Runtime now rather than at the first use.

        Raises:
            UnsupportedError: The version that is installed cannot load the file.
        """
        if self._session is not None:
            return
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        # A thread that waits for work must not burn a core that is somebody else's.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        if self.threads is not None:
            # The calling thread counts: with 1 there is no other.
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(self._data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base
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


def check_threads(threads: int | None) -> None:
    """Check a number of threads.

    Raises:
        InvalidArgumentError: It is none.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InvalidArgumentError(f"threads is {threads!r}; expected a whole number, 1 or more")


def has_onnxruntime() -> bool:
    """Whether ONNX Runtime is installed, without loading it."""
    return importlib.util.find_spec("onnxruntime") is not None


def require_onnxruntime() -> None:
    """Check that ONNX Runtime is installed.

    Raises:
        MissingExtraError: It is not.
    """
    if not has_onnxruntime():
        raise MissingExtraError(
            "a stem needs ONNX Runtime, which is not installed", hint="Run: pip install 'trunkline[stem]'"
        )
