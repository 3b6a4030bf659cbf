"""Rows in, answers out: batches made as they are needed, several in flight, failures kept to their rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from trunkline_wire.limits import MAX_BATCH_ROWS, MAX_PAYLOAD_BYTES
from trunkline_wire.specs import CodecUse, FeatureSpace, Preprocessing, SliceSpec, Timings

from trunkline._calls import Batch, RawEmbedding, RawPrediction, Rows
from trunkline._features import Features, rows_per_chunk
from trunkline.errors import InternalError, InvalidArgumentError, PayloadTooLargeError, TrunklineError

if TYPE_CHECKING:
    from trunkline.images import Picture
    from trunkline.stems import Stem

# Shape suffix legend: N, B = rows, H = height, W = width, C = channels, K = outputs, D = embedding width

DEFAULT_BATCH_ROWS = 64
"""Most rows in a batch unless told otherwise."""

DEFAULT_IN_FLIGHT = 4
"""Batches in flight unless told otherwise."""

Answer = TypeVar("Answer", RawPrediction, RawEmbedding)


class Feed(ABC):
    """Rows on their way to the cluster. Rows that fail here are in ``errors``."""

    def __init__(self, space: FeatureSpace, num_rows: int, num_bytes: int) -> None:
        """Keep where the rows live, their number, and the size of one in bytes."""
        self.space = space
        self.num_rows = num_rows
        self.errors: dict[int, TrunklineError] = {}
        self._row_bytes = num_bytes

    def batch_rows(self, wanted: int | None) -> int:
        """Return how many rows travel together.

        Raises:
            PayloadTooLargeError: That many do not fit a message.
            InvalidArgumentError: It is not a number of rows.
        """
        most = rows_per_chunk(self._row_bytes)
        if wanted is None:
            return min(most, DEFAULT_BATCH_ROWS)
        if wanted < 1:
            raise InvalidArgumentError(f"batch_size is {wanted}; expected 1 or more")
        fits = min(MAX_BATCH_ROWS, MAX_PAYLOAD_BYTES // self._row_bytes)
        if min(wanted, self.num_rows) > fits:
            raise PayloadTooLargeError(
                f"{wanted} rows of {self._row_bytes} bytes do not fit a message", hint=f"Use batch_size={fits} or less"
            )
        return wanted

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield the rows in batches, those left out that fail here."""
        for start in range(0, self.num_rows, size):
            numbers = range(start, min(start + size, self.num_rows))
            batch = self._batch(numbers)
            if batch is not None:
                yield batch

    @abstractmethod
    def _batch(self, numbers: Sequence[int]) -> Batch | None:
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


class FeatureFeed(Feed):
    """Features at hand."""

    def __init__(self, features: Features) -> None:
        """Keep checked features."""
        super().__init__(features.space, len(features), features.row_bytes)
        self._features = features

    def _batch(self, numbers: Sequence[int]) -> Batch:
        some = self._features.take(slice(numbers[0], numbers[-1] + 1))
        return Batch(some, tuple(numbers), self._features.compress)


class StemFeed(Feed):
    """Features that a stem computes while earlier ones are on their way."""

    def __init__(self, rows: Sequence[Picture], stem: Stem) -> None:
        """Keep rows and stem."""
        super().__init__(stem.space, len(rows), stem.row_bytes)
        self._rows = rows
        self._stem = stem

    def _batch(self, numbers: Sequence[int]) -> Batch | None:
        stem = self._stem
        good, pixels = self._try_each(numbers, lambda number: self._rows[number].preprocessed(stem.preprocessing))
        if not good:
            return None
        return Batch(stem.pack(stem.run_pixels(np.stack(pixels))), tuple(good), stem.compress)


class ImageFeed(Feed):
    """Images: as files or resized and cropped, whichever is smaller. The numbers that enter the network are equal."""

    def __init__(self, rows: Sequence[Picture], space: FeatureSpace, preprocessing: Preprocessing) -> None:
        """Keep rows and what becomes of them."""
        super().__init__(space, len(rows), preprocessing.input_size**2 * 3)
        self._rows = rows
        self._preprocessing = preprocessing

    def _batch(self, numbers: Sequence[int]) -> Batch | None:
        good, sizes = self._try_each(numbers, lambda number: self._rows[number].num_bytes())
        rows: Rows
        if sum(sizes) < self._row_bytes * len(good):
            good, encoded = self._try_each(good, lambda number: self._rows[number].encoded())
            rows = encoded
        else:
            good, pixels = self._try_each(good, lambda number: self._rows[number].preprocessed(self._preprocessing))
            rows = np.stack(pixels) if good else []
        return Batch(rows, tuple(good)) if good else None


@dataclass
class Collected:
    """Answers put together.

    ``matrix_NX`` is NaN in rows that failed. ``codec_use`` is that of the batch with the largest error: pictures may
    travel in one form or another.
    """

    matrix_NX: npt.NDArray[np.float32]
    errors: dict[int, TrunklineError]
    model: str = ""
    labels: list[str | None] = field(default_factory=list)
    slices: tuple[SliceSpec, ...] = ()
    timings: Timings = field(default_factory=Timings)
    codec_use: CodecUse = field(default_factory=CodecUse)


class Collector(Generic[Answer]):
    """Puts the answers of batches together, in whatever order they come."""

    def __init__(self, feed: Feed) -> None:
        """Keep the feed, which knows the rows that failed before they were sent."""
        self._feed = feed
        self._answers: list[tuple[Batch, Answer]] = []
        self._errors: dict[int, TrunklineError] = {}

    def take(self, batch: Batch, answer: Answer | TrunklineError) -> None:
        """Take the answer to one batch. An error of the batch is one of each of its rows."""
        if isinstance(answer, TrunklineError):
            self._errors.update(dict.fromkeys(batch.row_numbers, answer))
            return
        rows = len(_matrix(answer))
        if rows != len(batch.row_numbers):
            raise InternalError(f"the cluster answered {rows} rows; {len(batch.row_numbers)} were sent")
        for row, error in answer.row_errors.items():
            if row < len(batch.row_numbers):
                self._errors[batch.row_numbers[row]] = error
        self._answers.append((batch, answer))

    def collect(self) -> Collected:
        """Return everything.

        Raises:
            TrunklineError: Every row failed: the first row's error.
        """
        num_rows = self._feed.num_rows
        errors = {**self._feed.errors, **self._errors}
        if len(errors) >= num_rows or not self._answers:
            raise errors[min(errors)] if errors else InternalError("the cluster answered nothing")
        width = _matrix(self._answers[0][1]).shape[1]
        result = Collected(np.full((num_rows, width), np.nan, dtype=np.float32), errors, labels=[None] * num_rows)
        for batch, answer in self._answers:
            matrix = _matrix(answer)
            if matrix.shape[1] != width:
                raise InternalError(f"one batch has {matrix.shape[1]} columns and another {width}")
            numbers = list(batch.row_numbers)
            result.matrix_NX[numbers] = matrix
            result.timings = _sum(result.timings, answer.timings)
            if not result.codec_use.codec or answer.codec_use.embedding_error > result.codec_use.embedding_error:
                result.codec_use = answer.codec_use
            if isinstance(answer, RawPrediction):
                result.model = answer.model
                for number, label in zip(numbers, answer.labels, strict=False):
                    result.labels[number] = label or None
            else:
                result.slices = answer.slices
        for number in errors:
            result.matrix_NX[number] = np.nan
            result.labels[number] = None
        return result


def _matrix(answer: RawPrediction | RawEmbedding) -> npt.NDArray[np.float32]:
    return answer.outputs_BK if isinstance(answer, RawPrediction) else answer.embedding_BD


def _sum(one: Timings, other: Timings) -> Timings:
    return Timings(
        one.queue_s + other.queue_s,
        one.decode_s + other.decode_s,
        one.trunk_s + other.trunk_s,
        one.head_s + other.head_s,
        one.total_s + other.total_s,
    )


def run(
    feed: Feed,
    *,
    batch_size: int | None,
    max_in_flight: int,
    one: Callable[[Batch], Answer],
    many: Callable[[Iterator[Batch], int], Iterator[tuple[Batch, Answer | TrunklineError]]],
    on_rows: Callable[[int], None] = lambda num_rows: None,
) -> Collected:
    """Send everything and put the answers together.

    Args:
        feed: The rows.
        batch_size: Rows in a batch; None chooses.
        max_in_flight: Most batches without an answer.
        one: Makes the call for a single batch: no stream is needed then.
        many: Makes the calls for many.
        on_rows: Told the number of rows of each answer.
    """
    if max_in_flight < 1:
        raise InvalidArgumentError(f"max_in_flight is {max_in_flight}; expected 1 or more")
    size = feed.batch_rows(batch_size)
    collector: Collector[Answer] = Collector(feed)
    if feed.num_rows <= size:
        for batch in feed.batches(size):
            collector.take(batch, one(batch))
    else:
        for batch, answer in many(feed.batches(size), max_in_flight):
            collector.take(batch, answer)
            on_rows(len(batch.row_numbers))
    return collector.collect()
