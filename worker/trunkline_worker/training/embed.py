"""The inputs of a dataset as a head will see them: through the trunk where there is one, never twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.quantise import IMAGES, PackedRows, unpack
from trunkline_wire.specs import (
    FLOAT32,
    BackboneSpec,
    CodecUse,
    CutCost,
    CutSpec,
    FeatureSpace,
    SliceSpec,
    map_tap,
)

from trunkline_worker.engine.api import Extraction, Payload
from trunkline_worker.store import chunks
from trunkline_worker.store.records import BackboneChoice, DatasetContent, Event, JobSpec
from trunkline_worker.training.keeper import LeaseKeeper
from trunkline_worker.training.progress import TrainingCancelled
from trunkline_worker.training.sources import Source
from trunkline_worker.training.tools import JobTools

# Shape suffix legend: N = rows of the dataset, D = columns of the embedding, W = width of local features

EMBED_ROWS = 128
"""Rows that are sent through the trunk in one piece, and kept in one chunk."""

_EXACT = frozenset({"", IMAGES, "uint8", FLOAT32})
"""Codecs, as ``codec_label`` names them, that do nothing to the embedding; the empty one is not known."""


class Trunk(Protocol):
    """A backbone somewhere, called from a thread that may wait."""

    def describe(self, backbone: str, input_size: int) -> BackboneSpec:
        """Describe the backbone at an input size."""

    def cut_cost(self, backbone: str, cut: str, input_size: int) -> CutCost:
        """Say what codecs and stems cost at a cut."""

    def extract(
        self, batches: Iterator[tuple[FeatureSpace, Payload]], slices: Sequence[str] = ()
    ) -> Iterator[Extraction]:
        """Return slices of the embedding of each batch, in order, keeping a few in flight. None named: all of them."""


@dataclass(frozen=True)
class ReadInput:
    """An input of every row, read.

    Attributes:
        source: What the head is trained on.
        space: Where its rows live.
        codec: How they were made and sent, as ``codec_label`` says.
        codec_error: What that does to the embedding.
        spec: The backbone that read it; None for local features.
    """

    source: Source
    space: FeatureSpace
    codec: str
    codec_error: float = 0.0
    spec: BackboneSpec | None = None


@dataclass(frozen=True)
class _Entry:
    """Where an input's rows enter the trunk, and the tap whose map is wanted instead of the embedding."""

    spec: BackboneSpec
    space: FeatureSpace
    cut: CutSpec
    tap_slice: str = ""

    @property
    def slices(self) -> tuple[SliceSpec, ...]:
        """What comes out, side by side from column 0."""
        names = (self.tap_slice,) if self.tap_slice else self.cut.slices
        slices, start = [], 0
        for name in names:
            width = self.spec.slice_width(name)
            assert width is not None
            slices.append(SliceSpec(name, start, start + width))
            start += width
        return tuple(slices)

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Shape of the map, or of the tokens; empty where the embedding is wanted."""
        return self.spec.map_shape(self.tap_slice)

    @property
    def embedding_key(self) -> str:
        """The key that embeddings are cached under: all that the numbers depend on besides the row.

        The network and its preprocessing, the stem where it is not exact, and the columns behind the cut.
        """
        exact = self.cut.precision_of(self.space.fingerprint) == FLOAT32 and not self.space.is_own
        origin = self.spec.embedding_fingerprint if exact else self.space.fingerprint
        columns = json.dumps([self.cut.name, *((one.name, *(self.map_shape or (one.width,))) for one in self.slices)])
        return f"{origin}-{hashlib.sha256(columns.encode()).hexdigest()[:32]}"


def read_inputs(
    tenant: str, job: JobSpec, content: DatasetContent, tools: JobTools, keeper: LeaseKeeper
) -> list[ReadInput]:
    """Return the inputs of every row of a dataset, in the order in which they enter the head.

    The dataset's first one, as each backbone of the job reads it, and then the others.

    Raises:
        WireError: As the trunk does; INCOMPATIBLE, UNSUPPORTED, SHAPE_MISMATCH, NOT_FINITE, CORRUPT_DATA.
        TrainingCancelled: Once the keeper says so.
    """
    record = content.record
    tap_slice = next((one for one in job.slices[:1] if map_tap(one) is not None), "")
    reader = _Reader(tenant, tools, keeper)
    if record.space.is_local:
        read = [reader.local(record.space, record.codec, content.row_ids)]
    else:
        own = BackboneChoice(job.backbone, job.input_size)
        read = [reader.backbone(own, record.space, record.codec, content.row_ids, tap_slice)]
        read += [reader.backbone(choice, record.space, record.codec, content.row_ids) for choice in job.more_backbones]
    for source, row_ids in zip(record.more_inputs, content.more_row_ids, strict=True):
        space = source.space
        if space.is_local:
            read.append(reader.local(space, source.codec, row_ids))
        else:
            choice = BackboneChoice(space.backbone, space.input_size)
            read.append(reader.backbone(choice, space, source.codec, row_ids))
    return read


@dataclass(frozen=True)
class RowMaps:
    """The maps at a cut of a dataset's first input, or its tokens, in storage once they are prepared.

    Attributes:
        tenant: Whose dataset it is.
        spec: The backbone that the rows are read by.
        space: Where the rows live; images, or features at a cut.
        cut: Name of the cut whose maps are meant.
        row_ids: Of the rows, in the dataset's order.
    """

    tenant: str
    spec: BackboneSpec
    space: FeatureSpace
    cut: str
    row_ids: Sequence[bytes]

    def prepare(self, tools: JobTools, keeper: LeaseKeeper) -> None:
        """Send through the trunk what never went before.

        Raises:
            WireError: As ``read_inputs``.
            TrainingCancelled: Once the keeper says so.
        """
        _Reader(self.tenant, tools, keeper).fill(self._entry, self.row_ids)

    def read(self, tools: JobTools) -> npt.NDArray[np.float32]:
        """Return the maps of all rows, (rows, channels * height * width), or their tokens, (rows, channels * tokens).

        Raises:
            WireError: CORRUPT_DATA; NOT_FOUND where they were not prepared.
        """
        return _read_embedding(tools, self.tenant, self._entry, self.row_ids)

    @property
    def _entry(self) -> _Entry:
        cut = self.spec.cut(self.cut)
        assert cut is not None
        return _entry(self.spec, self.space, cut.whole_slice)


class _Reader:
    def __init__(self, tenant: str, tools: JobTools, keeper: LeaseKeeper) -> None:
        self._tenant = tenant
        self._tools = tools
        self._keeper = keeper

    def backbone(
        self,
        choice: BackboneChoice,
        space: FeatureSpace,
        codec: str,
        row_ids: Sequence[bytes],
        tap_slice: str = "",
    ) -> ReadInput:
        """Return what a backbone makes of an input."""
        trunk = self._tools.trunk
        entry = _entry(trunk.describe(choice.backbone, choice.input_size), space, tap_slice)
        columns_ND, use = self._embedding(entry, row_ids)
        if entry.space.is_own and not use.codec:
            # Only the trunk can say what a bottleneck, or a codec behind a stem of one's own, does: one row is enough.
            (use,) = (one.codec_use for one in trunk.extract(iter([(entry.space, self._rows(row_ids[:1]))])))
        source = Source(choice.backbone, columns_ND, entry.slices, entry.map_shape)
        return ReadInput(source, entry.space, codec, _codec_error(codec, entry, use, trunk), entry.spec)

    def local(self, space: FeatureSpace, codec: str, row_ids: Sequence[bytes]) -> ReadInput:
        """Return local features, as the client sent them."""
        name = space.local_model
        unique = list(dict.fromkeys(row_ids))
        self._tell(name, 1.0, len(unique), 0)
        try:
            rows = self._rows(row_ids)
        except WireError as error:
            if error.code is ErrorCode.INCOMPATIBLE:
                raise WireError(
                    ErrorCode.SHAPE_MISMATCH, f"features of local model {name!r} differ in form: {error.message}"
                ) from error
            raise
        columns_NW = unpack(rows) if isinstance(rows, PackedRows) else rows
        if not isinstance(columns_NW, np.ndarray) or columns_NW.ndim != 2:
            raise WireError(ErrorCode.CORRUPT_DATA, f"features of local model {name!r} are not vectors")
        width = columns_NW.shape[1]
        columns_NW = columns_NW.astype(np.float32, copy=False)
        return ReadInput(Source(name, columns_NW, (SliceSpec(name, 0, width),), is_local=True), space, codec)

    def _embedding(self, entry: _Entry, row_ids: Sequence[bytes]) -> tuple[npt.NDArray[np.float32], CodecUse]:
        """Return the embedding of every row, and what the trunk said of the rows' codec, as ``fill`` does."""
        use = self.fill(entry, row_ids)
        return _read_embedding(self._tools, self._tenant, entry, row_ids), use

    def fill(self, entry: _Entry, row_ids: Sequence[bytes]) -> CodecUse:
        """Send through the trunk the rows that never went before, and keep what comes out.

        Returns what the trunk said of the rows' codec; nothing where no row was sent.
        """
        tools, tenant, key = self._tools, self._tenant, entry.embedding_key
        unique = list(dict.fromkeys(row_ids))
        missing = [unique[index] for index in tools.metadata("embeddings.missing", tenant, key, unique)]
        cached = len(unique) - len(missing)
        self._tell(entry.spec.name, 0.0 if missing else 1.0, len(unique), cached)
        groups = [missing[start : start + EMBED_ROWS] for start in range(0, len(missing), EMBED_ROWS)]

        def batches() -> Iterator[tuple[FeatureSpace, Payload]]:
            for group in groups:
                if self._keeper.should_stop():
                    raise TrainingCancelled
                yield entry.space, self._rows(group)

        done = 0
        use = CodecUse()
        wanted = (entry.tap_slice,) if entry.tap_slice else ()
        for group, extraction in zip(groups, tools.trunk.extract(batches(), wanted), strict=True):
            if extraction.row_errors:
                row, error = min(extraction.row_errors.items())
                raise WireError(
                    error.code,
                    f"{len(extraction.row_errors)} rows of the dataset cannot be read, one of them is row "
                    f"{row_ids.index(group[row])}: {error.message}",
                )
            sha256 = chunks.write_chunk(tools.blobs, extraction.embedding_BD)
            tools.failpoints.hit("job.embedding_written")
            tools.metadata("embeddings.add_chunk", tenant, key, sha256, group)
            use = extraction.codec_use
            done += len(group)
            self._tell(entry.spec.name, done / len(missing), len(unique), cached)
        return use

    def _rows(self, row_ids: Sequence[bytes]) -> Payload:
        locations = self._tools.metadata("rows.locate", self._tenant, row_ids)
        return chunks.read_rows(self._tools.blobs, locations)

    def _tell(self, source: str, progress: float, num_rows: int, cached: int) -> None:
        self._keeper.report(Event("embed", progress, {"rows": num_rows, "cached": cached}, source))


def _read_embedding(tools: JobTools, tenant: str, entry: _Entry, row_ids: Sequence[bytes]) -> npt.NDArray[np.float32]:
    locations = tools.metadata("embeddings.locate", tenant, entry.embedding_key, row_ids)
    embedding_ND = chunks.read_rows(tools.blobs, locations)
    if not isinstance(embedding_ND, np.ndarray) or embedding_ND.shape[1] != entry.slices[-1].stop:
        raise WireError(ErrorCode.CORRUPT_DATA, "the cached embeddings do not have the backbone's width")
    return embedding_ND.astype(np.float32, copy=False)


def _entry(spec: BackboneSpec, space: FeatureSpace, tap_slice: str) -> _Entry:
    """Find where rows enter, and check that the backbone still is what they were made for."""
    cut = spec.cut(space.cut)
    if cut is not None and not space.backbone:
        space = spec.space(cut)
    if cut is None or cut.precision_in(space) is None:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"the dataset's features were made with other weights or preprocessing than {spec.name} has now; "
            "upload the images again",
        )
    return _Entry(spec, space, cut, tap_slice)


def _codec_error(codec: str, entry: _Entry, use: CodecUse, trunk: Trunk) -> float:
    """Return what a dataset's codec, its stem included, does to the embedding.

    The trunk is asked only where something is lost and no row went through it. Rows that a client's own model or a
    bottleneck made are never compared with others: what the trunk said of them stands.
    """
    if entry.space.is_own:
        return use.embedding_error
    if codec in _EXACT:
        return 0.0
    if use.codec == codec:
        return use.embedding_error
    cost = trunk.cut_cost(entry.spec.name, entry.cut.name, entry.space.input_size)
    name, _, precision = codec.partition("@")
    coded, stem = cost.codec(name), cost.stem(precision or FLOAT32)
    if coded is None or stem is None:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            f"the dataset's rows were sent as {codec!r}, which cut {entry.cut.name!r} of {entry.spec.name} does not "
            "offer now; upload the images again",
        )
    # Together they are measured only where rows are sent; there they came to less than the sum.
    return coded.embedding_error + stem.embedding_error
