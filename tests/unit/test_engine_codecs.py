"""Packed rows and features of quantised stems through the engine: what is refused, what comes back, what is said."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Awaitable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import with_engine
from small_backbones import SIZE, small_backbone
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import HeadConfig
from trunkline_wire.limits import MAX_CODEC_ERROR
from trunkline_wire.preprocess import encode_image, image_from_array
from trunkline_wire.quantise import CODECS, PackedRows, pack, unpack
from trunkline_wire.specs import FLOAT32, INPUT_CUT, INT8, BackboneSpec, CodecUse, CutSpec, FeatureSpace
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.export import sample_images
from trunkline_worker.engine import costs, stems
from trunkline_worker.engine.checks import check_codec, check_rows, check_space
from trunkline_worker.engine.exports import STEMS, ExportStore
from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.heads.artefact import head_path, head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head, TrainedHead
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.records import ModelRecord

# One row is (C, H, W), (H, W, C), (T, C), a vector.
CUTS = ["patch", "blocks.0", "flatten", "mean"]
CUT = "blocks.1"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return small_backbone()


@pytest.fixture(scope="module")
def spec(backbone: Backbone) -> BackboneSpec:
    return backbone.describe()


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(f"file://{tmp_path}/store")


def _cut(spec: BackboneSpec, name: str = CUT) -> CutSpec:
    found = spec.cut(name)
    assert found is not None
    return found


@torch.inference_mode()
def _features(backbone: Backbone, cut: str, num_rows: int, seed: int = 0) -> np.ndarray:
    return backbone.stem(cut)(sample_images(num_rows, SIZE, seed)).contiguous().numpy()


@torch.inference_mode()
def _embedding(backbone: Backbone, cut: str, features: np.ndarray) -> np.ndarray:
    return backbone.trunk(cut)(torch.from_numpy(features.copy())).numpy()


def _packed(features: np.ndarray, codec: str, cut: CutSpec) -> PackedRows:
    rows = pack(features, codec, cut.channel_axis)
    assert isinstance(rows, PackedRows)
    return rows


def _close(got: np.ndarray, expected: np.ndarray) -> None:
    # The runtime may be bfloat16: its own bound is checked elsewhere.
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()


def _model(blobs: BlobStore, spec: BackboneSpec, **changes: object) -> ModelRecord:
    slices, widths, names = ("pooled",), (spec.slices[-1].width,), ("a", "b")
    module = Head(HeadConfig(), [HeadInput(slices, widths)], len(names))
    module.reset_parameters(torch.Generator().manual_seed(0))
    data = head_to_bytes(TrainedHead(module.eval(), "classification", names))
    sha256 = hashlib.sha256(data).hexdigest()
    blobs.put(head_path(sha256), data)
    record = ModelRecord(
        tenant="me",
        name="m",
        version=1,
        task="classification",
        class_names=names,
        num_outputs=len(names),
        space=spec.space(_cut(spec)),
        embedding_fingerprint=spec.embedding_fingerprint,
        slices=slices,
        metrics={},
        dataset="d@1",
        dataset_digest="",
        head_sha256=sha256,
        versions={},
        job_id="job",
        create_time=0.0,
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


async def _refused(call: Awaitable[object], code: ErrorCode, *parts: str) -> None:
    with pytest.raises(WireError) as caught:
        await call
    assert caught.value.code is code, caught.value
    for part in parts:
        assert part in caught.value.message


@pytest.mark.parametrize("cut", CUTS)
def test_every_codec_gives_the_embedding_of_what_it_holds(
    cut: str, backbone: Backbone, blobs: BlobStore, spec: BackboneSpec
) -> None:
    features = _features(backbone, cut, 5)
    found = _cut(spec, cut)

    async def test(engine: LocalEngine) -> None:
        for codec in CODECS:
            rows = pack(features, codec, found.channel_axis)
            held = unpack(rows) if isinstance(rows, PackedRows) else rows.astype(np.float32)
            result = await engine.extract(spec.space(found), rows)
            _close(result.embedding_BD, _embedding(backbone, cut, held))
            assert result.row_errors == {}
            assert result.codec_use.codec == codec
            known = engine._costs._tables.known((cut, SIZE, FLOAT32))
            # Nothing is measured for what is exact.
            error = 0.0 if codec == FLOAT32 else known.error(codec)  # type: ignore[union-attr]
            assert (known is None) == (codec == FLOAT32)
            assert result.codec_use.embedding_error == error
        assert (await engine.stats()).queued_rows == 0

    with_engine(backbone, blobs, test)


def test_a_large_packed_request_is_unpacked_in_slices_and_in_order(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = _features(backbone, CUT, 23)
    rows = _packed(features, "int8", _cut(spec))
    expected = _embedding(backbone, CUT, unpack(rows))
    sizes: list[int] = []

    def counted(part: PackedRows) -> np.ndarray:
        sizes.append(len(part))
        return unpack(part)

    monkeypatch.setattr("trunkline_worker.engine.decoding.unpack", counted)
    monkeypatch.setattr("trunkline_worker.engine.decoding._SHORT_BYTES", 0)

    async def test(engine: LocalEngine) -> None:
        result = await engine.extract(spec.space(_cut(spec)), rows)
        _close(result.embedding_BD, expected)
        assert sorted(sizes, reverse=True) == [4, 4, 4, 4, 4, 3]
        assert result.timings.decode_s > 0

    with_engine(backbone, blobs, test, max_rows=1)  # four rows of this size in a batch


def test_packed_rows_of_several_callers_share_a_batch(backbone: Backbone, blobs: BlobStore, spec: BackboneSpec) -> None:
    features = _features(backbone, CUT, 4)
    cut = _cut(spec)

    async def test(engine: LocalEngine) -> None:
        payloads = [_packed(features[:1], "int8", cut), features[1:3], _packed(features[3:], "bfloat16", cut)]
        for one in payloads:
            await engine.extract(spec.space(cut), one)
        before = await engine.stats()
        results = await asyncio.gather(*(engine.extract(spec.space(cut), one) for one in payloads))
        assert (await engine.stats()).trunk_calls - before.trunk_calls < len(payloads)
        _close(np.concatenate([one.embedding_BD for one in results]), _embedding(backbone, CUT, features))

    with_engine(backbone, blobs, test)


def test_bad_packed_rows_are_refused_before_they_cost_anything(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec
) -> None:
    cut = _cut(spec, "blocks.0")
    features = _features(backbone, "blocks.0", 2)
    good, bf16 = _packed(features, "int8", cut), _packed(features, "bfloat16", cut)
    scale = good.scale_BC.copy()
    scale[1, 0] = np.nan
    bits = bf16.data_BZ.copy()
    bits[1, 0:2] = 0x80, 0x7F

    async def test(engine: LocalEngine) -> None:
        space = spec.space(cut)
        for rows, code, *parts in [
            (good.take(slice(0, 0)), ErrorCode.EMPTY_BATCH, "at least one"),
            (_packed(features, "int8", _cut(spec, "patch")), ErrorCode.SHAPE_MISMATCH, "axis 0", "axis 2"),
            (_packed(features[:, :2], "int4", cut), ErrorCode.SHAPE_MISMATCH, "(8, 8, 16)", "(2, 8, 16)"),
            (_packed(features[..., :4], "int8", cut), ErrorCode.SHAPE_MISMATCH, "4 channels instead of 16"),
            (dataclasses.replace(good, codec="int3"), ErrorCode.UNSUPPORTED, "int3"),
            (dataclasses.replace(good, data_BZ=good.data_BZ[:, 1:]), ErrorCode.SHAPE_MISMATCH, "data"),
            (dataclasses.replace(good, scale_BC=scale), ErrorCode.NOT_FINITE, "row 1"),
            (dataclasses.replace(bf16, data_BZ=bits), ErrorCode.NOT_FINITE, "row 1"),
        ]:
            await _refused(engine.extract(space, rows), code, *parts)
        images = _packed(np.zeros((1, SIZE, SIZE, 3), np.float32), "int8", _cut(spec, INPUT_CUT))
        await _refused(
            engine.extract(spec.space(spec.cuts[0]), images), ErrorCode.DTYPE_MISMATCH, "uint8 or encoded", "int8"
        )
        assert (await engine.stats()).trunk_calls == 0
        assert engine._costs._tables.known(("blocks.0", SIZE, FLOAT32)) is None

    with_engine(backbone, blobs, test)


def test_rows_at_the_input_are_exact_and_nothing_is_measured_for_them(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec
) -> None:
    images = sample_images(2, SIZE).numpy()

    async def test(engine: LocalEngine) -> None:
        space = spec.space(spec.cuts[0])
        assert (await engine.extract(space, images)).codec_use == CodecUse("uint8")
        files = [encode_image(image_from_array(one)) for one in images]
        assert (await engine.extract(space, files)).codec_use == CodecUse("images")
        model = _model(blobs, spec, codec="int8", codec_error=0.01)
        result = await engine.predict(FeatureSpace("", INPUT_CUT, 0, ""), files, model)
        assert result.codec_use == CodecUse("images", 0.0, "int8", 0.01)
        assert engine._costs._tables.known((INPUT_CUT, SIZE, FLOAT32)) is None

    with_engine(backbone, blobs, test)


def test_a_model_says_what_it_was_trained_on_and_takes_what_is_close_enough(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = _cut(spec)
    features = _features(backbone, CUT, 3)
    rows = _packed(features, "int4", cut)
    real = costs.CodecMeter.error
    monkeypatch.setattr(costs.CodecMeter, "error", lambda *args: 0.04 + 0 * real(*args))

    async def test(engine: LocalEngine) -> None:
        space = spec.space(cut)
        exact = _model(blobs, spec)
        result = await engine.predict(space, rows, exact)
        assert result.codec_use == CodecUse("int4", 0.04, "", 0.0)
        assert result.outputs_BK.shape == (3, 2)
        same = await engine.predict(space, rows, _model(blobs, spec, codec="int4", codec_error=0.3))
        assert same.codec_use == CodecUse("int4", 0.04, "int4", 0.3)
        close = await engine.predict(space, rows, _model(blobs, spec, codec="int8", codec_error=0.01))
        assert close.codec_use == CodecUse("int4", 0.04, "int8", 0.01)
        before = (await engine.stats()).trunk_calls
        for codec, error, payload, *parts in [
            ("int8", 0.02, rows, "m@1", "'int8'", "0.02", "'int4'", "0.04", "0.06 together", "0.05"),
            ("int4", 0.3, features, "'int4'", "0.3", "'float32'", "smaller error"),
        ]:
            model = _model(blobs, spec, codec=codec, codec_error=error)
            await _refused(engine.predict(space, payload, model), ErrorCode.INCOMPATIBLE, *parts)
        assert (await engine.stats()).trunk_calls == before

    with_engine(backbone, blobs, test)


@pytest.mark.parametrize(
    ("use", "taken"),
    [
        (CodecUse("int8", 0.03, "float16", MAX_CODEC_ERROR - 0.03), True),
        (CodecUse("int8", 0.03, "float16", MAX_CODEC_ERROR - 0.029), False),
        (CodecUse("int8", 9.0, "int8", 9.0), True),
        (CodecUse("int8@int8", 0.06, "int8", 0.0), False),
        (CodecUse("float32", 0.0, "", 0.0), True),
        (CodecUse("int4", 0.06, "", 0.0), False),
        (CodecUse("images", 0.0, "int4", 0.051), False),
        (CodecUse("images", float("nan"), "int4", 0.0), False),
    ],
)
def test_which_codecs_go_together(use: CodecUse, taken: bool, blobs: BlobStore, spec: BackboneSpec) -> None:
    model = _model(blobs, spec)
    if taken:
        check_codec(model.reference, use)
        return
    with pytest.raises(WireError, match="m@1") as caught:
        check_codec(model.reference, use)
    assert caught.value.code is ErrorCode.INCOMPATIBLE


def test_a_space_says_which_stem_made_the_rows(backbone: Backbone, spec: BackboneSpec) -> None:
    cut = _cut(spec)
    check = backbone.check_cut
    assert check_space(spec.space(cut), spec, check) == (cut, FLOAT32)
    assert check_space(spec.space(cut, INT8), spec, check) == (cut, INT8)
    with pytest.raises(WireError, match="calibration"):
        check_space(dataclasses.replace(spec.space(cut), fingerprint="ab" * 32), spec, check)
    # The pictures themselves come from no stem.
    with pytest.raises(WireError, match="fingerprint none"):
        check_space(dataclasses.replace(spec.space(spec.cuts[0]), fingerprint=""), spec, check)


def test_a_name_that_is_no_cut_is_answered_by_the_backbone(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec
) -> None:
    features = _features(backbone, CUT, 1)

    async def test(engine: LocalEngine) -> None:
        space = spec.space(_cut(spec))
        for name in ("blocks.7", "head", ""):
            with pytest.raises(WireError) as expected:
                backbone.check_cut(name)
            for call in (
                engine.extract(dataclasses.replace(space, cut=name), features),
                engine.stem(name),
                engine.cut_cost(name),
            ):
                await _refused(call, expected.value.code, expected.value.message)
        other = dataclasses.replace(space, cut="blocks.7", backbone="vgg16")
        await _refused(engine.extract(other, features), ErrorCode.INCOMPATIBLE, "vgg16")

    with_engine(backbone, blobs, test)


def test_exact_rows_of_a_quantised_stem_have_its_error(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec
) -> None:
    cut = _cut(spec)
    features = _features(backbone, CUT, 2)
    ExportStore(blobs).put(STEMS, cut.int8_fingerprint, b"the stem that a client fetched before", 0.0125)

    async def test(engine: LocalEngine) -> None:
        exact = await engine.extract(spec.space(cut, INT8), features)
        assert exact.codec_use == CodecUse("float32@int8", 0.0125)
        _close(exact.embedding_BD, _embedding(backbone, CUT, features))
        for precision in (FLOAT32, INT8):
            assert engine._costs._tables.known((CUT, SIZE, precision)) is None  # not needed

    with_engine(backbone, blobs, test)


def test_errors_of_codecs_need_no_export(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stems, "export_stem", lambda *_args: pytest.fail("exported"))
    features = _features(backbone, CUT, 1).astype(np.float16)

    async def test(engine: LocalEngine) -> None:
        assert (await engine.extract(spec.space(_cut(spec)), features)).codec_use.codec == "float16"

    with_engine(backbone, blobs, test)


def _all_rows(features: np.ndarray, cut: CutSpec) -> Sequence[object]:
    return [pack(features, codec, cut.channel_axis) for codec in CODECS]


@pytest.mark.parametrize("name", CUTS)
def test_rows_in_every_codec_pass_the_checks(name: str, backbone: Backbone, spec: BackboneSpec) -> None:
    cut = _cut(spec, name)
    for rows in _all_rows(_features(backbone, name, 2), cut):
        check_rows(rows, cut, is_input=False)  # type: ignore[arg-type]
