"""Rows in, answers out: several batches in flight, their answers put together, failures kept to their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from trunkline_wire.specs import CodecUse, SliceSpec, Timings

from trunkline._calls import Batch, RawEmbedding, RawPrediction
from trunkline._feeds import Feed
from trunkline.errors import InternalError, InvalidArgumentError, TrunklineError

# Shape suffix legend: N, B = rows, K = outputs, D = embedding width, X = outputs or embedding width

DEFAULT_IN_FLIGHT = 4
"""Batches in flight unless told otherwise."""

Answer = TypeVar("Answer", RawPrediction, RawEmbedding)


@dataclass
class Collected:
    """Answers put together.

    ``matrix_NX`` is NaN in rows that failed, and so is ``outliers_N2``, None unless asked for. ``codec_use`` is that of
    the batch with the largest error: pictures may travel in one form or another.
    """

    matrix_NX: npt.NDArray[np.float32]
    errors: dict[int, TrunklineError]
    model: str = ""
    labels: list[str | None] = field(default_factory=list)
    slices: tuple[SliceSpec, ...] = ()
    timings: Timings = field(default_factory=Timings)
    codec_use: CodecUse = field(default_factory=CodecUse)
    outliers_N2: npt.NDArray[np.float32] | None = None


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
        if len(self._answers) == 1 and not errors:
            return self._whole(self._answers[0][1])
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
                if answer.outliers_B2 is not None:
                    if result.outliers_N2 is None:
                        result.outliers_N2 = np.full((num_rows, 2), np.nan, dtype=np.float32)
                    result.outliers_N2[numbers] = answer.outliers_B2
                for number, label in zip(numbers, answer.labels, strict=False):
                    result.labels[number] = label or None
            else:
                result.slices = answer.slices
        for number in errors:
            result.matrix_NX[number] = np.nan
            if result.outliers_N2 is not None:
                result.outliers_N2[number] = np.nan
            result.labels[number] = None
        return result

    def _whole(self, answer: Answer) -> Collected:
        """Return the only answer, whose rows are all there are, in their order. Nothing is copied."""
        found = Collected(_matrix(answer), {}, timings=answer.timings, codec_use=answer.codec_use)
        if isinstance(answer, RawPrediction):
            found.model = answer.model
            found.outliers_N2 = answer.outliers_B2
            found.labels = [one or None for one in answer.labels] or [None] * self._feed.num_rows
        else:
            found.labels = [None] * self._feed.num_rows
            found.slices = answer.slices
        return found


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


def several(feed: Feed, batch_size: int | None, progress: bool | None) -> bool | None:
    """Return whether to show progress: as wanted for several batches, never for a single one, which has none."""
    return progress if feed.num_rows > feed.batch_rows(batch_size) else False


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
