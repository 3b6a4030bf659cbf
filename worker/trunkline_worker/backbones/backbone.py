"""A backbone: stages in order, cuts between them, an embedding from all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import (
    INPUT_CUT,
    BackboneSpec,
    CutSpec,
    Preprocessing,
    embedding_fingerprint,
    feature_fingerprint,
)

from trunkline_worker.backbones.embedding import LastPool, TapPool, slices_of
from trunkline_worker.backbones.quiet import quiet
from trunkline_worker.backbones.weights import state_sha256

# Shape suffix legend: B = rows, C = channels, H = height, W = width, D = embedding columns, K = classes

MIN_INPUT_SIZE = 32
MAX_INPUT_SIZE = 1024
"""Input sizes in pixels that are allowed where the network is not bound to one."""


class Normalise(nn.Module):
    """The first layer of every backbone.

    Shape:
        images_BHWC: (B, H, W, 3), uint8; returns (B, 3, H, W), float32.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", (1 / (255 * std)).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Bring pixels to the scale that the network was trained on."""
        return images_BHWC.permute(0, 3, 1, 2).to(torch.float32) * self.scale + self.shift


@dataclass(frozen=True)
class Stage:
    """A part of a backbone. Its end is a cut and a tap, except for the last stage's."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Architecture:
    """A network taken apart.

    Attributes:
        stages: Run one after another they give what enters ``classifier``. The last one ends in no cut.
        classifier: The network's own last layers.
        resizable: Whether other input sizes than its own are allowed.
    """

    stages: tuple[Stage, ...]
    classifier: nn.Module
    resizable: bool


@dataclass(frozen=True)
class WeightsInfo:
    """Where the weights came from. ``text`` is shown to users."""

    text: str
    pretrained: bool


class Trunk(nn.Module):
    """The stages behind a cut with everything that is tapped on the way.

    Shape:
        features: (B, C, H, W), or (B, H, W, 3) uint8 at the cut ``input``; returns (B, D), float32.
    """

    def __init__(self, stages: Sequence[nn.Module], *, taps_input: bool) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.tap = TapPool()
        self.last = LastPool()
        self.taps_input = taps_input

    def forward(self, features: Tensor) -> Tensor:
        """Return the slices of the embedding that lie behind the cut."""
        columns = [self.tap(features)] if self.taps_input else []
        x = features
        for index, stage in enumerate(self.stages):
            x = stage(x)
            columns.append(self.last(x) if index == len(self.stages) - 1 else self.tap(x))
        return torch.cat(columns, dim=1)


class Backbone:
    """A whole pretrained network, frozen and in evaluation mode. Safe to read from several threads.

    Attributes:
        name: As in the catalogue.
        preprocessing: At the network's own input size.
        architecture: The network, taken apart.
        weights: Where the weights came from.
        weights_sha256: Over the state dict. See ``state_sha256``.
    """

    def __init__(
        self, name: str, architecture: Architecture, preprocessing: Preprocessing, weights: WeightsInfo, sha256: str
    ) -> None:
        self.name = name
        self.preprocessing = preprocessing
        self.architecture = architecture
        self.weights = weights
        self.weights_sha256 = sha256
        self._normalise = Normalise(preprocessing)
        self._specs: dict[int, BackboneSpec] = {}
        for module in self.modules():
            module.eval().requires_grad_(False)

    def modules(self) -> list[nn.Module]:
        """Return every part that holds numbers, normalisation and classifier included."""
        return [self._normalise, *(stage.module for stage in self.architecture.stages), self.architecture.classifier]

    @property
    def cut_names(self) -> tuple[str, ...]:
        """Names of the cuts, by depth."""
        return (INPUT_CUT, *(stage.name for stage in self.architecture.stages[:-1]))

    @property
    def num_parameters(self) -> int:
        """Number of trained numbers, the classifier's included."""
        return sum(parameter.numel() for module in self.modules() for parameter in module.parameters())

    def stem(self, cut: str) -> nn.Module:
        """Return the part before a cut: (B, H, W, 3) uint8 in, (B, C, H, W) float32 out. Shares the weights.

        Raises:
            WireError: NOT_FOUND; INVALID_ARGUMENT for ``input``, which has nothing before it.
        """
        depth = self._depth(cut)
        if depth == 0:
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"the cut {INPUT_CUT!r} has no stem: send the images themselves. Cuts with a stem: "
                f"{', '.join(self.cut_names[1:]) or 'none'}",
            )
        return nn.Sequential(self._normalise, *(stage.module for stage in self.architecture.stages[:depth])).eval()

    def trunk(self, cut: str) -> nn.Module:
        """Return the part behind a cut: features in, the (B, D) embedding out. Shares the weights.

        Raises:
            WireError: NOT_FOUND.
        """
        depth = self._depth(cut)
        modules = [stage.module for stage in self.architecture.stages[depth:]]
        if depth == 0:
            modules[0] = nn.Sequential(self._normalise, modules[0])
        return Trunk(modules, taps_input=depth > 0).eval()

    def rest(self, cut: str) -> nn.Module:
        """Return what turns features at a cut into the network's own (B, K) logits. Shares the weights.

        Raises:
            WireError: NOT_FOUND.
        """
        depth = self._depth(cut)
        modules = [stage.module for stage in self.architecture.stages[depth:]]
        first = [self._normalise] if depth == 0 else []
        return nn.Sequential(*first, *modules, self.architecture.classifier).eval()

    def whole(self) -> nn.Module:
        """Return the uncut network: (B, H, W, 3) uint8 in, (B, K) logits out. Shares the weights."""
        return self.rest(INPUT_CUT)

    def _depth(self, cut: str) -> int:
        if cut not in self.cut_names:
            raise WireError(
                ErrorCode.NOT_FOUND,
                f"{self.name} has no cut {cut[:80]!r}. Its cuts, by depth: {', '.join(self.cut_names)}",
            )
        return self.cut_names.index(cut)

    def preprocessing_at(self, input_size: int = 0) -> Preprocessing:
        """Return the preprocessing at an input size; 0 is the network's own.

        Raises:
            WireError: INVALID_ARGUMENT.
        """
        own = self.preprocessing.input_size
        if input_size in (0, own):
            return self.preprocessing
        if not self.architecture.resizable:
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"{self.name} takes pictures of {own} pixels only; input_size {input_size} was asked for",
            )
        if not MIN_INPUT_SIZE <= input_size <= MAX_INPUT_SIZE:
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"input_size must be {MIN_INPUT_SIZE} to {MAX_INPUT_SIZE} pixels; got {input_size}",
            )
        return dataclasses.replace(self.preprocessing, input_size=input_size)

    def described(self, input_size: int = 0) -> BackboneSpec | None:
        """Return what ``describe`` has found out before, at no cost, or None."""
        return self._specs.get(input_size or self.preprocessing.input_size)

    def describe(self, input_size: int = 0) -> BackboneSpec:
        """Describe the backbone at an input size; 0 is its own. Nothing is computed: shapes only.

        Raises:
            WireError: INVALID_ARGUMENT where the network cannot take that size.
        """
        preprocessing = self.preprocessing_at(input_size)
        size = preprocessing.input_size
        if size not in self._specs:
            self._specs[size] = self._describe(preprocessing)
        return self._specs[size]

    def _describe(self, preprocessing: Preprocessing) -> BackboneSpec:
        size = preprocessing.input_size
        *shapes, last = self._shapes(size)
        taps = self.cut_names[1:]
        slices = slices_of([(tap, shape[0]) for tap, shape in zip(taps, shapes, strict=True)], last[0])
        per_tap = (len(slices) - 1) // len(taps) if taps else 0
        cuts = []
        for depth, (name, shape) in enumerate(zip(self.cut_names, [(size, size, 3), *shapes], strict=True)):
            # The tensor at a cut is itself a tap: its slices can be computed from what arrives.
            behind = slices[max(depth - 1, 0) * per_tap :]
            fingerprint = feature_fingerprint(self.weights_sha256, name, preprocessing)
            cuts.append(CutSpec(name, shape, fingerprint, tuple(one.name for one in behind)))
        return BackboneSpec(
            name=self.name,
            pretrained=self.weights.pretrained,
            weights=self.weights.text,
            weights_sha256=self.weights_sha256,
            num_parameters=self.num_parameters,
            preprocessing=preprocessing,
            resizable=self.architecture.resizable,
            cuts=tuple(cuts),
            slices=slices,
            embedding_fingerprint=embedding_fingerprint(self.weights_sha256, preprocessing),
        )

    def _shapes(self, size: int) -> list[tuple[int, ...]]:
        """Return the shape of one row behind every stage, found with tensors that hold no data."""
        shapes = []
        try:
            with quiet("torch._subclasses.fake_tensor"), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
                x = self._normalise(torch.empty(2, size, size, 3, dtype=torch.uint8))
                for stage in self.architecture.stages:
                    x = stage.module(x)
                    shapes.append(tuple(int(one) for one in x.shape[1:]))
        except Exception as error:  # layers refuse a size with RuntimeError, AssertionError and others
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"{self.name} cannot take pictures of {size} pixels: a layer runs out of pixels or does not divide "
                f"them. Its own size is {self.preprocessing.input_size}",
            ) from error
        return shapes


def sha256_of(network: nn.Module) -> str:
    """Return the hash of a whole network's weights, as they were loaded."""
    return state_sha256(network.state_dict())
