"""A bottleneck as a module that learns: a linear encoder and decoder over channels, around the wire."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from trunkline_wire import bottleneck, quantise
from trunkline_wire.quantise import PackedRows
from trunkline_wire.specs import FeatureSpace

from trunkline._codecs import check_codec, packed
from trunkline.errors import InvalidArgumentError, ShapeMismatchError, UnsupportedError

# Shape suffix legend: B = rows, P = places of all rows, C = channels, K = channels of the code

PCA_PLACES = 2**20
"""Most places from which the principal components of the channels are computed."""


class ChannelLinear(nn.Module):
    """A linear layer over the channels of each place: a 1x1 convolution, whatever the layout.

    Attributes:
        weight: (channels out, channels in).
        bias: (channels out).
        channel_axis: Which axis of a row counts channels.
    """

    def __init__(self, channels_in: int, channels_out: int, channel_axis: int) -> None:
        """Make a layer of zeros."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels_out, channels_in))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        self.channel_axis = channel_axis

    def forward(self, rows: Tensor) -> Tensor:
        """Apply it to rows, (B, ...)."""
        last = rows.movedim(self.channel_axis + 1, -1)
        return nn.functional.linear(last, self.weight, self.bias).movedim(-1, self.channel_axis + 1)

    def to_wire(self) -> bottleneck.ChannelLinear:
        """Return a copy without torch."""
        return bottleneck.ChannelLinear(_numpy(self.weight), _numpy(self.bias))

    def extra_repr(self) -> str:
        """Return what a printed module shows."""
        channels_out, channels_in = self.weight.shape
        return f"{channels_in}, {channels_out}, channel_axis={self.channel_axis}"


class Bottleneck(nn.Module):
    """Encoder, what the codec does to codes, decoder. Features in, features out.

    Attributes:
        encoder: Runs on the client in the end.
        decoder: Runs on the cluster in the end.
        space: Of the features: those of the exact stem.
        feature_shape: Of one row of them.
        channel_axis: Which axis of a row counts channels.
        codec: In which codes travel.
    """

    def __init__(
        self,
        space: FeatureSpace,
        feature_shape: tuple[int, ...],
        channel_axis: int,
        code_channels: int,
        codec: str = quantise.INT8,
    ) -> None:
        """Make one of zeros; ``from_features`` makes one to begin with.

        Raises:
            InvalidArgumentError: There are not so many channels.
            UnsupportedError: There is no such codec.
        """
        super().__init__()
        channels = feature_shape[channel_axis]
        if isinstance(code_channels, bool) or not isinstance(code_channels, int) or not 1 <= code_channels <= channels:
            raise InvalidArgumentError(
                f"code_channels is {code_channels!r}; expected 1 to {channels}, the channels at {space.cut}"
            )
        choice = check_codec(codec)
        if choice.zstd:
            raise UnsupportedError(
                f"codec is {codec!r}: a bottleneck is trained for what loses something",
                hint=f"Use codec={choice.codec!r}; zstd can be asked for with the stem",
            )
        self.space = space
        self.feature_shape = feature_shape
        self.channel_axis = channel_axis
        self.codec = choice.codec
        self.encoder = ChannelLinear(channels, code_channels, channel_axis)
        self.decoder = ChannelLinear(code_channels, channels, channel_axis)

    @classmethod
    def from_features(
        cls,
        features: Tensor,
        space: FeatureSpace,
        channel_axis: int,
        code_channels: int,
        codec: str = quantise.INT8,
    ) -> Bottleneck:
        """Return the one that keeps the most of the features' variance: their principal components.

        Args:
            features: (B, ...), of the exact stem.
            space: Where they live.
            channel_axis: Which axis of a row counts channels.
            code_channels: Channels of the code.
            codec: In which codes travel.
        """
        made = cls(space, tuple(features.shape[1:]), channel_axis, code_channels, codec)
        places_PC = features.movedim(channel_axis + 1, -1).reshape(-1, features.shape[channel_axis + 1])
        places_PC = places_PC[:: -(-len(places_PC) // PCA_PLACES)].double()
        mean_C = places_PC.mean(0)
        centred_PC = places_PC - mean_C
        _, vectors_CC = torch.linalg.eigh(centred_PC.T @ centred_PC)
        components_KC = vectors_CC.flip(1).T[:code_channels]
        with torch.no_grad():
            made.encoder.weight.copy_(components_KC)
            made.encoder.bias.copy_(-components_KC @ mean_C)
            made.decoder.weight.copy_(components_KC.T)
            made.decoder.bias.copy_(mean_C)
        return made

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of one row of codes."""
        shape = list(self.feature_shape)
        shape[self.channel_axis] = len(self.encoder.bias)
        return tuple(shape)

    @property
    def row_bytes(self) -> int:
        """Size of one row of codes on the wire, in bytes, before zstd."""
        return quantise.row_bytes(self.code_shape, self.codec, self.channel_axis)

    def encode(self, features: Tensor) -> Tensor:
        """Return codes as they arrive. Their gradient is the one that they would have unquantised.

        Raises:
            NotFiniteError: One is NaN, infinite, or beyond what the codec can hold.
        """
        if tuple(features.shape[1:]) != self.feature_shape:
            raise ShapeMismatchError(f"a row of features must be {self.feature_shape}; got {tuple(features.shape[1:])}")
        codes: Tensor = _ThroughCodec.apply(self.encoder(features), self.codec, self.channel_axis)
        return codes

    def forward(self, features: Tensor) -> Tensor:
        """Return the features that the trunk sees, (B, ...)."""
        decoded: Tensor = self.decoder(self.encode(features))
        return decoded

    def to_wire(self, embedding_error: float) -> bottleneck.Bottleneck:
        """Return what its file holds.

        Args:
            embedding_error: As measured on pictures that it was not trained on.
        """
        return bottleneck.Bottleneck(
            self.space,
            self.feature_shape,
            self.channel_axis,
            self.encoder.to_wire(),
            self.decoder.to_wire(),
            self.codec,
            embedding_error,
        )


class _ThroughCodec(torch.autograd.Function):
    """Packs rows and unpacks them. Backward it does nothing, as if the codec lost nothing."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, codec: str, channel_axis: int) -> Tensor:
        sent = packed(_numpy(rows), codec, channel_axis)
        arrived = quantise.unpack(sent) if isinstance(sent, PackedRows) else np.asarray(sent, np.float32)
        return torch.from_numpy(np.ascontiguousarray(arrived)).to(rows.device, rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().to("cpu", torch.float32, copy=True).numpy()
