"""Rows to be uploaded: their ids at once, their content when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from trunkline_wire import quantise
from trunkline_wire.limits import CHUNK_BYTES, MAX_BATCH_ROWS
from trunkline_wire.rows import row_id
from trunkline_wire.specs import IMAGES, FeatureSpace

from trunkline._calls import Chunk
from trunkline._features import Features, rows_per_chunk
from trunkline.stems import RUN_ROWS, AnyStem

if TYPE_CHECKING:
    from trunkline._calls import Rows
    from trunkline._local_rows import LocalRows
    from trunkline.images import Picture
    from trunkline.local_models import LocalModel


class RowSource:
    """Rows to be uploaded: their ids at once, their content when it is asked for."""

    def __init__(self, space: FeatureSpace, row_ids: Sequence[bytes], *, compress: bool = False) -> None:
        """Keep where the rows live, what they are called, and whether zstd is applied on the way."""
        self.space = space
        self.row_ids = row_ids
        self._compress = compress

    def chunks(self, wanted: Sequence[int]) -> Iterator[Chunk]:
        """Yield the wanted rows in chunks of about ``CHUNK_BYTES``."""
        raise NotImplementedError

    def _chunk(self, numbers: Sequence[int], rows: Rows) -> Chunk:
        return Chunk(tuple(self.row_ids[number] for number in numbers), rows, self._compress)


class ImageRows(RowSource):
    """The images themselves: files as they are, everything else as PNG."""

    def __init__(self, rows: Sequence[Picture]) -> None:
        """Compute the ids."""
        super().__init__(IMAGES, [row_id(IMAGES, quantise.IMAGES, row.digest()) for row in rows])
        self._rows = rows

    def chunks(self, wanted: Sequence[int]) -> Iterator[Chunk]:
        """Yield encoded images. One that cannot be decoded is found here, not while training."""
        numbers: list[int] = []
        data: list[bytes] = []
        size = 0
        for number in wanted:
            self._rows[number].decoded()
            encoded = self._rows[number].encoded()
            if numbers and (size + len(encoded) > CHUNK_BYTES or len(numbers) == MAX_BATCH_ROWS):
                yield self._chunk(numbers, data)
                numbers, data, size = [], [], 0
            numbers.append(number)
            data.append(encoded)
            size += len(encoded)
        if numbers:
            yield self._chunk(numbers, data)


class StemRows(RowSource):
    """Features that a stem computes from images, only for the rows that are wanted."""

    def __init__(self, rows: Sequence[Picture], stem: AnyStem) -> None:
        """Compute the ids from the images: no feature is needed for that."""
        row_ids = [row_id(stem.space, stem.row_codec, row.digest()) for row in rows]
        super().__init__(stem.space, row_ids, compress=stem.compress)
        self._rows = rows
        self._stem = stem

    def chunks(self, wanted: Sequence[int]) -> Iterator[Chunk]:
        """Yield features in the stem's codec."""
        stem = self._stem
        size = rows_per_chunk(stem.row_bytes)
        for start in range(0, len(wanted), size):
            numbers = wanted[start : start + size]
            parts = [
                stem.run([self._rows[number] for number in numbers[first : first + RUN_ROWS]])
                for first in range(0, len(numbers), RUN_ROWS)
            ]
            yield self._chunk(numbers, stem.pack(np.concatenate(parts)))


class FeatureRows(RowSource):
    """Features at hand."""

    def __init__(self, features: Features) -> None:
        """Compute the ids from what is at hand: in whichever codec it travels, nothing is packed for that."""
        super().__init__(features.space, features.row_ids(), compress=features.compress)
        self._features = features

    def chunks(self, wanted: Sequence[int]) -> Iterator[Chunk]:
        """Yield some of the features."""
        size = rows_per_chunk(self._features.row_bytes)
        for start in range(0, len(wanted), size):
            numbers = wanted[start : start + size]
            yield self._chunk(numbers, self._features.take(numbers))


class LocalModelRows(RowSource):
    """Features that a local model computes, only for the rows that are wanted."""

    def __init__(self, rows: LocalRows, model: LocalModel) -> None:
        """Compute the ids from what goes in. One row is computed if the model's width is not known yet."""
        width = model.find_width(rows)
        super().__init__(model.space, [row_id(model.space, model.codec, rows.digest(n)) for n in range(len(rows))])
        self._rows = rows
        self._model = model
        self._row_bytes = quantise.row_bytes((width,), model.codec)

    def chunks(self, wanted: Sequence[int]) -> Iterator[Chunk]:
        """Yield features in the model's codec."""
        model = self._model
        size = rows_per_chunk(self._row_bytes)
        for start in range(0, len(wanted), size):
            numbers = wanted[start : start + size]
            yield self._chunk(numbers, model.pack(model.compute(self._rows, numbers)))
