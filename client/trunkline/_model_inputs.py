"""What a model needs for each row against what a caller gave: compared before anything is computed or sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from trunkline_wire.specs import FeatureSpace

from trunkline._feeds import Feed, JoinedFeed, StemFeed
from trunkline._local_inputs import LocalInput
from trunkline.datasets import describe_space
from trunkline.errors import IncompatibleModelError, InvalidArgumentError
from trunkline.stems import AnyStem, stem_list

if TYPE_CHECKING:
    from trunkline._backbones import Backbones
    from trunkline._deadline import Deadline
    from trunkline.images import Picture
    from trunkline.records import DatasetSource, ModelRecord

GivenStems = AnyStem | Sequence[AnyStem] | Literal[False] | None
"""Which stems a caller gave. None: the model's own. False: none, images are sent."""


def check_locals(record: ModelRecord, given: Sequence[LocalInput]) -> dict[str, LocalInput]:
    """Return the local inputs of a model by name.

    Raises:
        InvalidArgumentError: One that is needed is missing, or one that is given is not known.
        IncompatibleModelError: One is another than it was trained with, or travels in another codec.
    """
    needed = {one.space.local_model: one for one in record.inputs if one.space.is_local}
    found = {one.name: one for one in given}
    missing = [name for name in needed if name not in found]
    if missing:
        others = f"; {', '.join(map(repr, found))} is given" if found else ", which is not given"
        raise InvalidArgumentError(
            f"{record.reference} needs the local model {', '.join(map(repr, missing))}{others}",
            hint=f"Give it with local=, under the name {missing[0]!r}",
        )
    strange = [name for name in found if name not in needed]
    if strange:
        knows = f"it knows {', '.join(map(repr, needed))}" if needed else "it knows none"
        raise InvalidArgumentError(
            f"{record.reference} knows no local model {', '.join(map(repr, strange))}; {knows}", hint="Leave it out"
        )
    for name, one in needed.items():
        _check_local(record.reference, one, found[name])
    return found


def _check_local(reference: str, needed: DatasetSource, given: LocalInput) -> None:
    own, other = needed.space.fingerprint, given.space.fingerprint
    if own != other:
        raise IncompatibleModelError(
            f"{reference} was trained with another local model {given.name!r}: of fingerprint {own[:12]}, not "
            f"{other[:12]}",
            hint="Use that one, with the same weights, version, input_size, mean, std and width; or train again",
        )
    if needed.codec != given.codec:
        raise IncompatibleModelError(
            f"{reference} was trained on features of the local model {given.name!r} in {needed.codec}; these travel in "
            f"{given.codec}",
            hint=f"Make it with codec={needed.codec!r}",
        )


def check_own(reference: str, needed: DatasetSource, space: FeatureSpace, codec: str) -> None:
    """Check that rows which a stem of one's own or a bottleneck makes are those that a model was trained on.

    Nobody can say how near others come to them. Does nothing where neither are of this kind.

    Args:
        reference: Of the model.
        needed: What it was trained on.
        space: Of the rows.
        codec: Of the rows, without zstd.

    Raises:
        IncompatibleModelError: They are others, or travel in another codec.
    """
    own = needed.space
    if not own.is_own and not space.is_own:
        return
    if own != space:
        raise IncompatibleModelError(
            f"{reference} was trained on {_described(own)}; these are {_described(space)}",
            hint="Use what made those that it was trained on, with the same weights and version; or train again",
        )
    if needed.codec != codec:
        raise IncompatibleModelError(
            f"{reference} was trained on {describe_space(own)} in {needed.codec}; these travel in {codec}",
            hint=f"Use codec={needed.codec!r}",
        )


def _described(space: FeatureSpace) -> str:
    return f"{describe_space(space)} of fingerprint {space.fingerprint[:12]}"


class BackboneInputs:
    """The inputs of a model that backbones read, and how they are fed."""

    def __init__(self, record: ModelRecord, backbones: Backbones, model_stem: Callable[[str], AnyStem | None]) -> None:
        """Keep the model and who is asked.

        Args:
            record: The model.
            backbones: Describes backbones.
            model_stem: Returns the stem that goes with the model's input of a backbone; None where none can be had.
        """
        self._reference = record.reference
        self._backbones = backbones
        self._model_stem = model_stem
        self._sources = [one for one in record.inputs if not one.space.is_local]
        self.spaces = [one.space for one in self._sources]

    def feeds(self, rows: Sequence[Picture], given: GivenStems, deadline: Deadline) -> list[Feed]:
        """Return what to send of pictures, the model's first input first.

        Raises:
            IncompatibleModelError: A stem is not one of the model's backbones and input sizes, or of other weights.
            InvalidArgumentError: A stem is missing whose features images cannot take the place of.
        """
        stems = self._stems(given, deadline)
        self._check_images(stems)
        readers = [one for one in self.spaces if one.backbone not in stems]
        feeds: list[Feed] = []
        if self.spaces[0] in readers:
            # One file for all of them: see `Input` in inference.proto.
            feeds.append(self._backbones.image_feed(rows, readers, deadline))
            readers = []
        for space in self.spaces:
            if space.backbone in stems:
                feeds.append(StemFeed(rows, stems[space.backbone]))
            elif space in readers:
                feeds.append(self._backbones.image_feed(rows, [space], deadline))
        return feeds

    def _stems(self, given: GivenStems, deadline: Deadline) -> dict[str, AnyStem]:
        if given is False:
            return {}
        chosen = stem_list(given)
        stems = {one.space.backbone: one for one in chosen}
        if len(stems) < len(chosen):
            raise InvalidArgumentError("two stems are of one backbone", hint="Give one for each backbone")
        for one in chosen:
            self._check_stem(one, deadline)
        for space in self.spaces:
            if space.backbone not in stems:
                own = self._model_stem(space.backbone)
                if own is not None:
                    stems[space.backbone] = own
        return stems

    def _check_images(self, stems: Mapping[str, AnyStem]) -> None:
        """Check that images can be sent wherever no stem was found."""
        for space in self.spaces:
            if space.is_own and space.backbone not in stems:
                made = f"client.own_stem(local, {space.backbone!r}, cut={space.cut!r})"
                raise InvalidArgumentError(
                    f"{self._reference} was trained on {describe_space(space)}; images cannot take their place",
                    hint=f"Give the stem that made them with stem=: {made if space.local_model else 'model.stem()'}",
                )

    def _check_stem(self, stem: AnyStem, deadline: Deadline) -> None:
        other = stem.space
        needed = next((one for one in self._sources if one.space.backbone == other.backbone), self._sources[0])
        own = needed.space
        if (own.backbone, own.input_size) != (other.backbone, other.input_size):
            raise IncompatibleModelError(
                f"{self._reference} needs {own.backbone} at input size {own.input_size}; "
                f"the stem is of {other.backbone} at {other.input_size}",
                hint=f"Use client.stem({own.backbone!r}, cut={own.cut!r}, input_size={own.input_size}), or no stem",
            )
        check_own(self._reference, needed, other, stem.row_codec)
        if own.cut != other.cut or own.fingerprint == other.fingerprint:
            return
        # Two stems of one cut, exact and quantised, have a fingerprint each. All others are of other weights.
        cut = self._backbones.describe(own.backbone, own.input_size, deadline).cut(own.cut)
        if cut is None or None in (cut.precision_in(own), cut.precision_in(other)):
            raise IncompatibleModelError(
                f"{self._reference} was trained on other weights of {own.backbone} than the stem has",
                hint="Fetch the stem once more, or train again",
            )


def join(record: ModelRecord, feeds: Sequence[Feed], local: Mapping[str, LocalInput]) -> Feed:
    """Return everything that a model needs for each row, its first input first."""
    feeds = [*feeds, *(local[one.space.local_model].feed() for one in record.inputs if one.space.is_local)]
    return feeds[0] if len(feeds) == 1 else JoinedFeed(feeds[0], feeds[1:])


def input_of(record: ModelRecord, backbone: str | None) -> DatasetSource:
    """Return a model's input of a backbone; its first input for None.

    Raises:
        InvalidArgumentError: It reads no such backbone.
    """
    if backbone is None:
        return record.inputs[0]
    readers = {one.space.backbone: one for one in record.inputs if not one.space.is_local}
    if backbone not in readers:
        raise InvalidArgumentError(
            f"{record.reference} reads no backbone {backbone!r}; it reads {', '.join(readers) or 'none'}"
        )
    return readers[backbone]


def check_backbones(reference: str, needed: Sequence[FeatureSpace], given: Sequence[FeatureSpace]) -> None:
    """Check that features at hand are of the backbones that a model reads.

    Raises:
        IncompatibleModelError: They are of others, or some are missing.
    """
    own, other = [one.backbone for one in needed], [one.backbone for one in given]
    if sorted(own) != sorted(other):
        raise IncompatibleModelError(
            f"{reference} needs features of {' and of '.join(own)}; these are of {' and of '.join(other)}",
            hint="Compute them with model.stem()",
        )
