"""Making a dataset: what is missing is computed and sent, then all of it gets a name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
from trunkline.labels import Labels, MultiLabels, encode_labels
from trunkline.progress import show_progress
from trunkline.records import DatasetRecord, ServerInfo

if TYPE_CHECKING:
    from trunkline._calls import Calls, Chunk


class Upload:
    """One upload: the inputs of a dataset, its labels, and what was sent."""

    def __init__(self, calls: Calls, info: ServerInfo, name: str, labels: Labels) -> None:
        """Keep who is asked, and what the dataset will be called."""
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
            record = self._calls.datasets.commit(self._name, inputs, labels, deadline)
        except BadLabelsError as error:
            if isinstance(labels, MultiLabels):  # they were checked here
                raise self._too_old(f"several classes a row ({error.message})") from error
            raise
        # An older cluster takes no notice of what it does not know, and would train without it.
        if tuple(one.space for one in record.inputs) != tuple(one.space for one in sources):
            raise self._too_old(f"several inputs: it made {record.reference} of the first one alone")
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


def check_upload(name: str, labels: Any, num_rows: int) -> Labels:
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
