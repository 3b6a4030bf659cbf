"""Datasets: rows on the cluster, addressed by content, with labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from trunkline_wire.heads import CLASSIFICATION, MULTI_LABEL, REGRESSION
from trunkline_wire.specs import FeatureSpace

from trunkline import _html
from trunkline.records import DatasetRecord, DatasetSource


@dataclass(frozen=True)
class UploadReport:
    """What an upload cost.

    Attributes:
        num_rows: Rows of the dataset, every view of a picture being one.
        rows_sent: Rows put on the wire, those of every input and repetitions after a broken connection included.
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
        """How many rows it has. Every view of a picture is one."""
        return self.record.num_rows

    @property
    def views(self) -> int:
        """How many rows are views of one picture: the picture itself, then changed ones to train on. 1: none are."""
        return self.record.views

    @property
    def num_groups(self) -> int:
        """How many groups its rows are in, which training never splits. 0: they are not grouped."""
        return self.record.num_groups

    @property
    def digest(self) -> str:
        """Hash of its content: equal content, equal digest."""
        return self.record.digest

    @property
    def space(self) -> FeatureSpace:
        """Where its rows live."""
        return self.record.space

    @property
    def inputs(self) -> tuple[DatasetSource, ...]:
        """Where the rows of all of its inputs live, the first included, and how they were made and sent."""
        return self.record.inputs

    @property
    def class_names(self) -> tuple[str, ...]:
        """Its classes, empty if its labels are numbers."""
        return self.record.class_names

    @property
    def task(self) -> str:
        """What its labels are for: ``classification``, ``multi_label`` or ``regression``."""
        if not self.record.class_names:
            return REGRESSION
        return MULTI_LABEL if self.record.num_targets else CLASSIFICATION

    @property
    def labels_summary(self) -> str:
        """Its labels in a few words: ``10 classes``."""
        if self.task == REGRESSION:
            return f"{self.record.num_targets} numbers"
        return f"{len(self.class_names)} classes" + (", any number a row" if self.task == MULTI_LABEL else "")

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
            "num_groups": record.num_groups,
            "views": record.views,
            "digest": record.digest,
            "backbone": record.space.backbone,
            "cut": record.space.cut,
            "input_size": record.space.input_size,
            "codec": record.codec,
            "more_inputs": [source_to_dict(one) for one in record.more_inputs],
            "local_model": record.space.local_model,
            "task": self.task,
            "class_names": list(record.class_names),
            "num_targets": record.num_targets,
            "create_time": record.create_time.isoformat() if record.create_time else None,
            **({} if self.report is None else {"upload": vars(self.report)}),
        }

    def __repr__(self) -> str:
        """Return reference, rows and where they live."""
        where = " and ".join(describe_space(one.space) for one in self.inputs)
        return f"Dataset({self.reference!r}, {self.num_rows} rows of {where})"

    def _repr_html_(self) -> str:
        sent = None if self.report is None else f"{self.report.feature_bytes_sent / 1e6:.1f} MB sent"
        return _html.facts(
            f"Dataset {self.reference}",
            [
                ("rows", rows_summary(self)),
                ("labels", self.labels_summary),
                *(("input" if number == 0 else "and", describe_source(one)) for number, one in enumerate(self.inputs)),
                ("digest", self.digest[:16]),
                ("upload", sent),
            ],
        )


def rows_summary(data: Dataset) -> str:
    """Return how many rows there are, what they are views of, and how they are grouped."""
    text = f"{data.num_rows}"
    if data.views > 1:
        text += f", {data.views} views each of {data.num_rows // data.views} pictures"
    return text + (f", in {data.num_groups} groups" if data.num_groups else "")


def describe_space(space: FeatureSpace) -> str:
    """Return where rows live in a few words: ``features of resnet18 at layer2``."""
    if space.is_local:
        return f"local features of {space.local_model}"
    if space.is_input:
        return f"images for {space.backbone}" if space.backbone else "images"
    if space.local_model:
        return f"features of the stem of one's own {space.local_model} for {space.backbone} at {space.cut}"
    coded = f" in codes of the bottleneck {space.bottleneck[:12]}" if space.bottleneck else ""
    return f"features of {space.backbone} at {space.cut}{coded}"


def describe_source(source: DatasetSource) -> str:
    """Return where the rows of an input live, and how they were made and sent."""
    size = f", input size {source.space.input_size}" if source.space.input_size else ""
    return describe_space(source.space) + size + (f", {source.codec}" if source.codec else "")


def source_to_dict(source: DatasetSource) -> dict[str, Any]:
    """Return an input as plain values, for JSON."""
    space = source.space
    return {
        "backbone": space.backbone,
        "cut": space.cut,
        "input_size": space.input_size,
        "fingerprint": space.fingerprint,
        "local_model": space.local_model,
        "codec": source.codec,
    }
