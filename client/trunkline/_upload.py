"""Making a dataset: what is missing is computed and sent, then all of it gets a name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from trunkline_wire.limits import MAX_DATASET_ROWS, MAX_INPUTS

from trunkline._deadline import Deadline
from trunkline._names import check_user_name
from trunkline._row_sources import RowSource
from trunkline.datasets import Dataset, UploadReport
from trunkline.errors import (
    BadLabelsError,
    InvalidArgumentError,
    PayloadTooLargeError,
    ShapeMismatchError,
    UnsupportedError,
)
from trunkline.estimates import UploadEstimate, measured_row_bytes
from trunkline.groups import encode_groups
from trunkline.labels import Labels, MultiLabels, encode_labels, repeated
from trunkline.progress import is_seen, say, show_progress
from trunkline.records import DatasetRecord, ServerInfo

if TYPE_CHECKING:
    from trunkline._calls import Calls, Chunk


class Upload:
    """One upload: the inputs of a dataset, its labels, and what was sent."""

    def __init__(
        self,
        calls: Calls,
        info: ServerInfo,
        name: str,
        labels: Labels,
        *,
        groups_N: npt.NDArray[np.uint32] | None = None,
        views: int = 1,
    ) -> None:
        """Keep who is asked, what the dataset will be called, and how its rows belong together."""
        self._groups_N = groups_N
        self._views = views
        self._calls = calls
        self._info = info
        self._name = name
        self._labels = labels
        self._rows = self._num_bytes = self._chunks = 0

    def run(
        self, sources: Sequence[RowSource], *, deadline: Deadline, progress: bool | None, input_size: int | None = None
    ) -> Dataset:
        """Send the rows that the cluster lacks, then make the dataset of all of them.

        Args:
            sources: The inputs, the first one first.
            deadline: Over everything.
            progress: Whether to show it.
            input_size: Kept with the dataset.
        """
        started = time.monotonic()
        check_inputs(sources)
        # Local features first: a cluster that does not know them refuses before a stem has computed anything.
        for source in sorted(sources, key=lambda one: not one.space.is_local):
            what = f"{self._name}: {source.space.source or 'images'}" if len(sources) > 1 else self._name
            self._send(source, what, deadline, progress)
        record = self._commit(sources, deadline)
        num_rows = len(sources[0].row_ids)
        seconds = time.monotonic() - started
        return Dataset(record, input_size, UploadReport(num_rows, self._rows, self._num_bytes, self._chunks, seconds))

    def _send(self, source: RowSource, what: str, deadline: Deadline, progress: bool | None) -> None:
        # The same picture twice is one row, named twice.
        first_number = {row: number for number, row in reversed(list(enumerate(source.row_ids)))}
        distinct = sorted(first_number.values())
        missing = self._calls.datasets.find_missing([source.row_ids[number] for number in distinct], deadline)
        wanted = [distinct[index] for index in missing]
        if wanted and self._views > 1 and is_seen(progress):
            num_pictures = len(source.row_ids) // self._views
            num_bytes = round(measured_row_bytes(source, wanted) * len(wanted))
            say(f"{what}: {UploadEstimate(num_pictures, self._views, num_bytes)}", progress)
        with show_progress(f"Uploading {what}", len(wanted), progress) as bar:
            if not wanted:
                return
            chunks = source.chunks(wanted)
            try:
                for chunk, _ in self._calls.datasets.upload(
                    source.space, chunks, deadline=deadline, on_sent=self._count
                ):
                    bar.advance(len(chunk.row_ids))
            except InvalidArgumentError as error:
                # Everything else about local features was checked here.
                if source.space.is_local and type(error) is InvalidArgumentError and error.request_id:
                    raise self._too_old(f"local features ({error.message})") from error
                raise

    def _commit(self, sources: Sequence[RowSource], deadline: Deadline) -> DatasetRecord:
        inputs = [(one.space, one.row_ids) for one in sources]
        labels = self._labels
        try:
            record = self._calls.datasets.commit(
                self._name, inputs, labels, deadline, groups_N=self._groups_N, views=self._views
            )
        except BadLabelsError as error:
            if isinstance(labels, MultiLabels):  # they were checked here
                raise self._too_old(f"several classes a row ({error.message})") from error
            raise
        # An older cluster takes no notice of what it does not know, and would train without it.
        if tuple(one.space for one in record.inputs) != tuple(one.space for one in sources):
            raise self._too_old(f"several inputs: it made {record.reference} of the first one alone")
        if self._groups_N is not None and not record.num_groups:
            raise self._too_old(f"groups: it made {record.reference} without them")
        if record.views != self._views:
            raise self._too_old(f"views of pictures: it made {record.reference} of all as if they were pictures")
        if isinstance(labels, MultiLabels) and (record.class_names, record.num_targets) != (
            labels.names,
            len(labels.names),
        ):
            raise self._too_old(f"several classes a row: it made {record.reference} without them")
        return record

    def _count(self, chunk: Chunk, num_bytes: int) -> None:
        self._rows += len(chunk.row_ids)
        self._num_bytes += num_bytes
        self._chunks += 1

    def _too_old(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"the cluster (version {self._info.version}) does not know {what}", hint="Update the cluster"
        )


def check_upload(
    name: str, labels: Any, num_rows: int, *, groups: Any = None, views: int = 1
) -> tuple[Labels, npt.NDArray[np.uint32] | None]:
    """Check what can be checked before anything is computed or sent.

    Args:
        name: Of the dataset.
        labels: One for each picture.
        num_rows: How many there are, every view of a picture being one.
        groups: One for each picture, or None.
        views: Of each picture.

    Returns:
        Labels and groups of each row.

    Raises:
        TrunklineError: Of the class that says what is wrong.
    """
    check_user_name(name, "dataset")
    if num_rows > MAX_DATASET_ROWS:
        raise PayloadTooLargeError(
            f"{num_rows} rows in one dataset; at most {MAX_DATASET_ROWS} are accepted", hint="Make several datasets"
        )
    groups_P = encode_groups(groups, num_rows // views)
    checked = repeated(encode_labels(labels, num_rows // views), views)
    return checked, None if groups_P is None else groups_P.repeat(views)


def check_inputs(sources: Sequence[RowSource]) -> None:
    """Check that inputs can stand beside each other.

    Raises:
        InvalidArgumentError: Two are of one backbone or local model, or there are too many.
        ShapeMismatchError: They have different numbers of rows.
    """
    if len(sources) > MAX_INPUTS:
        raise InvalidArgumentError(f"{len(sources)} inputs; a dataset has at most {MAX_INPUTS}")
    names = [one.space.source for one in sources]
    twice = next((one for one in names if names.count(one) > 1), None)
    if twice is not None:
        raise InvalidArgumentError(
            f"{twice!r} is there twice; a dataset has one input of each backbone and each local model",
            hint="Give another name to one of them, or leave it out",
        )
    num_rows = len(sources[0].row_ids)
    for one in sources:
        if len(one.row_ids) != num_rows:
            raise ShapeMismatchError(
                f"{len(one.row_ids)} rows of {one.space.source!r}; {num_rows} are needed, one for each label"
            )
