"""Local features at hand: vectors of something that is not run here."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from trunkline_wire.limits import MAX_LOCAL_WIDTH
from trunkline_wire.quantise import FLOAT32
from trunkline_wire.specs import CutSpec, local_fingerprint, local_space

from trunkline._codecs import check_codec, check_local_codec
from trunkline._features import Features
from trunkline._names import check_user_name, check_version
from trunkline.errors import ShapeMismatchError

# Shape suffix legend: N = rows, W = width


class LocalFeatures:
    """Local features at hand, given wherever a local model is. Made by ``local_features``.

    Attributes:
        name: By which datasets and models know where they come from.
        space: Where they live.
        codec: How they travel.
        width: Numbers a row.
        features: The checked rows.
    """

    def __init__(self, array_NW: npt.NDArray[np.generic], *, name: str, version: str, codec: str) -> None:
        """Check the features."""
        self.name = name
        self.width = array_NW.shape[1]
        self.codec = codec
        sha256 = hashlib.sha256(f"features-v1\0{name}\0{version}".encode()).hexdigest()
        self.space = local_space(name, local_fingerprint(sha256, "features at hand", self.width))
        cut = CutSpec("", (self.width,), self.space.fingerprint, ())
        self.features = Features(array_NW, self.space, cut, check_codec(codec))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.features)

    def __repr__(self) -> str:
        """Return name, shape and codec."""
        return f"LocalFeatures({self.name!r}, {len(self)} rows, width={self.width}, codec={self.codec!r})"


def local_features(features: Any, *, name: str, version: str, codec: str = FLOAT32) -> LocalFeatures:
    """Take vectors at hand as local features: the output of something that is not run here.

    Args:
        features: One vector for each row.
        name: Of where they come from, by which datasets and models know it.
        version: Identifies it together with the name. Change it whenever what makes the vectors changes.
        codec: How they travel, as in ``local_model``.

    Shape:
        features: (N, W), floats or whole numbers.

    Raises:
        ShapeMismatchError, DtypeMismatchError, NotFiniteError, EmptyBatchError, InvalidArgumentError: They cannot be
            local features.
    """
    check_user_name(name, "local model")
    check_version(version)
    own_codec = check_local_codec(codec)
    array = features.to_numpy() if hasattr(features, "to_numpy") else np.asarray(features)
    if array.dtype.kind in "iub":
        array = array.astype(np.float32)
    if array.ndim != 2 or not 1 <= array.shape[1] <= MAX_LOCAL_WIDTH:
        raise ShapeMismatchError(
            f"local features must be (rows, width), 1 to {MAX_LOCAL_WIDTH} wide; got {array.shape}",
            hint="Use features.reshape(len(features), -1)",
        )
    return LocalFeatures(array, name=name, version=version, codec=own_codec)
