"""Stems of the client's own: a local model in the place of a backbone's stem."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from trunkline_wire.specs import BackboneSpec, CutSpec, FeatureSpace, local_fingerprint

from trunkline._local_rows import blank
from trunkline.errors import InvalidArgumentError, ShapeMismatchError
from trunkline.local_models import LocalModel
from trunkline.stems import AnyStem


class OwnStem(AnyStem):
    """A local model whose output takes the place of the features at a cut. Made by ``Client.own_stem``.

    Its features are good for models that were trained on features of the same one in the same codec, and for nothing
    else.

    Attributes:
        local: The model.
    """

    def __init__(self, local: LocalModel, spec: BackboneSpec, cut: CutSpec, codec: str) -> None:
        """Keep the model once a blank picture has shown that its output fits the cut.

        Args:
            local: The model.
            spec: The backbone, at the input size that is meant.
            cut: Where the features enter it.
            codec: How they travel.

        Raises:
            InvalidArgumentError: It is no local model, or one that takes no pictures.
            ShapeMismatchError: Its output has another shape than the features at the cut.
            UnsupportedError: There is no such codec.
        """
        if not isinstance(local, LocalModel):
            raise InvalidArgumentError(
                f"local is a {type(local).__name__}; expected a local model",
                hint="Make one: trunkline.local_model(model, name=..., input_size=...)",
            )
        if local.preprocessing is None:
            raise InvalidArgumentError(
                f"the local model {local.name!r} takes rows as they are; a stem takes pictures",
                hint="Make it with input_size=, the side of the square that pictures are brought to",
            )
        inputs = f"{local.inputs}; in the place of features {cut.fingerprint}"
        fingerprint = local_fingerprint(local.sha256, inputs, math.prod(cut.feature_shape))
        super().__init__(
            FeatureSpace(spec.name, cut.name, spec.preprocessing.input_size, fingerprint, local_model=local.name),
            local.preprocessing,
            cut.feature_shape,
            channel_axis=cut.channel_axis,
            codec=codec,
        )
        self.local = local
        self._compute(blank(local.preprocessing.input_size)[None])

    def _compute(self, pixels_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        parts = []
        for features in self.local.outputs(list(pixels_BHWC)):
            if features.shape[1:] != self.feature_shape:
                raise ShapeMismatchError(
                    f"the local model {self.local.name!r} gave {features.shape[1:]} a row; features of "
                    f"{self.space.backbone} at {self.space.cut} are {self.feature_shape} at input size "
                    f"{self.space.input_size}",
                    hint="Change its output, or choose another cut or input_size",
                )
            parts.append(features)
        return np.concatenate(parts)

    def __repr__(self) -> str:
        """Return the local model, and what it takes the place of."""
        space = self.space
        return (
            f"OwnStem({self.local.name!r} for {space.backbone!r}, cut={space.cut!r}, input_size={space.input_size}, "
            f"shape={self.feature_shape}, codec={self.codec!r})"
        )
