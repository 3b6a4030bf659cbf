"""Datasets: rows on the cluster, addressed by content, with labels."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from trunkline_wire import quantise
from trunkline_wire.errors import WireError
from trunkline_wire.limits import CHUNK_BYTES, MAX_BATCH_ROWS, MAX_DATASET_ROWS
from trunkline_wire.names import check_name
from trunkline_wire.rows import row_id
from trunkline_wire.specs import IMAGES, FeatureSpace

from trunkline import _html
from trunkline._deadline import Deadline
from trunkline._features import Features, rows_per_chunk
from trunkline.errors import PayloadTooLargeError, from_wire
from trunkline.labels import ClassLabels, Targets, encode_labels
from trunkline.progress import show_progress
from trunkline.records import DatasetRecord
from trunkline.stems import RUN_ROWS, Stem

if TYPE_CHECKING:
    from trunkline._calls import Calls, Chunk, Rows
    from trunkline.images import Picture

BASE_TIMEOUT_S = 60.0
"""Deadline of an operation on many rows that states none: this much ..."""

ROW_TIMEOUT_S = 0.25
"""... and this much a row."""


def rows_deadline(timeout_s: float | None, num_rows: int) -> Deadline:
    """Return the deadline of an operation on many rows."""
    return Deadline(BASE_TIMEOUT_S + ROW_TIMEOUT_S * num_rows if timeout_s is None else timeout_s)


@dataclass(frozen=True)
class UploadReport:
    """What an upload cost.

    Attributes:
        num_rows: Rows of the dataset.
        rows_sent: Rows put on the wire, repetitions after a broken connection included.
        feature_bytes_sent: Bytes of these rows on the wire: values, scales and offsets, after zstd where it was asked
            for. 0 if the cluster had everything.
        chunks_sent: In how many chunks.
        seconds: Wall time.
    """

    num_rows: int
    rows_sent: int
    feature_bytes_sent: int
    chunks_sent: int
    seconds: float


@dataclass(frozen=True)
class Dataset:
    """A version of a dataset on the cluster. Never changes.

    Attributes:
        record: Everything that the cluster keeps about it.
        input_size: What ``Client.train`` takes as the input size if it is given none. None: the backbone's own.
        report: What the upload cost. None if it was looked up.
    """

    record: DatasetRecord
    input_size: int | None = None
    report: UploadReport | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Its name."""
        return self.record.name

    @property
    def version(self) -> int:
        """Its version, from 1."""
        return self.record.version

    @property
    def reference(self) -> str:
        """``name@version``."""
        return self.record.reference

    @property
    def num_rows(self) -> int:
        """How many rows it has."""
        return self.record.num_rows

    @property
    def digest(self) -> str:
        """Hash of its content: equal content, equal digest."""
        return self.record.digest

    @property
    def space(self) -> FeatureSpace:
        """Where its rows live."""
        return self.record.space

    @property
    def class_names(self) -> tuple[str, ...]:
        """Its classes, empty if its labels are numbers."""
        return self.record.class_names

    @property
    def codec(self) -> str:
        """How its rows were made and sent: ``float16``, ``images`` ... A quantised stem shows as ``int8@int8``."""
        return self.record.codec

    @property
    def create_time(self) -> datetime | None:
        """When it was made."""
        return self.record.create_time

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        record = self.record
        return {
            "name": record.name,
            "version": record.version,
            "num_rows": record.num_rows,
            "digest": record.digest,
            "backbone": record.space.backbone,
            "cut": record.space.cut,
            "input_size": record.space.input_size,
            "codec": record.codec,
            "class_names": list(record.class_names),
            "num_targets": record.num_targets,
            "create_time": record.create_time.isoformat() if record.create_time else None,
            **({} if self.report is None else {"upload": vars(self.report)}),
        }

    def __repr__(self) -> str:
        """Return reference, rows and where they live."""
        where = "images" if self.space.is_input else f"features of {self.space.backbone} at {self.space.cut}"
        return f"Dataset({self.reference!r}, {self.num_rows} rows of {where})"

    def _repr_html_(self) -> str:
        labels = f"{len(self.class_names)} classes" if self.class_names else f"{self.record.num_targets} numbers"
        sent = None if self.report is None else f"{self.report.feature_bytes_sent / 1e6:.1f} MB sent"
        return _html.facts(
            f"Dataset {self.reference}",
            [
                ("rows", self.num_rows),
                ("labels", labels),
                ("cut", self.space.cut),
                ("backbone", self.space.backbone),
                ("codec", self.codec),
                ("digest", self.digest[:16]),
                ("upload", sent),
            ],
        )


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
        from trunkline._calls import Chunk

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

    def __init__(self, rows: Sequence[Picture], stem: Stem) -> None:
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


def upload_rows(
    calls: Calls,
    source: RowSource,
    labels: ClassLabels | Targets,
    name: str,
    *,
    deadline: Deadline,
    progress: bool | None,
) -> tuple[DatasetRecord, UploadReport]:
    """Send the rows that the cluster lacks, then make the dataset of all of them."""
    started = time.monotonic()
    # The same picture twice is one row, named twice.
    first_number = {row: number for number, row in reversed(list(enumerate(source.row_ids)))}
    distinct = sorted(first_number.values())
    missing = calls.datasets.find_missing([source.row_ids[number] for number in distinct], deadline)
    wanted = [distinct[index] for index in missing]
    sent = _Sent()
    with show_progress(f"Uploading {name}", len(wanted), progress) as bar:
        if wanted:
            chunks = source.chunks(wanted)
            for chunk, _ in calls.datasets.upload(source.space, chunks, deadline=deadline, on_sent=sent.add):
                bar.advance(len(chunk.row_ids))
    record = calls.datasets.commit(
        name,
        source.space,
        source.row_ids,
        labels.names if isinstance(labels, ClassLabels) else (),
        labels.indices_N if isinstance(labels, ClassLabels) else None,
        labels.values_NM if isinstance(labels, Targets) else None,
        deadline,
    )
    seconds = time.monotonic() - started
    return record, UploadReport(len(source.row_ids), sent.rows, sent.num_bytes, sent.chunks, seconds)


class _Sent:
    """Counts what goes on the wire."""

    def __init__(self) -> None:
        self.rows = self.num_bytes = self.chunks = 0

    def add(self, chunk: Chunk, num_bytes: int) -> None:
        self.rows += len(chunk.row_ids)
        self.num_bytes += num_bytes
        self.chunks += 1


def check_upload(name: str, labels: Any, num_rows: int) -> ClassLabels | Targets:
    """Check what can be checked before anything is computed or sent.

    Raises:
        TrunklineError: Of the class that says what is wrong.
    """
    check_user_name(name, "dataset")
    if num_rows > MAX_DATASET_ROWS:
        raise PayloadTooLargeError(
            f"{num_rows} rows in one dataset; at most {MAX_DATASET_ROWS} are accepted", hint="Make several datasets"
        )
    return encode_labels(labels, num_rows)


def check_user_name(name: str, what: str) -> str:
    """Return a name if the wire allows it.

    Raises:
        InvalidArgumentError: It does not.
    """
    try:
        return check_name(name, what)
    except WireError as error:
        raise from_wire(error) from None
