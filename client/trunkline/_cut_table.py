"""What each cut of a backbone costs, beside the JPEG file: figures that help to choose, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trunkline_wire import quantise
from trunkline_wire.specs import FLOAT32, INPUT_CUT, BackboneSpec, CodecCost, CutCost, CutSpec

from trunkline._codecs import usable_codecs
from trunkline._jpeg import JpegSize

PARAMETER_BYTES = 4
"""Size of one trained number of an exact stem, in bytes."""


@dataclass(frozen=True)
class CutRow:
    """One cut.

    Attributes:
        cut: Which.
        sizes: Bytes a row in each codec, without zstd, by falling size. Empty at ``input``.
        local_share: Fraction of the multiply-adds that run in the stem; None where that is not known.
        stem_bytes: Size of the exact stem: of its file where it was measured, else of its trained numbers.
        cost: What the cluster measured; None if it was not asked.
        max_error: Largest embedding error allowed.
        jpeg_bytes: Size of the JPEG file that features have to beat; None where that is not known.
    """

    cut: CutSpec
    sizes: tuple[tuple[str, int], ...]
    local_share: float | None
    stem_bytes: int
    cost: CutCost | None
    max_error: float
    jpeg_bytes: float | None

    @property
    def allowed(self) -> tuple[CodecCost, ...]:
        """Measured codecs within the bound, fewest bytes first. Those of the exact stem."""
        if self.cost is None:
            return ()
        return tuple(one for one in usable_codecs(self.cost, quantise.CODECS) if one.embedding_error <= self.max_error)

    @property
    def smallest(self) -> CodecCost | None:
        """The measured codec with the fewest bytes within the bound."""
        return next(iter(self.allowed), None)

    @property
    def beats_jpeg(self) -> str | None:
        """The least lossy codec, without zstd, that needs fewer bytes than the JPEG file; empty if none does.

        None where the JPEG's size is not known, and at ``input``.
        """
        if self.jpeg_bytes is None or not self.sizes:
            return None
        return next((codec for codec, size in self.sizes if size < self.jpeg_bytes), "")

    @property
    def jpeg_is_better(self) -> bool | None:
        """Whether the JPEG file is smaller than features in every codec that is allowed.

        Where nothing was measured, every codec counts as allowed, and zstd is left out. None where the JPEG's size is
        not known, and at ``input``.
        """
        if self.jpeg_bytes is None or not self.sizes:
            return None
        if self.cost is None:
            return self.beats_jpeg == ""
        return self.smallest is None or self.smallest.bytes_per_row >= self.jpeg_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        measured = {} if self.cost is None else {one.codec: one for one in self.cost.codecs}
        codecs: list[dict[str, Any]] = [
            {"codec": codec, "bytes_per_row": size, "embedding_error": None, "is_allowed": None}
            for codec, size in self.sizes
            if codec not in measured
        ]
        codecs += [
            {
                **asdict(one),
                "embedding_error": _finite(one.embedding_error),
                "is_allowed": one.embedding_error <= self.max_error,
            }
            for one in measured.values()
        ]
        stems = () if self.cost is None else self.cost.stems
        return {
            "name": self.cut.name,
            "feature_shape": list(self.cut.feature_shape),
            "is_stage": self.cut.is_stage,
            "codecs": codecs,
            "stems": [{**asdict(one), "embedding_error": _finite(one.embedding_error)} for one in stems],
            "local_share": self.local_share,
            "stem_bytes": self.stem_bytes,
            "measured": self.cost is not None,
            "smallest": None if self.smallest is None else asdict(self.smallest),
            "jpeg_is_better": self.jpeg_is_better,
        }


def _finite(error: float) -> float | None:
    # A codec that cannot hold the features has an infinite error, and JSON has no such number.
    return error if math.isfinite(error) else None


def cut_row(
    spec: BackboneSpec, cut: CutSpec, *, cost: CutCost | None, jpeg: JpegSize | None, max_error: float
) -> CutRow:
    """Put the figures of one cut together."""
    sizes = () if cut.name == INPUT_CUT else _sizes(cut)
    stem = cost.stem(FLOAT32) if cost else None
    return CutRow(
        cut=cut,
        sizes=sizes,
        local_share=cut.stem_macs / spec.macs if spec.macs else None,
        stem_bytes=stem.size_bytes if stem else PARAMETER_BYTES * cut.stem_parameters,
        cost=cost,
        max_error=max_error,
        jpeg_bytes=jpeg.smallest if jpeg else None,
    )


def _sizes(cut: CutSpec) -> tuple[tuple[str, int], ...]:
    return tuple((one, quantise.row_bytes(cut.feature_shape, one, cut.channel_axis)) for one in quantise.CODECS)


@dataclass(frozen=True)
class Verdict:
    """What follows from the rows of a table.

    Attributes:
        best: The measured cut and codec with the fewest bytes within the bound; None if nothing was measured.
        estimate: The cut and codec with the fewest bytes among those not measured; None if all were.
        worse_than_jpeg: Names of the measured cuts where the JPEG file is the better choice.
        worse_before_zstd: Names of the cuts not measured where it needs fewer bytes than every codec, zstd left out.
    """

    best: tuple[CutRow, CodecCost] | None
    estimate: tuple[CutRow, str, int] | None
    worse_than_jpeg: tuple[str, ...]
    worse_before_zstd: tuple[str, ...]


def judge(rows: Sequence[CutRow]) -> Verdict:
    """Say which cut and codec need the fewest bytes, and where the JPEG file is the better choice."""
    measured = [(row, row.smallest) for row in rows if row.smallest is not None]
    estimated = [(row, codec, size) for row in rows if row.cost is None for codec, size in row.sizes]
    return Verdict(
        best=min(measured, key=lambda one: one[1].bytes_per_row, default=None),
        estimate=min(estimated, key=lambda one: one[2], default=None),
        worse_than_jpeg=tuple(row.cut.name for row in rows if row.jpeg_is_better and row.cost is not None),
        worse_before_zstd=tuple(row.cut.name for row in rows if row.jpeg_is_better and row.cost is None),
    )
