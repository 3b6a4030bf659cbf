"""A backbone: one graph, the cuts in it, and an embedding from the ends of its stages."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import (
    INPUT_CUT,
    POOLED,
    BackboneSpec,
    CutSpec,
    Preprocessing,
    embedding_fingerprint,
    feature_fingerprint,
    int8_fingerprint,
    map_tap,
    tokens_slice,
)

from trunkline_worker.backbones.cuts import part
from trunkline_worker.backbones.embedding import LastPool, MapPool, Places, Select, TokensPool, map_shape, slices_of
from trunkline_worker.backbones.plan import Cut, make_plan
from trunkline_worker.backbones.samples import BUNDLED, Samples
from trunkline_worker.backbones.tail import Tail, depths_of
from trunkline_worker.backbones.trace import trace
from trunkline_worker.backbones.values import Value, measure
from trunkline_worker.backbones.weights import state_sha256

# Shape suffix legend: B = rows, H = height, W = width, D = embedding columns, K = classes

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
class WeightsInfo:
    """Where the weights came from. ``text`` is shown to users."""

    text: str
    pretrained: bool


class Backbone:
    """A whole pretrained network, frozen and in evaluation mode. Safe to read from several threads.

    Attributes:
        name: As in the catalogue.
        preprocessing: At the network's own input size.
        resizable: Whether other input sizes than its own are allowed.
        weights: Where the weights came from.
        weights_sha256: Over the state dict, see ``state_sha256``; of a network of one's own also over its graph.
        class_names: What the network's own outputs mean; empty where that is not known.
        samples: Pictures on which errors are measured and quantised stems calibrated.
        num_parameters: Number of trained numbers, the classifier's included.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        preprocessing: Preprocessing,
        weights: WeightsInfo,
        sha256: str,
        *,
        resizable: bool = True,
        leaves: Iterable[type[nn.Module]] = (),
        functions: Iterable[Callable[..., Any]] = (),
        class_names: tuple[str, ...] = (),
        samples: Samples = BUNDLED,
    ) -> None:
        """Trace a network and find its cuts, taps and classifier.

        Args:
            name: As in the catalogue.
            network: Takes (B, 3, H, W) float32 and returns (B, K). Belongs to the backbone from now on.
            preprocessing: At the network's own input size.
            weights: Where the weights came from.
            sha256: Over the state dict, as it was loaded.
            resizable: Whether the network takes other input sizes than its own.
            leaves: Classes of modules that tracing must not look into.
            functions: Functions that tracing must not look into.
            class_names: What the outputs mean.
            samples: Pictures to measure with.

        Raises:
            WireError: UNSUPPORTED where the network cannot be traced or does not return one (B, K) tensor.
        """
        self.name = name
        self.preprocessing = preprocessing
        self.weights = weights
        self.weights_sha256 = sha256
        self.class_names = class_names
        self.samples = samples
        self.num_parameters = sum(parameter.numel() for parameter in network.parameters())
        self._normalise = Normalise(preprocessing)
        network.eval().requires_grad_(False)
        traced = trace(network, preprocessing.input_size, fixed=not resizable, leaves=leaves, functions=functions)
        self._graph = traced.module.eval().requires_grad_(False)
        self.resizable = resizable and not traced.by_export
        self._plan = make_plan(name, network, traced)
        self._specs: dict[int, BackboneSpec] = {}

    def modules(self) -> list[nn.Module]:
        """Return every part that holds numbers, normalisation and classifier included."""
        return [self._normalise, self._graph]

    @property
    def cut_names(self) -> tuple[str, ...]:
        """Names of the cuts, by depth."""
        return tuple(cut.name for cut in self._plan.cuts)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of the cuts where a stage ends, by depth: the taps."""
        return tuple(tap.name for tap in self._plan.taps)

    @property
    def num_logits(self) -> int:
        """How many numbers the network itself returns for a row."""
        shape = self._plan.values[self._plan.output].shape
        assert shape is not None
        return shape[0]

    def check_cut(self, name: str) -> None:
        """Check that there is a cut of that name.

        Raises:
            WireError: INVALID_ARGUMENT for a point where several tensors cross, with the nearest cuts before and after
                it; NOT_FOUND for a name that is none.
        """
        self._plan.find(name)

    def stem(self, cut: str) -> nn.Module:
        """Return the part before a cut: (B, H, W, 3) uint8 in, (B, ...) float32 features out. Shares the weights.

        Raises:
            WireError: As ``check_cut``; INVALID_ARGUMENT for ``input``, which has nothing before it.
        """
        end = self._plan.find(cut)
        if end.name == INPUT_CUT:
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"the cut {INPUT_CUT!r} has no stem: send the images themselves. Cuts with a stem: "
                f"{', '.join(self.stage_names) or 'none'}",
            )
        return self._part(INPUT_CUT, end.node)

    def trunk(self, cut: str, whole: str = "") -> nn.Module:
        """Return the part behind a cut: features in, the (B, D) embedding out. Shares the weights.

        With the name of a slice that is all of a tap's features, that comes out instead: of the map (B, channels *
        height * width), in that order, of the tokens (B, channels * tokens).

        Raises:
            WireError: As ``check_cut``; INVALID_ARGUMENT for a tap that is a map at no input size, or is before the
                cut; NOT_FOUND for a slice of another kind.
        """
        plan = self._plan
        if whole:
            return self._whole_part(cut, whole)
        pools = {tap.node: tap.pool for tap in plan.taps_behind(cut)}
        return self._part(cut, plan.pooled.node, {**pools, plan.pooled.node: LastPool(plan.pooled.shape)})

    def reader(self, cut: str, slices: Sequence[str]) -> nn.Module:
        """Return what turns features at a cut into some slices behind it, in that order. Shares the weights.

        Nothing is computed that these slices do not need.
        """
        plan = self._plan
        pooled = LastPool(plan.pooled.shape)
        taps = [tap for tap in plan.taps_behind(cut) if any(f"{tap.name}.{kind}" in slices for kind in tap.pool.kinds)]
        pools: dict[str, nn.Module] = {tap.node: tap.pool for tap in taps}
        if POOLED in slices:
            pools[plan.pooled.node] = pooled
        end = plan.pooled.node if POOLED in slices else taps[-1].node
        made = {one.name: one for one in slices_of(taps, pooled.width)}
        ranges = [(made[name].start, made[name].stop) for name in slices]
        return nn.Sequential(self._part(cut, end, pools), Select(ranges)).eval()

    def tail(self, cut: str, slices: Sequence[str], *, lora_rank: int = 0) -> Tail:
        """Return the blocks behind a cut that some slices need, with weights of their own: what fine-tuning trains.

        Args:
            cut: Where the features are a map, or a map and tokens beside it.
            slices: Behind the cut, none twice.
            lora_rank: 0: all weights are trained. Otherwise what is added to them is, of that rank.

        Raises:
            WireError: As ``check_cut`` and ``Tail``; NOT_FOUND for a slice that is not behind the cut.
        """
        plan = self._plan
        start = plan.find(cut)
        widths = {one.name: one.width for one in slices_of(plan.taps_behind(cut), LastPool(plan.pooled.shape).width)}
        missing = [one for one in slices if one not in widths]
        if missing or not slices:
            raise WireError(
                ErrorCode.NOT_FOUND,
                f"{self.name} has no slice {(missing or [''])[0][:80]!r} behind the cut {cut!r}; there is "
                + ", ".join(widths),
            )
        reader: nn.Module = copy.deepcopy(self.reader(cut, slices))
        graph = reader.get_submodule("0")
        assert isinstance(graph, fx.GraphModule)
        ends = [tap.node for tap in plan.taps_behind(cut) if tap.node != start.node]
        depths = {f"0.{name}": depth for name, depth in depths_of(graph, ends).items()}
        return Tail(reader, start.shape, [widths[one] for one in slices], depths, lora_rank=lora_rank)

    def tail_for(self, config: HeadConfig) -> Tail:
        """Return the blocks of a head of kind ``tail``, as they are here. See ``tail``."""
        return self.tail(config.tap, config.slices, lora_rank=config.lora_rank)

    def rest(self, cut: str) -> nn.Module:
        """Return what turns features at a cut into the network's own (B, K) logits. Shares the weights.

        Raises:
            WireError: As ``check_cut``.
        """
        return self._part(cut, self._plan.output)

    def whole(self) -> nn.Module:
        """Return the uncut network: (B, H, W, 3) uint8 in, (B, K) logits out. Shares the weights."""
        return self.rest(INPUT_CUT)

    def _part(self, cut: str, end: str, pools: Mapping[str, nn.Module] | None = None) -> nn.Module:
        start = self._plan.find(cut)
        first = self._normalise if start.name == INPUT_CUT else None
        return part(self._graph, start.node, end, self._plan.values, first=first, pools=pools).eval()

    def _whole_part(self, cut: str, whole: str) -> nn.Module:
        """Return what turns features at a cut into the map at a tap, or its tokens, flat."""
        plan = self._plan
        tap = map_tap(whole)
        if tap is None:
            raise WireError(ErrorCode.NOT_FOUND, f"{self.name} has no map {whole[:80]!r}")
        start, end = plan.find(cut), plan.find(tap)
        behind = plan.cuts[plan.cuts.index(start) :]
        if end not in behind or not _may_be_map(end):
            why = "lies before it" if end not in behind else "has no places that form a map"
            maps = ", ".join(one.name for one in behind if one.name in self.stage_names and _may_be_map(one))
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"{self.name} gives no map at {tap!r} from features at cut {cut!r}: {tap!r} {why}. Ends of stages that "
                f"are maps there: {maps or 'none'}",
            )
        has_tokens = whole == tokens_slice(tap) and len(end.shape) == 2
        pool = TokensPool() if has_tokens else MapPool(end.shape)
        return self._part(cut, end.node, {end.node: pool})

    def preprocessing_at(self, input_size: int = 0) -> Preprocessing:
        """Return the preprocessing at an input size; 0 is the network's own.

        Raises:
            WireError: INVALID_ARGUMENT.
        """
        own = self.preprocessing.input_size
        if input_size in (0, own):
            return self.preprocessing
        if not self.resizable:
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
        plan = self._plan
        values = plan.values if size == self.preprocessing.input_size else self._measured(size)
        slices = slices_of(plan.taps, LastPool(plan.pooled.shape).width)
        first_columns = {tap.name: f"{tap.name}.{tap.pool.kinds[0]}" for tap in plan.taps}
        places = [one.name for one in slices]
        macs, cuts = 0, []
        costs = plan.costs(values)
        for cut in plan.cuts:
            macs = costs[cut.node]
            behind = plan.taps_behind(cut.name)
            fingerprint = feature_fingerprint(self.weights_sha256, cut.name, preprocessing)
            is_input = cut.name == INPUT_CUT
            shape = values[cut.node].shape
            assert shape is not None
            cuts.append(
                CutSpec(
                    name=cut.name,
                    feature_shape=(size, size, 3) if is_input else shape,
                    fingerprint=fingerprint,
                    slices=tuple(places[places.index(first_columns[behind[0].name]) :] if behind else places[-1:]),
                    channel_axis=2 if is_input else cut.channel_axis,
                    is_stage=cut.name in first_columns,
                    stem_macs=macs,
                    stem_parameters=cut.num_parameters,
                    int8_fingerprint="" if is_input else int8_fingerprint(fingerprint, self.samples.calibration_digest),
                    map_shape=() if is_input else map_shape(shape),
                )
            )
        return BackboneSpec(
            name=self.name,
            pretrained=self.weights.pretrained,
            weights=self.weights.text,
            weights_sha256=self.weights_sha256,
            num_parameters=self.num_parameters,
            preprocessing=preprocessing,
            resizable=self.resizable,
            cuts=tuple(cuts),
            slices=slices,
            embedding_fingerprint=embedding_fingerprint(self.weights_sha256, preprocessing),
            macs=macs,
            class_names=self.class_names,
        )

    def _measured(self, size: int) -> Mapping[str, Value]:
        """Run the graph at another size, with tensors that hold no data."""
        try:
            return measure(self._graph, size, fixed=False)
        except Exception as error:  # layers refuse a size with RuntimeError, AssertionError and others
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"{self.name} cannot take pictures of {size} pixels: a layer runs out of pixels or does not divide "
                f"them. Its own size is {self.preprocessing.input_size}",
            ) from error


def _may_be_map(cut: Cut) -> bool:
    """Whether the features at a cut have places, were it one alone at the network's own input size."""
    return cut.name != INPUT_CUT and len(cut.shape) in (2, 3) and Places(cut.shape).has_grid


def sha256_of(network: nn.Module) -> str:
    """Return the hash of a whole network's weights, as they were loaded."""
    return state_sha256(network.state_dict())
