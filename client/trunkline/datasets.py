"""Datasets: rows on the cluster, addressed by content, with labels."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from trunkline_wire.codecs import check_finite
from trunkline_wire.errors import WireError
from trunkline_wire.limits import CHUNK_BYTES, MAX_BATCH_ROWS, MAX_DATASET_ROWS, MAX_PAYLOAD_BYTES
from trunkline_wire.names import check_name
from trunkline_wire.rows import content_digest, row_id
from trunkline_wire.specs import IMAGES, FeatureSpace

from trunkline import _html
from trunkline._deadline import Deadline
from trunkline.errors import (
    DtypeMismatchError,
    EmptyBatchError,
    PayloadTooLargeError,
    ShapeMismatchError,
    from_wire,
)
from trunkline.labels import ClassLabels, Targets, encode_labels
from trunkline.progress import show_progress
from trunkline.records import DatasetRecord
from trunkline.stems import RUN_ROWS, STEM_DTYPES, Stem

if TYPE_CHECKING:
    from trunkline._calls import Calls, Chunk
    from trunkline.images import Picture

# Shape suffix legend: N = rows

IMAGES_CODEC = "images"
"""Codec name in the row ids of images."""

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
        feature_bytes_sent: Bytes of these rows. 0 if the cluster had everything.
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
                ("digest", self.digest[:16]),
                ("upload", sent),
            ],
        )


class RowSource:
    """Rows to be uploaded: their ids at once, their content when it is asked for."""

    def __init__(self, space: FeatureSpace, row_ids: Sequence[bytes]) -> None:
        """Keep where the rows live and what they are called."""
        self.space = space
        self.row_ids = row_ids

    def chunks(self, wanted: Sequence[int]) -> Iterator[Chunk]:
        """Yield the wanted rows in chunks of about ``CHUNK_BYTES``."""
        raise NotImplementedError

    def _chunk(self, numbers: Sequence[int], rows: npt.NDArray[np.generic] | Sequence[bytes]) -> Chunk:
        from trunkline._calls import Chunk

        return Chunk(tuple(self.row_ids[number] for number in numbers), rows)


class ImageRows(RowSource):
    """The images themselves: files as they are, everything else as PNG."""

    def __init__(self, rows: Sequence[Picture]) -> None:
        """Compute the ids."""
        super().__init__(IMAGES, [row_id(IMAGES, IMAGES_CODEC, row.digest()) for row in rows])
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
        super().__init__(stem.space, [row_id(stem.space, stem.dtype, row.digest()) for row in rows])
        self._rows = rows
        self._stem = stem

    def chunks(self, wanted: Sequence[int]) -> Iterator[Chunk]:
        """Yield features."""
        stem = self._stem
        size = rows_per_chunk(row_bytes(stem.feature_shape, stem.dtype))
        for start in range(0, len(wanted), size):
            numbers = wanted[start : start + size]
            parts = [
                stem.run([self._rows[number] for number in numbers[first : first + RUN_ROWS]])
                for first in range(0, len(numbers), RUN_ROWS)
            ]
            yield self._chunk(numbers, np.concatenate(parts))


class FeatureRows(RowSource):
    """Features at hand."""

    def __init__(self, features: npt.NDArray[np.generic], space: FeatureSpace, feature_shape: tuple[int, ...]) -> None:
        """Check the features and compute the ids from them."""
        checked = check_features(features, feature_shape, space)
        codec = checked.dtype.name
        super().__init__(space, [row_id(space, codec, content_digest(row)) for row in checked])
        self._features = checked

    def chunks(self, wanted: Sequence[int]) -> Iterator[Chunk]:
        """Yield slices of the features."""
        size = rows_per_chunk(self._features[0].nbytes)
        for start in range(0, len(wanted), size):
            numbers = wanted[start : start + size]
            yield self._chunk(numbers, self._features[list(numbers)])


def check_features(features: Any, feature_shape: tuple[int, ...], space: FeatureSpace) -> npt.NDArray[np.generic]:
    """Return features as an array that can be sent: float16 as it is, other floats as float32.

    At the cut ``input`` the features are pictures after preprocessing, uint8.

    Raises:
        EmptyBatchError, DtypeMismatchError, ShapeMismatchError, NotFiniteError, PayloadTooLargeError: They are not.
    """
    array: npt.NDArray[np.generic] = np.asarray(features)
    if array.ndim == 0 or array.shape[0] == 0:
        raise EmptyBatchError("there are no features", hint="Give at least one row")
    if space.is_input and array.dtype != np.uint8:
        raise DtypeMismatchError(
            f"preprocessed pictures must be uint8; got {array.dtype}",
            hint="Scale and convert: (x * 255).astype('uint8')",
        )
    if not space.is_input and array.dtype.kind != "f":
        raise DtypeMismatchError(
            f"features must be {' or '.join(STEM_DTYPES)}; got {array.dtype}", hint="Use features.astype('float32')"
        )
    if array.shape[1:] != feature_shape:
        raise ShapeMismatchError(
            f"a row of features must be {feature_shape}; got {array.shape[1:]}",
            hint="Use the stem of that cut and input size",
        )
    if array.dtype.kind == "f" and array.dtype.name not in STEM_DTYPES:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    rows_per_chunk(array[0].nbytes)
    if space.is_input:
        return array
    try:
        check_finite(array)
    except WireError as error:
        raise from_wire(error, hint="Leave these rows out") from None
    return array


def row_bytes(feature_shape: tuple[int, ...], dtype: str) -> int:
    """Return the size of one row of features, in bytes."""
    return int(np.prod(feature_shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def rows_per_chunk(num_bytes: int) -> int:
    """Return how many rows of that size travel together.

    Raises:
        PayloadTooLargeError: Not even one fits a message.
    """
    if num_bytes > MAX_PAYLOAD_BYTES:
        raise PayloadTooLargeError(
            f"one row has {num_bytes} bytes; at most {MAX_PAYLOAD_BYTES} fit a message",
            hint="Choose a later cut, a smaller input_size or float16",
        )
    return max(1, min(MAX_BATCH_ROWS, CHUNK_BYTES // max(1, num_bytes)))


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

    def add(self, chunk: Chunk) -> None:
        self.rows += len(chunk.row_ids)
        self.num_bytes += chunk.num_bytes
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
