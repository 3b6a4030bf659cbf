"""What an engine takes and gives. A servicer talks to an ``Engine``: in this process, or behind a Serve handle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from trunkline_wire.bottleneck import ChannelLinear
from trunkline_wire.errors import WireError
from trunkline_wire.quantise import PackedRows
from trunkline_wire.specs import (
    FLOAT32,
    POOLED,
    BackboneSpec,
    CodecUse,
    CutCost,
    FeatureSpace,
    Preprocessing,
    SliceSpec,
    Timings,
    Tuning,
)

from trunkline_worker.store.records import ModelRecord

Payload = npt.NDArray[np.generic] | PackedRows | Sequence[bytes]
"""Features at the cut, (B, ...), or the same in fewer bytes; or encoded images, one per row."""

LOGITS = "logits"
"""Asks ``forward`` for the network's own outputs in place of slices of the embedding."""

DEFAULT_OUTPUTS = (POOLED,)
"""What ``forward`` returns if nothing is named."""


@dataclass(frozen=True)
class Extraction:
    """An embedding. ``embedding_BD`` is float32 and NaN in rows that failed."""

    embedding_BD: npt.NDArray[np.float32]
    slices: tuple[SliceSpec, ...]
    row_errors: Mapping[int, WireError] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)
    codec_use: CodecUse = field(default_factory=CodecUse)


@dataclass(frozen=True)
class Prediction:
    """What a model says. ``outputs_BK`` is float32 and NaN in rows that failed.

    ``outliers_B2`` likewise, where it was asked for: each row's distance to the training rows, and the share of rows
    held out that were nearer.
    """

    outputs_BK: npt.NDArray[np.float32]
    row_errors: Mapping[int, WireError] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)
    codec_use: CodecUse = field(default_factory=CodecUse)
    outliers_B2: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class TrunkOutputs:
    """What the trunk says of rows, float32, (B, D)."""

    outputs_BD: npt.NDArray[np.float32]
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True)
class TrunkGradients:
    """Gradients of a loss with respect to the features, in their shape, and to the decoder, summed over the rows."""

    features: npt.NDArray[np.float32]
    decoder: ChannelLinear | None = None
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True)
class StemFile:
    """An exported stem: where its ONNX file lies in storage and what it must hash to.

    ``embedding_error`` is 0 for the exact stem. See ``StemCost`` in catalog.proto.
    """

    space: FeatureSpace
    preprocessing: Preprocessing
    feature_shape: tuple[int, ...]
    path: str
    size_bytes: int
    sha256: str
    precision: str = FLOAT32
    embedding_error: float = 0.0


@dataclass(frozen=True)
class EngineStats:
    """Counters since start, and what is there now.

    Attributes:
        trunk_calls: Passes of the trunk.
        trunk_rows: Rows that went through it.
        head_calls: Heads that were run; one head on all of its rows in a batch counts once.
        queued_rows: Rows that wait.
        stacked_calls: Passes that ran several heads at once.
        heads_kept: Heads in memory.
        head_bytes: Memory that they take.
        head_loads: Heads that were fetched from storage, in vain or not.
    """

    trunk_calls: int
    trunk_rows: int
    head_calls: int
    queued_rows: int
    stacked_calls: int = 0
    heads_kept: int = 0
    head_bytes: int = 0
    head_loads: int = 0


class Engine(Protocol):
    """One backbone, ready to answer. Every method raises ``WireError`` and nothing else on purpose."""

    async def describe(self, input_size: int = 0) -> BackboneSpec:
        """Describe the backbone at an input size; 0 is its own."""

    async def stem(self, cut: str, input_size: int = 0, precision: str = FLOAT32) -> StemFile:
        """Export the stem before a cut, or find it in storage.

        Raises:
            WireError: Also UNSUPPORTED for a precision that is unknown, or whose error at this cut is over the bound.
        """

    async def cut_cost(self, cut: str, input_size: int = 0) -> CutCost:
        """Measure what every codec and stem costs at a cut, or find it in storage."""

    async def tune(self, cut: str = "", input_size: int = 0, again: bool = False) -> Tuning:
        """Measure which runtime is the fastest behind a cut, or find in storage what was measured.

        Args:
            cut: Empty for ``input``.
            input_size: 0 for the backbone's own.
            again: Measure anew, those runtimes too that take long to make: minutes, in which rows wait longer. The best
                is used from then on.
        """

    async def predict(
        self,
        space: FeatureSpace,
        rows: Payload,
        model: ModelRecord,
        *,
        more_BE: npt.NDArray[np.float32] | None = None,
        outliers: bool = False,
        timeout_s: float | None = None,
        caller: str = "",
        wait: bool = False,
    ) -> Prediction:
        """Run trunk and head; for a model of local features alone, whose rows they are then, the head.

        Rows still waiting after ``timeout_s`` seconds are dropped unrun.

        Args:
            space: Of the rows.
            rows: The first input.
            model: Whose head.
            more_BE: Columns of the model's other inputs side by side, one row per row. None where it has no others.
            outliers: Whether to say how unlike the model's training rows each row is. UNSUPPORTED for a model that
                cannot.
            timeout_s: Seconds that the caller has.
            caller: Whose rows they are: a tenant, or a tenant, ``/`` and one of its connections. Callers share the
                device fairly.
            wait: Whether to wait in line, while the engine has more to do than it can, instead of being told
                OVERLOADED. An engine that is elsewhere may answer OVERLOADED all the same.
        """

    async def extract(
        self,
        space: FeatureSpace,
        rows: Payload,
        slices: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
        caller: str = "",
        wait: bool = False,
    ) -> Extraction:
        """Run the trunk and return slices of the embedding; none named means all that the cut allows.

        A single ``TAP.map`` returns the features there as a map, (B, channels * height * width). The rest is as for
        ``predict``.
        """

    async def forward(
        self,
        space: FeatureSpace,
        rows: Payload,
        outputs: Sequence[str] = (),
        *,
        decoder: ChannelLinear | None = None,
        timeout_s: float | None = None,
    ) -> TrunkOutputs:
        """Run the trunk in float32, as a function that ``backward`` differentiates. See ``TrunkService``."""

    async def backward(
        self,
        space: FeatureSpace,
        rows: Payload,
        gradient_BD: npt.NDArray[np.generic],
        outputs: Sequence[str] = (),
        *,
        decoder: ChannelLinear | None = None,
        timeout_s: float | None = None,
    ) -> TrunkGradients:
        """Propagate the gradient of the trunk's outputs back, for the rows given. See ``TrunkService``."""

    async def stats(self) -> EngineStats:
        """Return the counters."""
