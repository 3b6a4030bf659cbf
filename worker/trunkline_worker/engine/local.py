"""The engine in this process: one backbone, its runtimes, a batcher and the heads."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from trunkline_wire.bottleneck import ChannelLinear
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.quantise import PackedRows, codec_of
from trunkline_wire.specs import (
    FLOAT32,
    INPUT_CUT,
    BackboneSpec,
    CodecUse,
    CutCost,
    FeatureSpace,
    SliceSpec,
    Tuning,
)

from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.engine.api import (
    EngineStats,
    Extraction,
    Payload,
    Prediction,
    StemFile,
    TrunkGradients,
    TrunkOutputs,
)
from trunkline_worker.engine.batcher import MAX_QUEUED_BYTES, Batcher, Hold, Monotonic, Part, PartResult, Rows
from trunkline_worker.engine.bottlenecks import Bottlenecks, LoadBottleneck
from trunkline_worker.engine.checks import (
    check_codec,
    check_local,
    check_model,
    check_more,
    check_outliers,
    check_own,
    check_rows,
    check_space,
    first_input,
    select_slices,
)
from trunkline_worker.engine.compute import Compute, Work
from trunkline_worker.engine.cutcosts import CutCosts
from trunkline_worker.engine.decoding import RowDecoder
from trunkline_worker.engine.differentiate import Differentiator
from trunkline_worker.engine.headcache import HeadCache, HeadPath, LoadHead
from trunkline_worker.engine.multihead import Columns, Head
from trunkline_worker.engine.pipeline import Collected, DecodingPipeline, memory_of
from trunkline_worker.engine.prepared import Runtimes
from trunkline_worker.engine.runtimes import find_device, max_rows_of, rows_at
from trunkline_worker.engine.targets import LocalKey, Target, TrunkKey
from trunkline_worker.engine.threads import Threads
from trunkline_worker.engine.torch_runtimes import place
from trunkline_worker.engine.tuning import RuntimeChooser
from trunkline_worker.heads.outliers import detector_from_bytes, outliers_path
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.records import ModelRecord

# Shape suffix legend: B = rows, D = embedding columns, E = columns of a model's other inputs

_MAX_TARGETS = 1024


class _Asked(NamedTuple):
    """How a request is to stand in line: see ``Engine.predict``. ``deadline`` is a reading of the clock."""

    deadline: float | None
    caller: str
    wait: bool


class _Loaded(NamedTuple):
    """What runs behind the trunk, as ``Work`` names it. ``detector`` is None where nobody asked for outlier scores."""

    head_key: str
    head: Head
    detector_key: str = ""
    detector: Head | None = None

    @property
    def num_outputs(self) -> int:
        """Columns that come out: the head's, and behind them the detector's."""
        return self.head.num_outputs + (self.detector.num_outputs if self.detector else 0)


class LocalEngine:
    """Implements ``engine.api.Engine`` for one backbone. Used from one event loop."""

    def __init__(
        self,
        backbone: Backbone,
        blobs: BlobStore,
        *,
        clock: Monotonic,
        device: str = "auto",
        num_threads: int | None = None,
        max_rows: int | None = None,
        max_queued_rows: int = 8192,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        head_capacity: int = 4096,
        head_bytes: int = 2**30,
        load_head: LoadHead | None = None,
        head_path: HeadPath | None = None,
        load_bottleneck: LoadBottleneck | None = None,
        use_onnx: bool = True,
        runtime: str | None = None,
    ) -> None:
        """Prepare; ``start`` makes it ready.

        Args:
            backbone: On the CPU.
            blobs: Where stems, trunks, choices of runtimes and heads lie.
            clock: Deadlines and timings.
            device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1`` ...
            num_threads: Of the CPU, for one batch and for decoding images. None: as many as torch uses.
            max_rows: Most rows of 224 px in a batch; more of smaller pictures, fewer of larger ones. None: 32 on the
                CPU, 256 on a GPU. Batches are smaller where the runtime was measured to be as fast then.
            max_queued_rows: Most rows that wait before callers are told to come back.
            max_queued_bytes: Most memory of theirs, as they enter the network, likewise.
            head_capacity: Most heads that are kept in memory.
            head_bytes: Most bytes that they take together. What tells outliers may take a quarter as much beside them.
            load_head: Makes a head from checked bytes. None: the worker's own format.
            head_path: Where a head lies, by its SHA-256. None: the worker's own layout.
            load_bottleneck: Finds a bottleneck by its SHA-256. None: there are none.
            use_onnx: Whether to try ONNX Runtime and OpenVINO.
            runtime: The one to use, of ``runtime_names.RUNTIMES``, for every cut. None: the best, as measured.

        Raises:
            WireError: INVALID_ARGUMENT for a device that is not there, or a runtime that does not exist.
        """
        if load_head is None or head_path is None:
            from trunkline_worker.heads import artefact, stacking

            load_head = load_head or functools.partial(
                stacking.packed_from_bytes, make_tail=backbone.tail_for, device=find_device(device)
            )
            head_path = head_path or artefact.head_path
        self._device = find_device(device)
        self._backbone = backbone
        self._clock = clock
        threads = num_threads or torch.get_num_threads()
        self._max_rows_own = max_rows or max_rows_of(self._device)
        placed = place(backbone, self._device)
        self._threads = Threads(threads)
        chooser = RuntimeChooser(
            backbone,
            placed,
            blobs,
            device=self._device,
            num_threads=threads,
            most_rows=self._max_rows_own,
            clock=clock,
            use_onnx=use_onnx,
            fixed=runtime or "",
        )
        self._runtimes = Runtimes(chooser, self._threads)
        self._costs = CutCosts(backbone, placed, blobs, self._threads, device=self._device, num_threads=threads)
        self._compute = Compute(clock)
        self._decoder = RowDecoder(threads)
        self._heads = HeadCache(
            blobs,
            load_head=load_head,
            head_path=head_path,
            capacity=head_capacity,
            max_bytes=head_bytes,
            executor=self._threads.short_pool,
        )
        self._detectors = HeadCache(
            blobs,
            load_head=detector_from_bytes,
            head_path=outliers_path,
            capacity=head_capacity,
            max_bytes=head_bytes // 4,
            executor=self._threads.short_pool,
            what="outlier detector",
        )
        self._bottlenecks = Bottlenecks(load_bottleneck, self._threads)
        self._batcher: Batcher[Work] = Batcher(
            self._run_batch,
            clock=clock,
            max_rows=self._max_rows,
            max_queued_rows=max_queued_rows,
            max_queued_bytes=max_queued_bytes,
            # The next batch is there when one ends, whatever the event loop is doing then.
            depth=2,
        )
        self._differentiator = Differentiator(
            placed,
            self._threads,
            self._batcher,
            device=self._device,
            clock=clock,
            max_rows=self._rows_at,
        )
        self._pipeline = DecodingPipeline(self._batcher, clock)
        # Worked out once: a client sends thousands of batches alike. Descriptions of a size never change.
        self._targets: dict[tuple[FeatureSpace, int, tuple[str, ...]], Target] = {}

    async def start(self, *, prepare: bool = True) -> None:
        """Begin to answer.

        Args:
            prepare: Whether to choose the runtime for images of the backbone's own size now: seconds the first time,
                read from storage later. Otherwise, as for every other cut and size, when it is first used.

        Raises:
            WireError: UNSUPPORTED where the runtime is fixed and cannot be used.
        """
        self._batcher.start()
        if prepare:
            await self._runtimes.get(TrunkKey(INPUT_CUT, self._backbone.preprocessing.input_size))

    async def close(self) -> None:
        """Take nothing new, finish what waits, end the threads."""
        await self._batcher.close()
        self._runtimes.close()
        self._bottlenecks.close()
        self._costs.close()
        await self._threads.close()
        await asyncio.get_running_loop().run_in_executor(None, self._decoder.close)

    async def describe(self, input_size: int = 0) -> BackboneSpec:
        """Describe the backbone at an input size. See ``Engine``."""
        spec = await self._spec(input_size)
        own = self._backbone.preprocessing.input_size
        for size in (spec.preprocessing.input_size, own):
            prepared = self._runtimes.known(TrunkKey(INPUT_CUT, size))
            if prepared is not None:
                return dataclasses.replace(
                    spec,
                    runtime=prepared.runtime.name,
                    device=str(self._device),
                    runtime_error=prepared.error,
                    rows_per_s=prepared.rows_per_s,
                    batch_rows=prepared.batch_rows,
                )
        return dataclasses.replace(spec, device=str(self._device))

    async def stem(self, cut: str, input_size: int = 0, precision: str = FLOAT32) -> StemFile:
        """Export a stem, or find it in storage. See ``Engine``."""
        spec = await self._spec(input_size)
        self._backbone.check_cut(cut)
        if cut == INPUT_CUT:
            self._backbone.stem(cut)  # refuses, saying why there is none
        found = spec.cut(cut)
        assert found is not None
        stored = await self._costs.stem((cut, spec.preprocessing.input_size), precision)
        return StemFile(
            spec.space(found, precision),
            spec.preprocessing,
            found.feature_shape,
            stored.path,
            stored.size_bytes,
            stored.sha256,
            precision,
            stored.embedding_error,
        )

    async def cut_cost(self, cut: str, input_size: int = 0) -> CutCost:
        """Measure what a cut costs, or find it in storage. See ``Engine``."""
        spec = await self._spec(input_size)
        self._backbone.check_cut(cut)
        return await self._costs.cost((cut, spec.preprocessing.input_size))

    async def tune(self, cut: str = "", input_size: int = 0, again: bool = False) -> Tuning:
        """Say how the runtime behind a cut was chosen. See ``Engine``."""
        spec = await self._spec(input_size)
        self._backbone.check_cut(cut or INPUT_CUT)
        key = TrunkKey(cut or INPUT_CUT, spec.preprocessing.input_size)
        return await self._runtimes.tune(key, again=again)

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
        """Run trunk and head. See ``Engine``."""
        start, deadline = self._started(timeout_s)
        asked = _Asked(deadline, caller, wait)
        check_more(model, more_BE, len(rows))
        if outliers:
            check_outliers(model)
        if space.is_local or model.space.is_local:
            async with self._head(model, outliers) as loaded:
                collected, use = await self._run_head_alone(space, rows, model, loaded, more_BE, asked)
        else:
            target = await self._target(space, rows, space.input_size or model.space.input_size, model.slices)
            needed = first_input(model)
            check_model(model.reference, needed, target.spec, target.cut)
            check_own(model.reference, needed, space, codec_of(rows))
            async with self._head(model, outliers) as loaded:
                collected, use = await self._process(target, rows, model, loaded, more_BE, asked)
        timings, outputs_BK, outliers_B2 = collected.timings(self._since(start)), collected.values, None
        if outliers:
            outputs_BK, outliers_B2 = np.split(outputs_BK, [model.num_outputs], axis=1)
        return Prediction(outputs_BK, collected.errors, timings, use, outliers_B2)

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
        """Run the trunk and return slices. See ``Engine``."""
        start, deadline = self._started(timeout_s)
        target = await self._target(space, rows, space.input_size, slices)
        collected, use = await self._process(target, rows, None, None, None, _Asked(deadline, caller, wait))
        timings = collected.timings(self._since(start))
        return Extraction(collected.values, target.slices, collected.errors, timings, use)

    async def forward(
        self,
        space: FeatureSpace,
        rows: Payload,
        outputs: Sequence[str] = (),
        *,
        decoder: ChannelLinear | None = None,
        timeout_s: float | None = None,
    ) -> TrunkOutputs:
        """Run the trunk as a function with a gradient. See ``Engine``."""
        _, deadline = self._started(timeout_s)
        spec = await self._spec(space.input_size)
        return await self._differentiator.forward(spec, space, rows, outputs, decoder, deadline)

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
        """Propagate the gradient of the outputs back. See ``Engine``."""
        _, deadline = self._started(timeout_s)
        spec = await self._spec(space.input_size)
        return await self._differentiator.backward(spec, space, rows, gradient_BD, outputs, decoder, deadline)

    async def stats(self) -> EngineStats:
        """Return the counters. See ``Engine``."""
        compute = self._compute
        return EngineStats(
            trunk_calls=compute.trunk_calls,
            trunk_rows=compute.trunk_rows,
            head_calls=compute.head_calls,
            queued_rows=self._batcher.queued_rows,
            stacked_calls=compute.stacked_calls,
            heads_kept=len(self._heads),
            head_bytes=self._heads.size_bytes,
            head_loads=self._heads.num_loads,
        )

    def _started(self, timeout_s: float | None) -> tuple[float, float | None]:
        now = self._clock.monotonic()
        return now, None if timeout_s is None else now + timeout_s

    def _since(self, start: float) -> float:
        return self._clock.monotonic() - start

    async def _target(self, space: FeatureSpace, rows: Payload, input_size: int, slices: Sequence[str]) -> Target:
        """Find where rows enter and what is wanted of them, and check the rows."""
        if space.is_local:
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"local features of {space.local_model[:80]!r} enter no backbone; only a head that was trained on them "
                "reads them",
            )
        asked_for = (space, input_size, tuple(slices))
        known = self._targets.get(asked_for)
        if known is not None:
            check_rows(rows, known.cut, is_input=space.is_input)
            return known
        spec = await self._spec(input_size)
        cut, precision = check_space(space, spec, self._backbone.check_cut)
        wanted = select_slices(slices, spec, cut)
        if not space.bottleneck:
            check_rows(rows, cut, is_input=space.is_input)
            if len(self._targets) >= _MAX_TARGETS:
                del self._targets[next(iter(self._targets))]
            self._targets[asked_for] = Target(spec, cut, precision, wanted)
            return self._targets[asked_for]
        bottleneck = await self._bottlenecks.get(space.bottleneck, cut)
        check_rows(rows, dataclasses.replace(cut, feature_shape=bottleneck.code_shape), is_input=False)
        return Target(spec, cut, precision, wanted, bottleneck)

    async def _spec(self, input_size: int) -> BackboneSpec:
        known = self._backbone.described(input_size)
        if known is not None:
            return known
        return await self._threads.short(self._backbone.describe, input_size)

    async def _process(
        self,
        target: Target,
        rows: Payload,
        model: ModelRecord | None,
        loaded: _Loaded | None,
        more_BE: npt.NDArray[np.float32] | None,
        asked: _Asked,
    ) -> tuple[Collected, CodecUse]:
        """Take checked rows through decoding, the line and a batch."""
        key, deadline = target.key, asked.deadline
        num_bytes = memory_of(rows, more_BE, target, slice_rows=self._max_rows(key))
        with await self._hold(len(rows), num_bytes, asked) as hold:
            self._runtimes.start(key)
            use = await self._codec_use(target, rows, model, deadline)
            prepared = await self._runtimes.get(key, self._left_s(deadline))
            work = Work(prepared, target.columns, target.slice_names, *(loaded or ()))
            if isinstance(rows, np.ndarray) and target.bottleneck is None:
                result = await self._batcher.submit(key, Rows(rows, more_BE), work, deadline=deadline, hold=hold)
                collected = Collected.of(result)
            else:
                collected = await self._pipeline.process(
                    len(rows),
                    lambda part: self._decoder.decode(rows, part, target.spec.preprocessing, target.bottleneck),
                    key=key,
                    work=work,
                    hold=hold,
                    deadline=deadline,
                    slice_rows=self._max_rows(key),
                    width=loaded.num_outputs if loaded else target.slices[-1].stop,
                    more_BE=more_BE,
                )
        collected.fail_overflown()
        return collected, use

    async def _run_head_alone(
        self,
        space: FeatureSpace,
        rows: Payload,
        model: ModelRecord,
        loaded: _Loaded,
        more_BE: npt.NDArray[np.float32] | None,
        asked: _Asked,
    ) -> tuple[Collected, CodecUse]:
        """Run a head on local features: there is nothing for the trunk to do."""
        width = loaded.head.num_features - loaded.head.more_width
        check_local(model.reference, dataclasses.replace(first_input(model), width=width), space, rows)
        columns = Columns([SliceSpec(space.local_model, 0, width)])
        work = Work(None, columns, (space.local_model,), *loaded)
        key = LocalKey(space.local_model, width)
        with await self._hold(len(rows), memory_of(rows, more_BE), asked) as hold:
            features = (await self._decoder.packed(rows)).rows if isinstance(rows, PackedRows) else np.asarray(rows)
            result = await self._batcher.submit(key, Rows(features, more_BE), work, deadline=asked.deadline, hold=hold)
        collected = Collected.of(result)
        collected.fail_overflown()
        return collected, CodecUse(codec_of(rows), 0.0, model.codec, model.codec_error)

    async def _codec_use(
        self, target: Target, rows: Payload, model: ModelRecord | None, deadline: float | None
    ) -> CodecUse:
        """Return how the rows were made and sent, having checked that the model may be used on them."""
        if target.bottleneck is not None:
            use = CodecUse(codec_of(rows), target.bottleneck.embedding_error)
        else:
            where = target.key.cut, target.key.input_size
            use = await self._costs.use(where, codec_of(rows), target.precision, self._left_s(deadline))
        if model is None:
            return use
        use = CodecUse(use.codec, use.embedding_error, model.codec, model.codec_error)
        check_codec(model.reference, use)
        return use

    async def _hold(self, num_rows: int, num_bytes: int, asked: _Asked) -> Hold:
        if asked.wait:
            return await self._batcher.hold_in_turn(num_rows, num_bytes, caller=asked.caller, deadline=asked.deadline)
        return self._batcher.hold(num_rows, num_bytes, caller=asked.caller)

    def _left_s(self, deadline: float | None) -> float | None:
        return None if deadline is None else max(deadline - self._clock.monotonic(), 0.0)

    @contextlib.asynccontextmanager
    async def _head(self, model: ModelRecord, outliers: bool) -> AsyncIterator[_Loaded]:
        """Return a model's head, and what tells outliers if wanted. They stay in memory until the context ends."""
        reads = model.slices, sum(one.width for one in model.more_inputs)
        async with self._heads.use(model.head_sha256) as head:
            if (head.slices, head.more_width, head.num_outputs) != (*reads, model.num_outputs):
                raise WireError(
                    ErrorCode.CORRUPT_DATA,
                    f"the head in storage is not the one that {model.reference} was registered with",
                )
            if not outliers:
                yield _Loaded(model.head_sha256, head)
                return
            async with self._detectors.use(model.outliers_sha256) as detector:
                if (detector.slices, detector.more_width, detector.num_features) != (*reads, head.num_features):
                    raise WireError(
                        ErrorCode.CORRUPT_DATA,
                        f"the outlier scores in storage are not those that {model.reference} was registered with",
                    )
                yield _Loaded(model.head_sha256, head, model.outliers_sha256, detector)

    def _max_rows(self, key: Hashable) -> int:
        if not isinstance(key, TrunkKey):
            return self._max_rows_own
        most, prepared = self._rows_at(key.input_size), self._runtimes.known(key)
        return min(most, prepared.batch_rows) if prepared is not None and prepared.batch_rows else most

    def _rows_at(self, input_size: int) -> int:
        return rows_at(self._max_rows_own, input_size)

    async def _run_batch(self, key: Hashable, parts: Sequence[Part[Work]]) -> Sequence[PartResult]:
        ahead = None
        if self._compute.stages_ahead(parts):
            ahead = await self._threads.stage(self._compute.stage, parts)
        return await self._threads.compute(self._compute.run, parts, ahead)
