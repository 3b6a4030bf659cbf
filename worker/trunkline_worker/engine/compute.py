"""One batch: one trunk pass over everybody's rows, then each distinct head once on its own rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.engine.batcher import Monotonic, Part, PartResult
from trunkline_worker.engine.choice import Prepared
from trunkline_worker.engine.memory import is_out_of_memory
from trunkline_worker.engine.multihead import Columns, Head, HeadRows, run_heads
from trunkline_worker.engine.pinned import Staged
from trunkline_worker.engine.torch_runtimes import TorchRuntime

# Shape suffix legend: B = rows, D = embedding columns, K = outputs


@dataclass(frozen=True)
class Work:
    """What is wanted of rows: a head's outputs, or, without a head, slices of the embedding.

    Attributes:
        prepared: The runtime of the rows' cut and input size; None where the rows are the columns: local features.
        columns: Where the slices behind that cut lie.
        slices: Names of the slices wanted. With a head, the head's own.
        head_key: Tells heads apart; empty without one.
        head: The head, or None.
        detector_key: Tells detectors of outliers apart; empty without one.
        detector: Runs on the rows and columns of the head, and its outputs stand behind the head's. None: nobody asked.
    """

    prepared: Prepared | None
    columns: Columns
    slices: tuple[str, ...]
    head_key: str = ""
    head: Head | None = None
    detector_key: str = ""
    detector: Head | None = None


@dataclass(frozen=True)
class Ahead:
    """A batch that is on its way to the device."""

    features: npt.NDArray[np.generic]
    staged: Staged


class Compute:
    """Runs batches and counts them. ``run`` is called from one thread; the counters may be read from any."""

    def __init__(self, clock: Monotonic) -> None:
        self._clock = clock
        self.trunk_calls = 0
        self.trunk_rows = 0
        self.head_calls = 0
        self.stacked_calls = 0

    def stages_ahead(self, parts: Sequence[Part[Work]]) -> bool:
        """Whether a batch gains by ``stage``."""
        prepared = parts[0].context.prepared
        return prepared is not None and getattr(prepared.runtime, "stages_ahead", False)

    def stage(self, parts: Sequence[Part[Work]]) -> Ahead:
        """Put a batch together and begin to bring it to the device, while the one before is computed.

        From one thread, which is another than that of ``run``.

        Raises:
            WireError: WORKER_OOM.
        """
        features = gather([part.rows.features for part in parts])
        assert parts[0].context.prepared is not None
        runtime = cast(TorchRuntime, parts[0].context.prepared.runtime)
        with _out_of_memory(len(features)):
            return Ahead(features, runtime.stage(features))

    def run(self, parts: Sequence[Part[Work]], ahead: Ahead | None = None) -> list[PartResult]:
        """Run a batch whose parts share a cut and an input size.

        Args:
            parts: The batch.
            ahead: What ``stage`` returned for it, if it was asked.

        Raises:
            WireError: WORKER_OOM.
        """
        features = gather([part.rows.features for part in parts]) if ahead is None else ahead.features
        start = self._clock.monotonic()
        prepared = parts[0].context.prepared
        if prepared is None:
            embedding_BD = torch.from_numpy(features.copy())  # what a message holds cannot be written to
        else:
            embedding_BD = _run_trunk(prepared, features, ahead)
            self.trunk_calls += 1
            self.trunk_rows += len(features)
        after_trunk = self._clock.monotonic()
        outputs = self._run_heads(embedding_BD, parts)
        trunk_s, head_s = after_trunk - start, self._clock.monotonic() - after_trunk
        return [
            PartResult(None, one, trunk_s, head_s)
            if isinstance(one, WireError)
            else PartResult(one.numpy(), None, trunk_s, head_s)
            for one in outputs
        ]

    @torch.inference_mode()
    def _run_heads(self, embedding_BD: Tensor, parts: Sequence[Part[Work]]) -> list[Tensor | WireError]:
        results: list[Tensor | WireError | None] = [None] * len(parts)
        with_head: list[tuple[int, HeadRows]] = []
        with_detector: list[tuple[int, HeadRows]] = []
        start = 0
        for index, part in enumerate(parts):
            stop, work = start + len(part.rows), part.context
            if work.head is None:
                # A copy: views of one batch would keep all of it alive for as long as any caller keeps its part.
                results[index] = work.columns.select(embedding_BD[start:stop], work.slices).clone()
            else:
                with_head.append((index, HeadRows(work.head_key, work.head, start, stop, part.rows.more_BE)))
            if work.detector is not None:
                rows = HeadRows(work.detector_key, work.detector, start, stop, part.rows.more_BE)
                with_detector.append((index, rows))
            start = stop
        if with_head:
            run = run_heads(embedding_BD, [one for _, one in with_head], parts[0].context.columns)
            self.head_calls += run.num_heads
            self.stacked_calls += run.num_stacked
            for (index, _), output in zip(with_head, run.results, strict=True):
                results[index] = output
        if with_detector:
            run = run_heads(embedding_BD, [one for _, one in with_detector], parts[0].context.columns)
            for (index, _), found in zip(with_detector, run.results, strict=True):
                results[index] = _beside(results[index], found)
        return [one if one is not None else WireError(ErrorCode.INTERNAL, "not run") for one in results]


def _beside(outputs_BK: Tensor | WireError | None, found: Tensor | WireError) -> Tensor | WireError:
    """Put what a detector found beside a head's outputs. Where one of the two failed, so did the rows."""
    if not isinstance(outputs_BK, Tensor):
        return found if outputs_BK is None else outputs_BK
    return found if isinstance(found, WireError) else torch.cat([outputs_BK, found.to(outputs_BK)], dim=1)


def _run_trunk(prepared: Prepared, features: npt.NDArray[np.generic], ahead: Ahead | None) -> Tensor:
    with _out_of_memory(len(features)):
        if ahead is None:
            return prepared.runtime.run(features)
        return cast(TorchRuntime, prepared.runtime).run(features, ahead.staged)


@contextlib.contextmanager
def _out_of_memory(num_rows: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise WireError(
                ErrorCode.WORKER_OOM,
                f"a batch of {num_rows} rows does not fit this worker's memory; send fewer rows or use a smaller "
                "input size",
            ) from error
        raise


def gather(rows: Sequence[npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
    """Put rows of several requests into one array: uint8 stays, floats become float32."""
    dtype: np.dtype[np.generic] = np.dtype(np.uint8 if rows[0].dtype == np.uint8 else np.float32)
    if len(rows) == 1:
        return rows[0].astype(dtype, copy=False)
    gathered = np.empty((sum(len(one) for one in rows), *rows[0].shape[1:]), dtype=dtype)
    return np.concatenate(rows, out=gathered, casting="same_kind")
