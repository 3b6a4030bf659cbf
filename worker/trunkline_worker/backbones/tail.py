"""The last blocks of a backbone as a network of its own: what fine-tuning trains, and one model alone is served by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.backbones.layout import channel_axis
from trunkline_worker.backbones.lora import add_lora, merge_lora

# Shape suffix legend: B = rows, C = channels, H = height, W = width, D = columns of the slices

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Tail(nn.Module):
    """From features at a cut to slices of the embedding behind it. Always in evaluation mode, but for ``adapt_norms``.

    Its weights are a copy: training them changes no one else's backbone. With a ``lora_rank`` the copies stay as they
    are, and factors of that rank are added to them.

    Attributes:
        widths: Columns of each slice.
        own_names: Names, in its state, of the tensors that tell it from the backbone: those a model keeps.
        depths: By the name of a trained parameter: stages between its own and the last one.

    Shape:
        x_BD: (B, C * H * W), a map as ``MapPool`` lays it out, or (B, C * T), tokens as ``TokensPool`` does.
        returns: (B, columns of all slices), float32.
    """

    def __init__(
        self,
        reader: nn.Module,
        row_shape: Sequence[int],
        widths: Sequence[int],
        depths: Mapping[str, int],
        *,
        lora_rank: int = 0,
    ) -> None:
        """Take over a network.

        Args:
            reader: From features at the cut to the slices. Belongs to the tail from now on.
            row_shape: Of the features of one row at the cut.
            widths: Columns of each slice.
            depths: By the name of each of the reader's parameters: stages between its own and the last one.
            lora_rank: 0: all weights are trained.

        Raises:
            WireError: UNSUPPORTED where there is nothing to train in that way.
        """
        super().__init__()
        self._row_shape = tuple(row_shape)
        self.widths = tuple(widths)
        self.reader = reader.eval().requires_grad_(False)
        if lora_rank:
            self._factors = add_lora(reader, lora_rank)
            if not self._factors:
                raise WireError(
                    ErrorCode.UNSUPPORTED,
                    "no linear layer and no 1x1 convolution lies behind the cut; train all weights: leave the rank out",
                )
            trained = [name for name, _ in reader.named_parameters() if _is_factor(name)]
        else:
            self._factors = []
            trained = [name for name, _ in reader.named_parameters()]
        if not trained:
            raise WireError(ErrorCode.UNSUPPORTED, "no weights lie behind the cut; name one further ahead")
        self.depths = {f"reader.{name}": depths[_layer_of(name)] for name in trained}
        parameters = dict(self.named_parameters())
        for name in self.depths:
            parameters[name].requires_grad_(True)
        kept = set(self.depths)
        if not lora_rank:
            # Statistics belong to what is trained: batch normalisation may have gone on averaging.
            kept |= {name for name, one in self.named_buffers() if one.is_floating_point()}
        self.own_names = frozenset(kept)

    @property
    def num_columns(self) -> int:
        """Columns of all slices."""
        return sum(self.widths)

    def draw(self, generator: torch.Generator) -> None:
        """Draw what is added to weights; it changes nothing yet."""
        for one in self._factors:
            one.draw(generator)

    def adapt_norms(self, *, adapt: bool) -> None:
        """Have batch normalisation go on averaging, or keep the statistics it has."""
        for one in self.modules():
            if isinstance(one, _NORMS):
                one.train(adapt)

    def merge(self) -> Tail:
        """Add what is to be added for good, and return the tail."""
        merge_lora(self.reader)
        self._factors = []
        return self

    def train(self, mode: bool = True) -> Tail:
        """Stay in evaluation mode: whoever trains says what normalisation is to do, and nothing else is to change."""
        return super().train(False)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return the columns of the slices."""
        columns_BD: Tensor = self.reader(self._features(x_BD))
        return columns_BD

    def _features(self, x_BD: Tensor) -> Tensor:
        """Bring columns to the layout of the features at the cut: the inverse of ``MapPool`` and ``TokensPool``."""
        axis = channel_axis(self._row_shape)
        channels = self._row_shape[axis]
        if len(self._row_shape) == 2:
            return x_BD.unflatten(1, (channels, -1)).transpose(1, 2)
        side = round((x_BD.shape[1] // channels) ** 0.5)
        x_BCHW = x_BD.unflatten(1, (channels, side, side))
        return x_BCHW if axis == 0 else x_BCHW.permute(0, 2, 3, 1)


def depths_of(graph: fx.GraphModule, ends: Sequence[str]) -> dict[str, int]:
    """Return, by the name of each parameter, how many stages lie between the one that first reads it and the last.

    Args:
        graph: Part of a backbone's.
        ends: Names of the nodes at which stages end.
    """
    stage, found = 0, dict[str, int]()
    for node in graph.graph.nodes:
        for name in _read_by(graph, node):
            found.setdefault(name, stage)
        stage += node.name in ends
    last = max(found.values(), default=0)
    return {name: last - one for name, one in found.items()}


def _read_by(graph: fx.GraphModule, node: fx.Node) -> list[str]:
    target = str(node.target)
    if node.op == "call_module":
        return [f"{target}.{name}" for name, _ in graph.get_submodule(target).named_parameters()]
    return [target] if node.op == "get_attr" else []


def _is_factor(name: str) -> bool:
    return ".parametrizations." in name and name.rpartition(".")[2] in ("down", "up")


def _layer_of(name: str) -> str:
    """Return the name that a parameter had before anything was added to it."""
    layer, marker, rest = name.partition(".parametrizations.")
    return f"{layer}.{rest.split('.')[0]}" if marker else name
