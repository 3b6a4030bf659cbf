"""What a cut offers: codecs and stems, what they cost, and which of that a request has used."""

from __future__ import annotations

import dataclasses
import math

import torch
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.quantise import IMAGES, ZSTD
from trunkline_wire.specs import (
    FLOAT32,
    INPUT_CUT,
    INT8,
    PRECISIONS,
    BackboneSpec,
    CodecUse,
    CutCost,
    CutSpec,
    StemCost,
    codec_label,
)

from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.engine.costs import PIXELS, CodecMeter, CodecTable, codecs_at
from trunkline_worker.engine.exports import StoredExport
from trunkline_worker.engine.shared import Shared
from trunkline_worker.engine.stems import StemMaker, int8_refusal
from trunkline_worker.engine.threads import Threads
from trunkline_worker.store.blobs import BlobStore

Key = tuple[str, int]
"""A cut and an input size. The backbone has been described at that size before."""

_TableKey = tuple[str, int, str]
"""The same, and the precision of the stem."""

_CAPACITY = 1024
_EXACT = (FLOAT32, PIXELS, IMAGES)
_NOT_OFFERED = (ErrorCode.UNSUPPORTED, ErrorCode.PAYLOAD_TOO_LARGE)


class CutCosts:
    """Measures what is asked for, once, and nothing more. Used from one event loop."""

    def __init__(
        self,
        backbone: Backbone,
        placed: Backbone,
        blobs: BlobStore,
        threads: Threads,
        *,
        device: torch.device,
        num_threads: int,
    ) -> None:
        """Prepare.

        Args:
            backbone: On the CPU.
            placed: The same, on the device.
            blobs: Where stems and measurements are kept.
            threads: Where work is done.
            device: Where trunks run.
            num_threads: Of the CPU, to run a quantised stem.
        """
        self._backbone = backbone
        self._meter = CodecMeter(backbone, placed, blobs, device=device)
        self._stems = StemMaker(backbone, blobs, num_threads=num_threads)
        self._threads = threads
        self._tables: Shared[_TableKey, CodecTable] = Shared(self._measure_codecs, capacity=_CAPACITY)
        # Of stems only the error is kept: whether the file is still there is asked of storage every time.
        self._int8_made: Shared[Key, StoredExport] = Shared(self._make_int8, capacity=0)
        self._int8_errors: Shared[Key, float] = Shared(self._measure_int8, capacity=_CAPACITY)
        self._costs: Shared[Key, CutCost] = Shared(self._put_together, capacity=_CAPACITY)

    def close(self) -> None:
        """Stop everything that is being measured."""
        for one in (self._tables, self._int8_made, self._int8_errors, self._costs):
            one.cancel()

    async def cost(self, key: Key) -> CutCost:
        """Return what every codec and stem costs at a cut."""
        return await self._costs.get(key)

    async def stem(self, key: Key, precision: str) -> StoredExport:
        """Return a stem, making it if need be.

        Raises:
            WireError: UNSUPPORTED for a precision that is unknown or not offered at this cut.
        """
        spec, cut = self._place(key)
        if precision == FLOAT32:
            return await self._exact(spec, cut)
        if precision != INT8:
            raise WireError(
                ErrorCode.UNSUPPORTED,
                f"there are no stems of precision {precision[:40]!r}; there are {', '.join(PRECISIONS)}",
            )
        stored = await self._int8(key)
        refusal = int8_refusal(stored.embedding_error, spec, cut)
        if refusal:
            raise WireError(ErrorCode.UNSUPPORTED, f"{refusal}. Offered at this cut: {FLOAT32}")
        return stored

    async def use(self, key: Key, codec: str, precision: str, left_s: float | None) -> CodecUse:
        """Return what it does to the embedding that rows were made and sent in some way.

        Args:
            key: Where they enter.
            codec: As ``quantise.codec_of`` says.
            precision: Of the stem that made them.
            left_s: Seconds that the caller has left; None for any time.

        Raises:
            WireError: UNSUPPORTED for a codec that cannot hold the features at this cut; DEADLINE_EXCEEDED if it has
                never been measured and is not measured in time.
        """
        try:
            error = await self._error(key, codec, precision, left_s)
        except TimeoutError as timeout:
            raise WireError(
                ErrorCode.DEADLINE_EXCEEDED,
                f"{codec} features at cut {key[0]!r} and {key[1]} px are sent for the first time and what that does "
                "to the embedding is still being measured; the same call will work in some seconds",
            ) from timeout
        return CodecUse(codec_label(codec, precision), error)

    async def _error(self, key: Key, codec: str, precision: str, left_s: float | None) -> float:
        if codec not in _EXACT:
            table = await self._tables.get((*key, precision), left_s)
            error = table.error(codec)
            if error is None:
                offered = ", ".join(one.codec for one in table.codecs if ZSTD not in one.codec)
                raise WireError(
                    ErrorCode.UNSUPPORTED,
                    f"{codec} cannot hold the features at cut {key[0]!r}: it overflows on sample pictures. Offered "
                    f"there: {offered}",
                )
            return error
        return await self._int8_errors.get(key, left_s) if precision == INT8 else 0.0

    def _place(self, key: Key) -> tuple[BackboneSpec, CutSpec]:
        spec = self._backbone.describe(key[1])
        cut = spec.cut(key[0])
        assert cut is not None
        return spec, cut

    async def _measure_codecs(self, table_key: _TableKey) -> CodecTable:
        name, input_size, precision = table_key
        key = (name, input_size)
        spec, cut = self._place(key)
        meter, threads = self._meter, self._threads
        known = await threads.short(meter.remembered, spec, cut, precision)
        if known is not None:
            return known
        pictures_BHWC = await threads.short(meter.pictures, spec.preprocessing)
        reference = await threads.compute(meter.reference, cut, pictures_BHWC)
        if precision == INT8:
            stem = await self._int8(key)
            features = await threads.export(self._stems.features, stem, pictures_BHWC)
            reference = dataclasses.replace(reference, features=features, error=stem.embedding_error)
        measured = []
        for codec in codecs_at(cut.name):
            coded = await threads.short(meter.coded, cut, codec, reference)
            if coded is None:
                continue
            error = reference.error
            if coded.features is not None:
                # One by one, so that batches have their turn in between.
                error = await threads.compute(meter.error, spec, cut, reference, coded.features)
            measured.append((coded, error))
        table = await threads.short(meter.table, reference, measured)
        await threads.short(meter.remember, spec, cut, precision, table)
        return table

    async def _exact(self, spec: BackboneSpec, cut: CutSpec) -> StoredExport:
        # Looked for off the thread that exports: an old stem need not wait for a new one.
        stored = await self._threads.short(self._stems.find, cut.fingerprint)
        if stored is None:
            return await self._threads.export(self._stems.exact, spec, cut)
        return stored

    async def _int8(self, key: Key) -> StoredExport:
        _, cut = self._place(key)
        stored = await self._threads.short(self._stems.find, cut.int8_fingerprint)
        return await self._int8_made.get(key) if stored is None else stored

    async def _make_int8(self, key: Key) -> StoredExport:
        spec, cut = self._place(key)
        threads = self._threads
        # Again: whoever made it before may have finished since the caller looked.
        found = await threads.short(self._stems.find, cut.int8_fingerprint)
        if found is not None:
            return found
        data = await threads.export(self._stems.quantised, spec, cut)
        pictures_BHWC = await threads.short(self._meter.pictures, spec.preprocessing)
        features = await threads.export(self._stems.run, data, pictures_BHWC)
        reference = await threads.compute(self._meter.reference, cut, pictures_BHWC)
        error = await threads.compute(self._meter.error, spec, cut, reference, features)
        if not math.isfinite(error):
            raise WireError(ErrorCode.UNSUPPORTED, int8_refusal(error, spec, cut))
        return await threads.short(self._stems.keep, cut, data, error)

    async def _measure_int8(self, key: Key) -> float:
        return (await self._int8(key)).embedding_error

    async def _put_together(self, key: Key) -> CutCost:
        _, cut = self._place(key)
        table = await self._tables.get((*key, FLOAT32))
        stems = () if cut.name == INPUT_CUT else await self._stem_costs(key)
        return CutCost(cut, table.codecs, stems, table.jpeg_bytes_per_row, table.sample)

    async def _stem_costs(self, key: Key) -> tuple[StemCost, ...]:
        spec, cut = self._place(key)
        try:
            exact = await self._exact(spec, cut)
        except WireError as error:
            if error.code not in _NOT_OFFERED:
                raise
            return tuple(StemCost(precision, 0, 0.0, error.message) for precision in PRECISIONS)
        costs = [StemCost(FLOAT32, exact.size_bytes, 0.0)]
        try:
            int8 = await self._int8(key)
        except WireError as error:
            if error.code not in _NOT_OFFERED:
                raise
            costs.append(StemCost(INT8, 0, 0.0, error.message))
        else:
            refusal = int8_refusal(int8.embedding_error, spec, cut)
            costs.append(StemCost(INT8, int8.size_bytes, int8.embedding_error, refusal))
        return tuple(costs)
