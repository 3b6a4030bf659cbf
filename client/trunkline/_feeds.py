"""Rows on their way to the cluster: batches made as they are needed, of one input or of several beside each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from trunkline_wire import quantise
from trunkline_wire.limits import MAX_BATCH_ROWS, MAX_PAYLOAD_BYTES
from trunkline_wire.quantise import PackedRows
from trunkline_wire.specs import FeatureSpace, Preprocessing

from trunkline._calls import Batch, MoreRows, Rows
from trunkline._features import Features, rows_per_chunk
from trunkline.errors import InvalidArgumentError, PayloadTooLargeError, ShapeMismatchError, TrunklineError
from trunkline.local_models import not_finite

if TYPE_CHECKING:
    from trunkline._local_rows import LocalRows
    from trunkline.images import Picture
    from trunkline.local_models import LocalModel
    from trunkline.stems import AnyStem

# Shape suffix legend: B = rows, W = width of local features

DEFAULT_BATCH_ROWS = 64
"""Most rows in a batch unless told otherwise."""


class Feed(ABC):
    """Rows on their way to the cluster. Rows that fail here are in ``errors``."""

    def __init__(self, space: FeatureSpace, num_rows: int, num_bytes: int) -> None:
        """Keep where the rows live, their number, and the size of one in bytes."""
        self.space = space
        self.num_rows = num_rows
        self.errors: dict[int, TrunklineError] = {}
        self.row_bytes = num_bytes

    @property
    def backbone(self) -> str:
        """The backbone that reads all that a row needs one for; empty if there are several, or none."""
        return "" if self.space.is_local else self.space.backbone

    def batch_rows(self, wanted: int | None) -> int:
        """Return how many rows travel together.

        Raises:
            PayloadTooLargeError: That many do not fit a message.
            InvalidArgumentError: It is not a number of rows.
        """
        most = rows_per_chunk(self.row_bytes)
        if wanted is None:
            return min(most, DEFAULT_BATCH_ROWS)
        if wanted < 1:
            raise InvalidArgumentError(f"batch_size is {wanted}; expected 1 or more")
        fits = min(MAX_BATCH_ROWS, MAX_PAYLOAD_BYTES // self.row_bytes)
        if min(wanted, self.num_rows) > fits:
            raise PayloadTooLargeError(
                f"{wanted} rows of {self.row_bytes} bytes do not fit a message", hint=f"Use batch_size={fits} or less"
            )
        return wanted

    def batches(self, size: int) -> Iterator[Batch]:
        """Return the rows in batches, those left out that fail here, as they are asked for."""
        return _Batches(self, size)

    @abstractmethod
    def batch(self, numbers: Sequence[int]) -> Batch | None:
        """Return a batch of these rows, or None if every one of them failed."""

    def _try_each(self, numbers: Sequence[int], make: Callable[[int], Any]) -> tuple[list[int], list[Any]]:
        """Make something of each row, and note the rows for which that fails."""
        good: list[int] = []
        made: list[Any] = []
        for number in numbers:
            try:
                made.append(make(number))
                good.append(number)
            except TrunklineError as error:
                self.errors[number] = error
        return good, made


class _Batches(Iterator[Batch]):
    """The batches of a feed. ``operator.length_hint`` says how many there are at most."""

    def __init__(self, feed: Feed, size: int) -> None:
        self._feed = feed
        self._size = size
        self._start = 0

    def __next__(self) -> Batch:
        while self._start < self._feed.num_rows:
            start, self._start = self._start, self._start + self._size
            batch = self._feed.batch(range(start, min(self._start, self._feed.num_rows)))
            if batch is not None:
                return batch
        raise StopIteration

    def __length_hint__(self) -> int:
        return -(-max(0, self._feed.num_rows - self._start) // self._size)


class FeatureFeed(Feed):
    """Features at hand."""

    def __init__(self, features: Features) -> None:
        """Keep checked features."""
        super().__init__(features.space, len(features), features.row_bytes)
        self._features = features

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return a batch of these rows."""
        first, last = numbers[0], numbers[-1]
        some = self._features.take(slice(first, last + 1) if last - first + 1 == len(numbers) else numbers)
        return Batch(some, tuple(numbers), self._features.compress)


class StemFeed(Feed):
    """Features that a stem computes while earlier ones are on their way."""

    def __init__(self, rows: Sequence[Picture], stem: AnyStem) -> None:
        """Keep rows and stem."""
        super().__init__(stem.space, len(rows), stem.row_bytes)
        self._rows = rows
        self._stem = stem

    def batch(self, numbers: Sequence[int]) -> Batch | None:
        """Return a batch of these rows, those left out whose picture cannot be decoded."""
        stem = self._stem
        good, pixels = self._try_each(numbers, lambda number: self._rows[number].preprocessed(stem.preprocessing))
        if not good:
            return None
        return Batch(stem.pack(stem.run_pixels(np.stack(pixels))), tuple(good), stem.compress)


class ImageFeed(Feed):
    """Images: as files or resized and cropped, whichever is smaller. The numbers that enter the networks are equal."""

    def __init__(
        self,
        rows: Sequence[Picture],
        space: FeatureSpace,
        preprocessing: Preprocessing,
        others: Sequence[tuple[FeatureSpace, Preprocessing]] = (),
    ) -> None:
        """Keep rows and what becomes of them.

        Args:
            rows: The pictures.
            space: Of the backbone that reads them.
            preprocessing: What becomes of them there.
            others: The same for other backbones that read them too. A file travels once for all of them.
        """
        self._forms = [preprocessing, *(one for _, one in others)]
        self._others = [one for one, _ in others]
        super().__init__(space, len(rows), sum(one.input_size**2 * 3 for one in self._forms))
        self._rows = rows

    def batch(self, numbers: Sequence[int]) -> Batch | None:
        """Return a batch of these rows, those left out that cannot be read."""
        good, sizes = self._try_each(numbers, lambda number: self._rows[number].num_bytes())
        if sum(sizes) < self.row_bytes * len(good):
            good, encoded = self._try_each(good, lambda number: self._rows[number].encoded())
            more = tuple(MoreRows(space, None) for space in self._others)
            return Batch(encoded, tuple(good), more=more) if good else None
        good, pixels = self._try_each(good, self._pixels)
        if not good:
            return None
        first, *others = (np.stack(one) for one in zip(*pixels, strict=True))
        more = tuple(MoreRows(space, one) for space, one in zip(self._others, others, strict=True))
        return Batch(first, tuple(good), more=more)

    @property
    def backbone(self) -> str:
        """The one backbone that reads the pictures; empty if there are several."""
        return "" if self._others else self.space.backbone

    def _pixels(self, number: int) -> list[Any]:
        return [self._rows[number].preprocessed(one) for one in self._forms]


class LocalModelFeed(Feed):
    """Features that a local model computes while earlier ones are on their way."""

    def __init__(self, rows: LocalRows, model: LocalModel) -> None:
        """Keep rows and model. One row is computed if the model's width is not known yet."""
        width = model.find_width(rows)
        super().__init__(model.space, len(rows), quantise.row_bytes((width,), model.codec))
        self._rows = rows
        self._model = model

    def batch(self, numbers: Sequence[int]) -> Batch | None:
        """Return a batch of these rows, those left out that cannot be read, or for which the model gives no number."""
        good, contents = self._try_each(numbers, self._rows.content)
        if not good:
            return None
        features_BW = self._model.compute_contents(contents)
        kept = np.flatnonzero(np.isfinite(features_BW).all(axis=1)).tolist()
        for number in set(good) - {good[at] for at in kept}:
            self.errors[number] = not_finite(self._model.name, self._rows.name(number))
        if not kept:
            return None
        return Batch(self._model.pack(features_BW[kept]), tuple(good[at] for at in kept))


class JoinedFeed(Feed):
    """Several inputs beside each other. A row that fails in one of them fails."""

    def __init__(self, first: Feed, others: Sequence[Feed]) -> None:
        """Keep the inputs, the first one first.

        Raises:
            ShapeMismatchError: They have different numbers of rows.
        """
        for one in others:
            if one.num_rows != first.num_rows:
                raise ShapeMismatchError(
                    f"{one.num_rows} rows of {one.space.source!r} beside {first.num_rows} of "
                    f"{first.space.source or 'images'!r}",
                    hint="Give one for each row",
                )
        super().__init__(first.space, first.num_rows, first.row_bytes + sum(one.row_bytes for one in others))
        self._feeds = [first, *others]

    @property
    def backbone(self) -> str:
        """The one backbone of all the inputs; empty if there are several, or none."""
        needed = [one for one in self._feeds if not one.space.is_local]
        return needed[0].backbone if len(needed) == 1 else ""

    def batch(self, numbers: Sequence[int]) -> Batch | None:
        """Return a batch of these rows, those left out that fail in one of the inputs."""
        batches: list[Batch] = []
        good = numbers
        for feed in self._feeds:
            made = feed.batch(good)
            self.errors.update(feed.errors)
            if made is None:
                return None
            batches.append(made)
            good = made.row_numbers
        first, *others = (_only(batch, good) for batch in batches)
        more = list(first.more)
        for feed, batch in zip(self._feeds[1:], others, strict=True):
            more += [MoreRows(feed.space, batch.rows, batch.compress), *batch.more]
        return replace(first, more=tuple(more))


def _only(batch: Batch, numbers: Sequence[int]) -> Batch:
    """Return a batch of some of its rows."""
    if len(batch.row_numbers) == len(numbers):
        return batch
    wanted = set(numbers)
    kept = [at for at, number in enumerate(batch.row_numbers) if number in wanted]
    more = tuple(one if one.rows is None else replace(one, rows=_take(one.rows, kept)) for one in batch.more)
    return replace(batch, rows=_take(batch.rows, kept), row_numbers=tuple(numbers), more=more)


def _take(rows: Rows, kept: list[int]) -> Rows:
    if isinstance(rows, PackedRows):
        return rows.take(kept)
    return rows[kept] if isinstance(rows, np.ndarray) else [rows[at] for at in kept]
