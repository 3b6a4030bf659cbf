"""Which rows go into which local model: what a caller gave, checked and put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline_wire.specs import FeatureSpace

from trunkline._feeds import FeatureFeed, Feed, LocalModelFeed
from trunkline._local_rows import LocalRows
from trunkline._row_sources import FeatureRows, LocalModelRows, RowSource
from trunkline.errors import InvalidArgumentError
from trunkline.local_models import LocalModel
from trunkline.local_vectors import LocalFeatures

if TYPE_CHECKING:
    from trunkline.images import Picture

Local = LocalModel | LocalFeatures
"""What can be given as ``local``."""


class GivenImages:
    """What a caller gave as images: as such where they are wanted as pictures, else as they are."""

    def __init__(self, images: Any) -> None:
        """Keep them. None: there are none."""
        self.images = list(images) if isinstance(images, Iterator) else images

    @cached_property
    def pictures(self) -> list[Picture]:
        """The images as rows.

        Raises:
            InvalidArgumentError: There are none, or they cannot be pictures.
        """
        from trunkline.images import pictures

        if self.images is None:
            raise InvalidArgumentError("images is None; a backbone needs images or their features")
        return pictures(self.images)


@dataclass(frozen=True)
class LocalInput:
    """A local model and the rows that go into it, or local features at hand, which have none."""

    local: Local
    rows: LocalRows | None

    @property
    def name(self) -> str:
        """Of the local model."""
        return self.local.name

    @property
    def codec(self) -> str:
        """How its features travel."""
        return self.local.codec

    @property
    def space(self) -> FeatureSpace:
        """Where its features live. One row is computed if the width is not known yet."""
        if isinstance(self.local, LocalModel) and self.rows is not None:
            self.local.find_width(self.rows)
        return self.local.space

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.local) if isinstance(self.local, LocalFeatures) else len(self.rows or ())

    def source(self) -> RowSource:
        """Return the rows to be uploaded."""
        if isinstance(self.local, LocalFeatures):
            return FeatureRows(self.local.features)
        assert self.rows is not None
        return LocalModelRows(self.rows, self.local)

    def feed(self) -> Feed:
        """Return the rows on their way to a model."""
        if isinstance(self.local, LocalFeatures):
            return FeatureFeed(self.local.features)
        assert self.rows is not None
        return LocalModelFeed(self.rows, self.local)


def bind_local(local: Local | Sequence[Local] | None, inputs: Any, given: GivenImages) -> list[LocalInput]:
    """Return every local model with its rows.

    Args:
        local: One or several, or None.
        inputs: What goes in instead of the images; a mapping by the local model's name if there are several.
        given: The images.

    Raises:
        InvalidArgumentError: Something is missing, superfluous or twice there.
        TrunklineError: The rows cannot go in.
    """
    chosen = local_list(local)
    names = [one.name for one in chosen]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidArgumentError(f"two local models are called {twice!r}", hint="Give them names that differ")
    own = _inputs_by_name(chosen, inputs)
    return [LocalInput(one, _rows(one, own, given) if isinstance(one, LocalModel) else None) for one in chosen]


def local_list(local: Any) -> list[Local]:
    """Return one local model, several, or none as a list.

    Raises:
        InvalidArgumentError: One of them is none.
    """
    chosen = [] if local is None else list(local) if isinstance(local, (list, tuple)) else [local]
    for one in chosen:
        if not isinstance(one, (LocalModel, LocalFeatures)):
            raise InvalidArgumentError(
                f"local is a {type(one).__name__}; expected a local model",
                hint="Make one: trunkline.local_model(model, name=...), or trunkline.local_features(...) of vectors",
            )
    return chosen


def _inputs_by_name(chosen: Sequence[Local], inputs: Any) -> Mapping[str, Any]:
    names = [one.name for one in chosen if isinstance(one, LocalModel)]
    if inputs is None:
        return {}
    if not names:
        raise InvalidArgumentError("local_inputs are for local models, and there is none", hint="Give one with local=")
    if not isinstance(inputs, Mapping):
        if len(names) > 1:
            raise InvalidArgumentError(
                f"local_inputs says nothing of which of {len(names)} local models it is for",
                hint=f"Give a dict: {{{names[0]!r}: rows, ...}}",
            )
        return {names[0]: inputs}
    strange = [str(name) for name in inputs if name not in names]
    if strange:
        raise InvalidArgumentError(
            f"local_inputs has rows for {', '.join(map(repr, strange[:5]))}; the local models are {', '.join(names)}"
        )
    return inputs


def _rows(model: LocalModel, own: Mapping[str, Any], given: GivenImages) -> LocalRows:
    if model.name in own:
        return model.rows(own[model.name])
    if given.images is None:
        raise InvalidArgumentError(
            f"there are no rows for the local model {model.name!r}", hint="Give them with local_inputs="
        )
    if model.input_size is not None:
        return model.rows(given.pictures)
    if _are_files(given.images):
        raise InvalidArgumentError(
            f"the images are files, and the local model {model.name!r} takes rows as they are",
            hint="Give it an input_size= to have them decoded, or other rows with local_inputs=",
        )
    return model.rows(given.images)


def _are_files(images: Any) -> bool:
    first = images[0] if isinstance(images, (list, tuple)) and images else images
    return isinstance(first, (str, bytes, Path)) or hasattr(images, "columns")
