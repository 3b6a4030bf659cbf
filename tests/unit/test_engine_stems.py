"""Stems: exact and quantised ones, made once, offered within a bound, refused with reasons."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from engines import with_engine
from onnx import numpy_helper
from small_backbones import SIZE, small_backbone
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.preprocess import encode_image, image_from_array
from trunkline_wire.quantise import CODECS, PackedRows, pack, unpack
from trunkline_wire.specs import FLOAT32, INPUT_CUT, INT8, BackboneSpec, CodecUse, CutSpec, StemCost
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.export import STEM_OUTPUT, export_stem, sample_images
from trunkline_worker.backbones.onnx_safety import check_onnx
from trunkline_worker.backbones.samples import Samples
from trunkline_worker.engine import stems
from trunkline_worker.engine.choice import embedding_error
from trunkline_worker.engine.exports import StoredExport
from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.engine.sample import sample_pictures
from trunkline_worker.engine.stems import MAX_INT8_STEM_ERROR, StemMaker
from trunkline_worker.store.blobs import BlobStore

CUT = "norm"
REAL_CUT = "blocks.1"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """One whose sample pictures are small files: generating 32 takes seconds."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, picture in enumerate(sample_images(12, 40).numpy()):
        (folder / f"{index}.png").write_bytes(encode_image(image_from_array(picture)))
    return small_backbone(samples=Samples.from_folder(folder))


@pytest.fixture(scope="module")
def spec(backbone: Backbone) -> BackboneSpec:
    return backbone.describe()


@pytest.fixture(scope="module")
def exported(backbone: Backbone) -> bytes:
    return export_stem(backbone, CUT, SIZE)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(f"file://{tmp_path}/store")


class Tools:
    """Exporter and quantiser in place of those that take seconds. The quantiser rounds the weights."""

    def __init__(self, exported: bytes) -> None:
        self.exported = exported
        self.exports = 0
        self.calibrated: list[np.ndarray] = []
        self.levels = 64.0
        self.broken: WireError | None = None
        self.change: Callable[[onnx.ModelProto], None] = lambda _model: None

    def export(self, _backbone: Backbone, _cut: str, _size: int) -> bytes:
        self.exports += 1
        return self.exported

    def quantise(self, data: bytes, pictures: np.ndarray) -> bytes:
        self.calibrated.append(pictures)
        if self.broken is not None:
            raise self.broken
        model = onnx.load_from_string(data)
        for tensor in model.graph.initializer:
            weights = numpy_helper.to_array(tensor)
            if weights.ndim == 4:
                step = np.abs(weights).max() / self.levels
                tensor.CopyFrom(
                    numpy_helper.from_array((np.round(weights / step) * step).astype(np.float32), tensor.name)
                )
        self.change(model)
        return model.SerializeToString()


@pytest.fixture
def tools(exported: bytes, monkeypatch: pytest.MonkeyPatch) -> Tools:
    made = Tools(exported)
    monkeypatch.setattr(stems, "export_stem", made.export)
    monkeypatch.setattr(stems, "quantise_stem", made.quantise)
    return made


def _cut(spec: BackboneSpec) -> CutSpec:
    found = spec.cut(CUT)
    assert found is not None
    return found


def _error(backbone: Backbone, spec: BackboneSpec, blobs: BlobStore, data: bytes) -> float:
    """Compute the embedding error of a stem's file directly."""
    pictures = sample_pictures(backbone.samples, spec.preprocessing)
    features = StemMaker(backbone, blobs, num_threads=1).run(data, pictures)
    with torch.inference_mode():
        exact = backbone.trunk(CUT)(backbone.stem(CUT)(torch.from_numpy(pictures.copy())))
        got = backbone.trunk(CUT)(torch.from_numpy(features))
    return embedding_error(got, exact, [one for one in spec.slices if one.name in _cut(spec).slices])


async def _refused(call: Awaitable[object], code: ErrorCode, *parts: str) -> None:
    with pytest.raises(WireError) as caught:
        await call
    assert caught.value.code is code, caught.value
    for part in parts:
        assert part in caught.value.message


def test_a_quantised_stem_is_made_once_and_kept_with_its_error(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec, tools: Tools
) -> None:
    async def test(engine: LocalEngine) -> None:
        files = await asyncio.gather(*(engine.stem(CUT, 0, INT8) for _ in range(4)))
        assert (tools.exports, len(tools.calibrated)) == (1, 1)
        assert len(set(files)) == 1
        stem = files[0]
        assert (stem.space, stem.precision) == (spec.space(_cut(spec), INT8), INT8)
        assert stem.space.fingerprint == _cut(spec).int8_fingerprint
        data = blobs.get_checked(stem.path, stem.sha256)
        assert (stem.size_bytes, stem.feature_shape) == (len(data), _cut(spec).feature_shape)
        assert stem.embedding_error == pytest.approx(_error(backbone, spec, blobs, data), rel=1e-2)
        assert 0 < stem.embedding_error <= MAX_INT8_STEM_ERROR
        exact = await engine.stem(CUT, SIZE)
        assert (exact.precision, exact.embedding_error) == (FLOAT32, 0.0)
        assert exact.space == spec.space(_cut(spec))
        assert exact.sha256 != stem.sha256
        cost = await engine.cut_cost(CUT)
        assert cost.stems == (
            StemCost(FLOAT32, exact.size_bytes, 0.0),
            StemCost(INT8, stem.size_bytes, stem.embedding_error),
        )
        blobs.put(stem.path, data[:-1] + b"\x00")  # damaged in storage: made anew
        again = await engine.stem(CUT, SIZE, INT8)
        assert blobs.get_checked(again.path, again.sha256) == data
        assert (tools.exports, len(tools.calibrated)) == (1, 2)

    with_engine(backbone, blobs, test)

    async def later(engine: LocalEngine) -> None:
        assert (await engine.stem(CUT, 0, INT8)).precision == INT8
        assert (await engine.cut_cost(CUT)).stem(INT8) is not None
        assert (tools.exports, len(tools.calibrated)) == (1, 2)

    with_engine(backbone, blobs, later)


def test_codec_and_quantised_stem_are_measured_together(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec, tools: Tools
) -> None:
    cut = _cut(spec)
    pictures = sample_pictures(backbone.samples, spec.preprocessing)
    slices = [one for one in spec.slices if one.name in cut.slices]
    uses: list[CodecUse] = []

    async def test(engine: LocalEngine) -> None:
        stem = await engine.stem(CUT, 0, INT8)
        features = StemMaker(backbone, blobs, num_threads=1).features(
            StoredExport(stem.path, stem.size_bytes, stem.sha256), pictures
        )
        with torch.inference_mode():
            exact = backbone.trunk(CUT)(backbone.stem(CUT)(torch.from_numpy(pictures.copy())))
            for codec in CODECS:
                rows = pack(features, codec, cut.channel_axis)
                held = unpack(rows) if isinstance(rows, PackedRows) else rows.astype(np.float32)
                error = embedding_error(backbone.trunk(CUT)(torch.from_numpy(held)), exact, slices)
                use = (await engine.extract(stem.space, rows)).codec_use
                assert use.codec == f"{codec}@int8"
                assert use.embedding_error == pytest.approx(error, rel=1e-2)
                uses.append(use)
        alone = await engine.cut_cost(CUT)
        for use, codec in zip(uses, CODECS, strict=True):
            cost = alone.codec(codec)
            assert cost is not None
            assert use.embedding_error <= 1.01 * (cost.embedding_error + stem.embedding_error)
            assert use.embedding_error != cost.embedding_error

    with_engine(backbone, blobs, test)

    async def later(engine: LocalEngine) -> None:
        rows = np.zeros((1, *cut.feature_shape), np.float16)
        assert (await engine.extract(spec.space(cut, INT8), rows)).codec_use in uses

    with_engine(backbone, blobs, later)
    assert tools.exports == len(tools.calibrated) == 1


def test_calibration_and_measurement_use_different_pictures(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec, tools: Tools
) -> None:
    async def test(engine: LocalEngine) -> None:
        await engine.stem(CUT, 0, INT8)

    with_engine(backbone, blobs, test)
    (calibrated,) = tools.calibrated
    seen = {one.tobytes() for one in calibrated}
    assert calibrated.dtype == np.uint8
    assert calibrated.shape[1:] == (SIZE, SIZE, 3)
    assert not seen & {one.tobytes() for one in sample_pictures(backbone.samples, spec.preprocessing)}


def test_a_quantised_stem_over_the_bound_is_not_offered(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec, tools: Tools
) -> None:
    tools.levels = 2.0

    async def test(engine: LocalEngine) -> None:
        for _ in range(2):
            await _refused(
                engine.stem(CUT, 0, INT8),
                ErrorCode.UNSUPPORTED,
                "int8 stem of places",
                f"'{CUT}'",
                f"at most {MAX_INT8_STEM_ERROR:g}",
                "Offered at this cut: float32",
            )
        assert len(tools.calibrated) == 1
        int8 = (await engine.cut_cost(CUT)).stem(INT8)
        assert int8 is not None
        assert int8.embedding_error > MAX_INT8_STEM_ERROR
        assert f"{int8.embedding_error:.3g}" in int8.refused
        assert int8.size_bytes > 0
        assert (await engine.stem(CUT)).precision == FLOAT32

    with_engine(backbone, blobs, test)


def test_a_stem_that_cannot_be_quantised_is_refused_with_the_reason(
    backbone: Backbone, blobs: BlobStore, tools: Tools
) -> None:
    tools.broken = WireError(ErrorCode.UNSUPPORTED, "no layer here can be quantised")

    async def test(engine: LocalEngine) -> None:
        cost = await engine.cut_cost(CUT)
        assert cost.stem(INT8) == StemCost(INT8, 0, 0.0, "no layer here can be quantised")
        assert cost.stem(FLOAT32).refused == ""  # type: ignore[union-attr]
        await _refused(engine.stem(CUT, 0, INT8), ErrorCode.UNSUPPORTED, "no layer here")
        tools.broken = None
        assert (await engine.stem(CUT, 0, INT8)).precision == INT8  # not remembered

    with_engine(backbone, blobs, test)


def test_a_failure_that_says_nothing_about_the_stem_is_raised_and_not_remembered(
    backbone: Backbone, blobs: BlobStore, tools: Tools
) -> None:
    tools.broken = WireError(ErrorCode.WORKER_OOM, "no memory")

    async def test(engine: LocalEngine) -> None:
        await _refused(engine.cut_cost(CUT), ErrorCode.WORKER_OOM)
        tools.broken = None
        assert (await engine.cut_cost(CUT)).stem(INT8).refused == ""  # type: ignore[union-attr]

    with_engine(backbone, blobs, test)


def test_a_stem_that_cannot_be_exported_leaves_the_codecs(
    backbone: Backbone, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fails(_backbone: Backbone, cut: str, _size: int) -> bytes:
        calls.append(cut)
        raise WireError(ErrorCode.UNSUPPORTED, "this network cannot be exported")

    monkeypatch.setattr(stems, "export_stem", fails)

    async def test(engine: LocalEngine) -> None:
        cost = await engine.cut_cost(CUT)
        assert cost.stems == tuple(
            StemCost(precision, 0, 0.0, "this network cannot be exported") for precision in (FLOAT32, INT8)
        )
        assert cost.codec("int8") is not None
        assert calls == [CUT]

    with_engine(backbone, blobs, test)


def _overflow(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if numpy_helper.to_array(tensor).ndim == 4:
            weights = np.full_like(numpy_helper.to_array(tensor), np.inf)
            tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))


def _foreign(model: onnx.ModelProto) -> None:
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


@pytest.mark.parametrize(("change", "reason"), [(_overflow, "not finite"), (_foreign, "com.microsoft")])
def test_files_that_nobody_should_run_are_not_kept(
    change: Callable[[onnx.ModelProto], None],
    reason: str,
    backbone: Backbone,
    blobs: BlobStore,
    spec: BackboneSpec,
    tools: Tools,
) -> None:
    tools.change = change

    async def test(engine: LocalEngine) -> None:
        await _refused(engine.stem(CUT, 0, INT8), ErrorCode.UNSUPPORTED, reason)
        assert not blobs.exists(f"stems/{_cut(spec).int8_fingerprint}.json")
        assert reason in (await engine.cut_cost(CUT)).stem(INT8).refused  # type: ignore[union-attr]

    with_engine(backbone, blobs, test)


def test_what_there_is_no_stem_of_is_refused(backbone: Backbone, blobs: BlobStore, tools: Tools) -> None:
    async def test(engine: LocalEngine) -> None:
        await _refused(engine.stem(CUT, 0, "int4"), ErrorCode.UNSUPPORTED, "'int4'", "float32, int8")
        await _refused(engine.stem(INPUT_CUT, 0, INT8), ErrorCode.INVALID_ARGUMENT, "no stem")
        await _refused(engine.stem("blocks.8", 0, INT8), ErrorCode.NOT_FOUND, "blocks.8")
        assert (await engine.cut_cost(INPUT_CUT)).stems == ()
        assert tools.exports == 0

    with_engine(backbone, blobs, test)


def test_a_note_without_an_error_that_is_a_number_is_not_believed(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec, tools: Tools
) -> None:
    async def test(engine: LocalEngine) -> None:
        stem = await engine.stem(CUT, 0, INT8)
        path = f"stems/{_cut(spec).int8_fingerprint}.json"
        note = blobs.get(path)
        for bad in (b"Infinity", b"NaN", b'"x"', b"null"):
            blobs.put(path, note.replace(str(stem.embedding_error).encode(), bad))
            assert await engine.stem(CUT, 0, INT8) == stem
        assert len(tools.calibrated) == 5

    with_engine(backbone, blobs, test)


def test_a_stem_is_exported_and_quantised_for_real(backbone: Backbone, blobs: BlobStore, spec: BackboneSpec) -> None:
    async def test(engine: LocalEngine) -> None:
        await _refused(engine.stem("patch", 0, INT8), ErrorCode.UNSUPPORTED, "no layer")
        stem = await engine.stem(REAL_CUT, 0, INT8)
        data = blobs.get_checked(stem.path, stem.sha256)
        check_onnx(data)
        assert {"QuantizeLinear", "DequantizeLinear"} <= {one.op_type for one in onnx.load_from_string(data).graph.node}
        pictures = sample_pictures(backbone.samples, spec.preprocessing)
        features = StemMaker(backbone, blobs, num_threads=1).run(data, pictures)
        assert features.shape[1:] == stem.feature_shape
        assert features.dtype == np.float32
        result = await engine.extract(stem.space, features)
        assert result.codec_use.codec == "float32@int8"
        assert result.codec_use.embedding_error == stem.embedding_error > 0
        exact = await engine.extract(
            dataclasses.replace(stem.space, fingerprint=spec.cut(REAL_CUT).fingerprint),  # type: ignore[union-attr]
            backbone.stem(REAL_CUT)(torch.from_numpy(pictures.copy())).numpy(),
        )
        error = embedding_error(
            torch.from_numpy(result.embedding_BD), torch.from_numpy(exact.embedding_BD), result.slices
        )
        # Measured by whatever runtime serves.
        assert error == pytest.approx(stem.embedding_error, rel=0.5, abs=2e-3)
        assert [one.name for one in onnx.load_from_string(data).graph.output] == [STEM_OUTPUT]

    with_engine(backbone, blobs, test)
