"""Stems: the part of a backbone that runs here. Fetched once, kept by fingerprint, run by ONNX Runtime."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from trunkline_wire.limits import MAX_STEM_BYTES
from trunkline_wire.specs import INPUT_CUT, BackboneSpec, CutSpec, FeatureSpace, Preprocessing

from trunkline.errors import (
    CorruptDataError,
    IncompatibleModelError,
    InvalidArgumentError,
    MissingExtraError,
    NotFiniteError,
    NotFoundError,
)

if TYPE_CHECKING:
    from trunkline._calls import FetchedStem
    from trunkline.images import Picture

# Shape suffix legend: N, B = rows, H = height, W = width, C = channels

STEM_DTYPES = ("float16", "float32")
"""Types in which features travel."""

RUN_ROWS = 32
"""Rows that go through a stem at once."""


class Stem:
    """The part of a backbone before a cut, as a function from pictures to features.

    Attributes:
        space: Which network, cut where, fed with what.
        preprocessing: How a picture becomes the numbers that enter.
        feature_shape: Shape of one row of features.
        dtype: Type of the features: ``float16`` (half the bytes) or ``float32``.
        threads: Threads of ONNX Runtime; None leaves it the choice.
    """

    def __init__(
        self,
        data: bytes,
        space: FeatureSpace,
        preprocessing: Preprocessing,
        feature_shape: tuple[int, ...],
        *,
        dtype: str = "float16",
        threads: int | None = None,
    ) -> None:
        """Keep the checked file. The session is made at the first use.

        Raises:
            MissingExtraError: ONNX Runtime is not installed.
            InvalidArgumentError: ``dtype`` or ``threads`` is out of range.
        """
        if dtype not in STEM_DTYPES:
            raise InvalidArgumentError(f"dtype is {dtype!r}; expected one of {', '.join(STEM_DTYPES)}")
        if threads is not None and threads < 1:
            raise InvalidArgumentError(f"threads is {threads}; expected 1 or more")
        require_onnxruntime()
        self.space = space
        self.preprocessing = preprocessing
        self.feature_shape = feature_shape
        self.dtype = dtype
        self.threads = threads
        self._data = data
        self._session: Any = None

    def __call__(self, images: Any) -> npt.NDArray[np.floating[Any]]:
        """Return the features of pictures.

        Args:
            images: As in ``trunkline.Client.upload``.

        Shape:
            returns (N, ...): ``feature_shape`` for each row, of type ``dtype``.

        Raises:
            CorruptImageError: One cannot be decoded.
            NotFiniteError: A feature is beyond what ``dtype`` can hold.
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
        session = self._open()
        entry = session.get_inputs()[0]
        (features,) = session.run(None, {entry.name: np.ascontiguousarray(pixels_BHWC)})
        if features.shape[1:] != self.feature_shape:
            raise IncompatibleModelError(f"the stem gave {features.shape[1:]}; {self.feature_shape} was announced")
        with np.errstate(over="ignore"):
            result: npt.NDArray[np.floating[Any]] = features.astype(self.dtype)
        if not np.isfinite(result).all():
            raise NotFiniteError(
                f"features hold NaN, or values beyond {self.dtype}", hint="Make the stem with dtype='float32'"
            )
        return result

    def _open(self) -> Any:
        if self._session is None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            if self.threads is not None:
                options.intra_op_num_threads = self.threads
                options.inter_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(self._data, options, providers=["CPUExecutionProvider"])
        return self._session

    def __getstate__(self) -> dict[str, Any]:
        """Leave the session behind: the other process makes its own."""
        return {**self.__dict__, "_session": None}

    def __repr__(self) -> str:
        """Return backbone, cut and shape."""
        space = self.space
        return f"Stem({space.backbone!r}, cut={space.cut!r}, input_size={space.input_size}, shape={self.feature_shape})"


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


def find_cut(spec: BackboneSpec, cut: str) -> CutSpec:
    """Return a cut at which a stem can end.

    Raises:
        NotFoundError: The backbone has no such cut.
        InvalidArgumentError: It is ``input``, before which there is nothing.
    """
    found = spec.cut(cut)
    names = ", ".join(one.name for one in spec.cuts if one.name != INPUT_CUT)
    if found is None:
        raise NotFoundError(f"{spec.name} has no cut {cut!r}", hint=f"It has {names}")
    if cut == INPUT_CUT:
        raise InvalidArgumentError(
            "there is no stem before the input: images go there as they are",
            hint=f"Leave stem= out, or choose a cut: {names}",
        )
    return found


class StemCache:
    """Stem files on disk, by fingerprint. A file that is damaged counts as missing."""

    def __init__(self, directory: Path) -> None:
        """Keep the directory; it is made when it is needed."""
        self._directory = directory / "stems"

    def load(self, fingerprint: str) -> tuple[bytes, dict[str, Any]] | None:
        """Return a file's checked bytes and what is known about it, or None."""
        try:
            facts = json.loads(self._facts_path(fingerprint).read_text(encoding="utf-8"))
            path = self._data_path(fingerprint)
            if path.stat().st_size > MAX_STEM_BYTES:
                return None
            data = path.read_bytes()
        except (OSError, ValueError):
            return None
        if not isinstance(facts, dict) or hashlib.sha256(data).hexdigest() != facts.get("sha256"):
            return None
        return data, facts

    def store(self, fetched: FetchedStem) -> None:
        """Keep a file: first the bytes, then what makes them valid, each whole or not at all.

        A directory that cannot be written costs a transfer each time, not the work.
        """
        facts = {
            "sha256": fetched.sha256,
            "space": asdict(fetched.space),
            "preprocessing": asdict(fetched.preprocessing),
            "feature_shape": list(fetched.feature_shape),
        }
        with suppress(OSError):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_whole(self._data_path(fetched.space.fingerprint), fetched.data)
            _write_whole(self._facts_path(fetched.space.fingerprint), json.dumps(facts).encode())

    def _data_path(self, fingerprint: str) -> Path:
        return self._directory / f"{_hex(fingerprint)}.onnx"

    def _facts_path(self, fingerprint: str) -> Path:
        return self._directory / f"{_hex(fingerprint)}.json"


def open_stem(
    spec: BackboneSpec,
    cut_name: str,
    cache: StemCache,
    fetch: Callable[[], FetchedStem],
    *,
    dtype: str,
    threads: int | None,
) -> Stem:
    """Return the stem before a cut, from the cache or fetched and then kept.

    Raises:
        MissingExtraError: ONNX Runtime is not installed; nothing is fetched then.
        NotFoundError: The backbone has no such cut.
        CorruptDataError: What was fetched is not the stem that was described.
    """
    require_onnxruntime()
    cut = find_cut(spec, cut_name)
    cached = cache.load(cut.fingerprint)
    if cached is not None:
        return Stem(cached[0], spec.space(cut), spec.preprocessing, cut.feature_shape, dtype=dtype, threads=threads)
    fetched = fetch()
    if fetched.space.fingerprint != cut.fingerprint or fetched.feature_shape != cut.feature_shape:
        raise CorruptDataError(
            f"the cluster sent another stem than the one it described for {spec.name} at {cut_name}",
            hint="Try again: its backbone may just have been replaced",
        )
    cache.store(fetched)
    return Stem(fetched.data, fetched.space, fetched.preprocessing, fetched.feature_shape, dtype=dtype, threads=threads)


def _hex(fingerprint: str) -> str:
    # It becomes a file name: nothing that a cluster sends may name a path.
    if not fingerprint or not all(one in "0123456789abcdef" for one in fingerprint):
        raise CorruptDataError(f"{fingerprint[:80]!r} is not a fingerprint", hint="Update the cluster or the client")
    return fingerprint


def _write_whole(path: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
