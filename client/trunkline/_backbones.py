"""What a client knows of the cluster's backbones: asked for once. Features and pictures are checked against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trunkline_wire.specs import INPUT_CUT, BackboneSpec, CutCost, FeatureSpace, Preprocessing

from trunkline._codecs import check_codec, check_offered
from trunkline._features import Features
from trunkline._feeds import ImageFeed
from trunkline.errors import IncompatibleModelError, NotFoundError

if TYPE_CHECKING:
    from trunkline._calls.catalog import CatalogCalls
    from trunkline._deadline import Deadline
    from trunkline.bottlenecks import Bottlenecks
    from trunkline.images import Picture
    from trunkline.records import ServerInfo


class Backbones:
    """Descriptions of backbones and cuts. An input size of 0 is the backbone's own."""

    def __init__(self, calls: CatalogCalls, info: ServerInfo, bottlenecks: Bottlenecks) -> None:
        """Keep who is asked, and what the cluster said about itself."""
        self._calls = calls
        self._info = info
        self._bottlenecks = bottlenecks
        self._specs: dict[tuple[str, int], BackboneSpec] = {}
        self._costs: dict[tuple[str, str, int], CutCost] = {}

    def describe(self, name: str, input_size: int, deadline: Deadline, *, again: bool = False) -> BackboneSpec:
        """Return a description, asking the cluster the first time, and whenever told to ask again."""
        if again or (name, input_size) not in self._specs:
            self._specs[name, input_size] = self._calls.describe(name, input_size, deadline)
        return self._specs[name, input_size]

    def cost(self, name: str, cut: str, input_size: int, deadline: Deadline, *, again: bool = False) -> CutCost:
        """Return what a cut costs, asking the cluster the first time, and whenever told to ask again."""
        if again or (name, cut, input_size) not in self._costs:
            self._costs[name, cut, input_size] = self._calls.describe_cut(name, cut, input_size, deadline)
        return self._costs[name, cut, input_size]

    def first(self, deadline: Deadline) -> str:
        """Return the name of the cluster's first backbone."""
        backbones = self._calls.backbones(deadline)
        if not backbones:
            raise NotFoundError("the cluster has no backbone", hint="Start it with `trunkline up --backbone NAME`")
        return backbones[0].name

    def image_feed(self, rows: Sequence[Picture], spaces: Sequence[FeatureSpace], deadline: Deadline) -> ImageFeed:
        """Return pictures on their way to backbones.

        Args:
            rows: The pictures.
            spaces: Whose backbones and input sizes are meant, whatever their cuts; an input size of 0 is its own.
            deadline: Of asking for descriptions.

        Raises:
            NotFoundError: One takes none.
        """
        (space, preprocessing), *others = (self._input(one.backbone, one.input_size, deadline) for one in spaces)
        return ImageFeed(rows, space, preprocessing, others)

    def _input(self, name: str, input_size: int, deadline: Deadline) -> tuple[FeatureSpace, Preprocessing]:
        spec = self.describe(name, input_size, deadline)
        cut = spec.cut(INPUT_CUT)
        if cut is None:
            raise NotFoundError(
                f"{spec.name} takes no images", hint=f"Give a stem: client.stem({spec.name!r}, cut=...)"
            )
        return spec.space(cut), spec.preprocessing

    def features(self, features: Any, space: FeatureSpace, codec: str | None, deadline: Deadline) -> Features:
        """Return features at hand, checked: the fingerprint of their space is compared with the cluster's.

        Raises:
            IncompatibleModelError: The cluster has other weights.
            TrunklineError: They cannot be sent.
        """
        choice = None if codec is None else check_offered(check_codec(codec), self._info)
        spec = self.describe(space.backbone, space.input_size, deadline)
        cut = spec.cut(space.cut)
        if cut is None:
            raise NotFoundError(
                f"{spec.name} has no cut {space.cut!r}", hint="client.describe(name).cuts has those there are"
            )
        if cut.precision_in(space) is None:
            raise IncompatibleModelError(
                f"the features come from other weights or another preprocessing of {space.backbone} at {space.cut}",
                hint=f"Compute them with client.stem({space.backbone!r}, cut={space.cut!r}, "
                f"input_size={space.input_size})",
            )
        if space.bottleneck:
            bottleneck = self._bottlenecks.get(space.bottleneck, deadline)
            cut = replace(cut, feature_shape=bottleneck.code_shape, channel_axis=bottleneck.channel_axis)
            choice = choice or check_codec(bottleneck.codec)
        found = Features(features, space, cut, choice)
        if not space.is_input:
            check_offered(check_codec(found.codec), self._info)
        return found
