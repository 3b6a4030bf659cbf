"""What an upload would send, measured on a few rows before any is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trunkline_wire.codecs import encoded_size

from trunkline._calls.inference import rows_to_tensor

if TYPE_CHECKING:
    from trunkline._row_sources import RowSource

SAMPLE_ROWS = 16
"""Rows of each input that are made to measure them."""


@dataclass(frozen=True)
class UploadEstimate:
    """What an upload would send if the cluster had nothing of it.

    Attributes:
        num_pictures: Pictures, or rows where these are no pictures.
        views: Of each picture, itself included.
        num_bytes: About so many, of all inputs.
    """

    num_pictures: int
    views: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows of the dataset."""
        return self.num_pictures * self.views

    def __str__(self) -> str:
        """Say it in a line."""
        rows = f"{self.num_rows:,} rows"
        if self.views > 1:
            rows = f"{self.views} views of {self.num_pictures:,} pictures: {rows}"
        return f"{rows}, about {size_text(self.num_bytes)} to send"


def measured_row_bytes(source: RowSource, wanted: Sequence[int]) -> float:
    """Return the mean bytes of some rows on the wire, as a few of them need, evenly spread.

    Args:
        source: Makes them.
        wanted: Their numbers, one at least.
    """
    count = min(SAMPLE_ROWS, len(wanted))
    # A step aside with each, so that pictures with as many views as lie between two of them are not measured alone.
    chosen = sorted({wanted[(index * len(wanted) // count + index) % len(wanted)] for index in range(count)})
    chunks = list(source.chunks(chosen))
    total = sum(encoded_size(rows_to_tensor(one.rows, one.compress)) for one in chunks)
    return total / sum(len(one.row_ids) for one in chunks)


def size_text(num_bytes: float) -> str:
    """Return a size as people read it."""
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:,.1f} KB"
