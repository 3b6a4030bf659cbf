"""Bottlenecks: two learned linear layers around the wire, so that a cut costs fewer bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trunkline_wire.specs import FeatureSpace, bottleneck_fingerprint

# Shape suffix legend: B = rows, C = channels in, K = channels out, O and I = places outside and inside of the channels

MAX_BOTTLENECK_BYTES = 16 * 2**20
"""Largest file of a bottleneck."""


@dataclass(frozen=True)
class ChannelLinear:
    """A linear layer over the channels of each place: a 1x1 convolution, whatever the layout.

    Attributes:
        weight: float32, (channels out, channels in).
        bias: float32, (channels out).
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    def apply(self, rows: npt.NDArray[np.floating], channel_axis: int) -> npt.NDArray[np.float32]:
        """Apply it.

        Args:
            rows: (B, ...), float32 or float16.
            channel_axis: Which axis of a row counts channels.
        """
        shape = rows.shape
        outside = math.prod(shape[: channel_axis + 1])
        x_OCI = rows.astype(np.float32, copy=False).reshape(outside, shape[channel_axis + 1], -1)
        if x_OCI.shape[2] == 1:  # channels lie side by side: one product instead of one for each place
            y_OKI = (x_OCI[:, :, 0] @ self.weight.T + self.bias)[:, :, None]
        else:
            y_OKI = self.weight @ x_OCI + self.bias[:, None]
        return y_OKI.reshape(*shape[: channel_axis + 1], len(self.bias), *shape[channel_axis + 2 :])


@dataclass(frozen=True)
class Bottleneck:
    """Turns features at a cut into a code of fewer channels and back.

    Attributes:
        space: Of the features that it was trained on: those of the exact stem.
        feature_shape: Of one row of them.
        channel_axis: Which axis of a row counts channels; of features and codes alike.
        encoder: From the channels at the cut to those of a code. Runs on the client, behind the stem.
        decoder: And back. Runs on the cluster, before the trunk.
        codec: In which codes travel: the one that it was trained for, such as ``int8``.
        embedding_error: Largest relative difference over the slices of the embedding that it makes, codec included, on
            the pictures it was measured on.
    """

    space: FeatureSpace
    feature_shape: tuple[int, ...]
    channel_axis: int
    encoder: ChannelLinear
    decoder: ChannelLinear
    codec: str
    embedding_error: float

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of one row of codes."""
        shape = list(self.feature_shape)
        shape[self.channel_axis] = len(self.encoder.bias)
        return tuple(shape)

    def code_space(self, sha256: str) -> FeatureSpace:
        """Return the feature space of its codes.

        Args:
            sha256: Hex SHA-256 of its file.
        """
        return replace(
            self.space, fingerprint=bottleneck_fingerprint(self.space.fingerprint, sha256), bottleneck=sha256
        )

    @property
    def num_bytes(self) -> int:
        """Memory that its layers take."""
        layers = (self.encoder, self.decoder)
        return sum(one.weight.nbytes + one.bias.nbytes for one in layers)
