"""What codecs cost at a cut: measured against an independent computation, once, and remembered."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import with_engine
from small_backbones import SIZE, small_backbone
from trunkline_wire.compress import compress
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.preprocess import decode_image
from trunkline_wire.quantise import CODECS, PackedRows, pack, row_bytes, unpack
from trunkline_wire.specs import FLOAT32, INPUT_CUT, CutCost
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.engine import stems
from trunkline_worker.engine.choice import embedding_error
from trunkline_worker.engine.costs import CodecMeter, jpeg_files
from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.engine.sample import NUM_PICTURES
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import ManualClock

# One row is (C, H, W), (H, W, C), (T, C), a vector.
CUTS = ["patch", "blocks.0", "flatten", "mean"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return small_backbone()


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(f"file://{tmp_path}/store")


@pytest.fixture(autouse=True)
def _no_stems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take seconds, and nothing here is about them."""

    def fails(*_args: object) -> bytes:
        raise WireError(ErrorCode.UNSUPPORTED, "no export")

    monkeypatch.setattr(stems, "export_stem", fails)


def _cost(backbone: Backbone, blobs: BlobStore, cut: str) -> CutCost:
    found: list[CutCost] = []

    async def test(engine: LocalEngine) -> None:
        found.append(await engine.cut_cost(cut))

    with_engine(backbone, blobs, test)
    return found[0]


@pytest.mark.parametrize("cut", CUTS)
def test_errors_and_sizes_are_those_of_the_codecs(cut: str, backbone: Backbone, blobs: BlobStore) -> None:
    spec = backbone.describe()
    found = spec.cut(cut)
    assert found is not None
    cost = _cost(backbone, blobs, cut)
    assert cost.cut == found
    assert [one.codec for one in cost.codecs] == [name for codec in CODECS for name in (codec, f"{codec}+zstd")]
    pictures = backbone.samples.held_out(spec.preprocessing, NUM_PICTURES)
    with torch.inference_mode():
        features = backbone.stem(cut)(torch.from_numpy(pictures)).contiguous().numpy()
        exact = backbone.trunk(cut)(torch.from_numpy(features))
    slices = [one for one in spec.slices if one.name in found.slices]
    for codec in CODECS:
        plain, zstd = cost.codec(codec), cost.codec(f"{codec}+zstd")
        assert plain is not None
        assert zstd is not None
        packed = pack(features, codec, found.channel_axis)
        arrived = unpack(packed) if isinstance(packed, PackedRows) else np.asarray(packed, np.float32)
        with torch.inference_mode():
            error = embedding_error(backbone.trunk(cut)(torch.from_numpy(arrived)), exact, slices)
        # A mean over the places of a row adds up in another order where memory is laid out otherwise.
        assert plain.embedding_error == pytest.approx(error, rel=1e-2, abs=1e-6)
        assert zstd.embedding_error == plain.embedding_error
        assert plain.bytes_per_row == row_bytes(found.feature_shape, codec, found.channel_axis)
        data = (packed.data_BZ if isinstance(packed, PackedRows) else packed).tobytes()  # type: ignore[union-attr]
        scales = packed.nbytes - len(data)
        assert zstd.bytes_per_row == (scales + min(len(data), len(compress(data)))) / NUM_PICTURES
    errors = [cost.codec(codec).embedding_error for codec in CODECS]  # type: ignore[union-attr]
    assert errors[0] == 0
    assert 0 < errors[1] < errors[2] < 1
    assert 0 < errors[3] < errors[4] < 1
    assert cost.jpeg_bytes_per_row == sum(map(len, jpeg_files(pictures))) / NUM_PICTURES
    assert cost.sample == f"{NUM_PICTURES} pictures: {backbone.samples.description}"


def test_at_the_input_rows_are_pictures(backbone: Backbone, blobs: BlobStore) -> None:
    cost = _cost(backbone, blobs, INPUT_CUT)
    assert [one.codec for one in cost.codecs] == ["uint8", "uint8+zstd", "images"]
    assert cost.stems == ()
    uint8, zstd, images = cost.codecs
    assert (uint8.bytes_per_row, uint8.embedding_error, zstd.embedding_error) == (SIZE * SIZE * 3, 0, 0)
    assert 0 < zstd.bytes_per_row <= uint8.bytes_per_row
    assert images.bytes_per_row == cost.jpeg_bytes_per_row
    pictures = backbone.samples.held_out(backbone.preprocessing, NUM_PICTURES)
    decoded = np.stack([np.asarray(decode_image(one)) for one in jpeg_files(pictures)])
    with torch.inference_mode():
        trunk = backbone.trunk(INPUT_CUT)
        error = embedding_error(
            trunk(torch.from_numpy(decoded)), trunk(torch.from_numpy(pictures)), backbone.describe().slices
        )
    assert images.embedding_error == pytest.approx(error, rel=1e-2)
    assert error > 0


def test_a_codec_that_cannot_hold_the_features_is_not_offered(blobs: BlobStore) -> None:
    backbone = small_backbone("large")
    spec = backbone.describe()

    async def test(engine: LocalEngine) -> None:
        cost = await engine.cut_cost("first")
        assert not [one.codec for one in cost.codecs if one.codec.startswith("float16")]
        assert cost.codec("bfloat16") is not None
        space = spec.space(cost.cut)
        rows = np.zeros((1, *cost.cut.feature_shape), np.float16)
        with pytest.raises(WireError, match=r"float16 cannot hold.*float32, bfloat16, int8, int4") as caught:
            await engine.extract(space, rows)
        assert caught.value.code is ErrorCode.UNSUPPORTED
        await engine.extract(space, rows.astype(np.float32))
        assert (await engine.cut_cost("second")).codec("float16") is not None

    with_engine(backbone, blobs, test)


def test_an_error_that_is_no_number_is_not_offered(
    backbone: Backbone, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CodecMeter.error
    errors = iter([0.1, float("inf"), float("nan"), 0.2])
    monkeypatch.setattr(CodecMeter, "error", lambda *args: real(*args) and next(errors))
    cost = _cost(backbone, blobs, "blocks.1")
    assert [one.codec for one in cost.codecs if "+" not in one.codec] == ["float32", "float16", "int4"]


def test_callers_share_one_measurement_and_later_engines_read_it(
    backbone: Backbone, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    references: list[str] = []
    real = CodecMeter.reference
    monkeypatch.setattr(CodecMeter, "reference", lambda self, cut, x: references.append(cut.name) or real(self, cut, x))
    found: list[CutCost] = []

    async def test(engine: LocalEngine) -> None:
        found.extend(await asyncio.gather(*(engine.cut_cost(INPUT_CUT) for _ in range(3))))
        found.append(await engine.cut_cost(INPUT_CUT, SIZE))

    with_engine(backbone, blobs, test)
    with_engine(backbone, blobs, test)
    assert references == [INPUT_CUT]
    assert all(one == found[0] for one in found)
    # Other pictures, or another size, is another measurement.
    other = small_backbone(samples=dataclasses.replace(backbone.samples, digest="ab"))
    with_engine(other, blobs, test)
    assert references == [INPUT_CUT] * 2


def test_a_note_that_is_damaged_is_measured_again(backbone: Backbone, blobs: BlobStore) -> None:
    spec = backbone.describe()
    cut = spec.cuts[0]
    expected = _cost(backbone, blobs, INPUT_CUT)
    meter = CodecMeter(backbone, backbone, blobs, device=torch.device("cpu"))
    path = meter._note_path(spec, cut, FLOAT32)
    note = json.loads(blobs.get(path))
    bad = [b"\x00", b"[]", b"{}", b"null"]
    for change in (
        {"codecs": []},
        {"codecs": None},
        {"codecs": [{"codec": "uint8"}]},
        {"jpeg_bytes_per_row": float("nan")},
        {"codecs": [{**note["codecs"][0], "embedding_error": float("inf")}]},
    ):
        bad.append(json.dumps({**note, **change}).encode())
    for data in bad:
        blobs.put(path, data)
        assert meter.remembered(spec, cut, FLOAT32) is None, data
        assert _cost(backbone, blobs, INPUT_CUT) == expected
        assert json.loads(blobs.get(path)) == note


def test_a_measurement_that_fails_is_tried_again(
    backbone: Backbone, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(engine: LocalEngine) -> None:
        with monkeypatch.context() as patch:

            def fails(*_args: object) -> None:
                raise WireError(ErrorCode.WORKER_OOM, "no memory")

            patch.setattr(CodecMeter, "reference", fails)
            for _ in range(2):
                with pytest.raises(WireError, match="no memory"):
                    await engine.cut_cost(INPUT_CUT)
        assert (await engine.cut_cost(INPUT_CUT)).codecs

    with_engine(backbone, blobs, test)


def test_a_full_storage_costs_the_note_not_the_answer(
    backbone: Backbone, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_args: object) -> None:
        raise WireError(ErrorCode.STORAGE_FULL, "full")

    monkeypatch.setattr(BlobStore, "put", full)
    assert _cost(backbone, blobs, INPUT_CUT).codecs
    assert "not kept" in caplog.text


def test_unknown_cuts_and_sizes_are_refused(backbone: Backbone, blobs: BlobStore) -> None:
    async def test(engine: LocalEngine) -> None:
        for cut, size, code, part in [
            ("blocks.9", 0, ErrorCode.NOT_FOUND, "blocks.9"),
            ("", 0, ErrorCode.NOT_FOUND, "no cut"),
            ("blocks.1", 7, ErrorCode.INVALID_ARGUMENT, "32 to 1024"),
        ]:
            with pytest.raises(WireError, match=part) as caught:
                await engine.cut_cost(cut, size)
            assert caught.value.code is code

    with_engine(backbone, blobs, test)


def test_the_first_use_of_a_codec_without_time_is_told_and_measured(backbone: Backbone, blobs: BlobStore) -> None:
    spec = backbone.describe()
    cut = spec.cut("blocks.1")
    assert cut is not None
    rows = np.zeros((2, *cut.feature_shape), np.float16)

    async def test(engine: LocalEngine) -> None:
        await engine.extract(spec.space(cut), rows.astype(np.float32))  # the runtime is ready
        with pytest.raises(WireError, match=r"float16.*first time.*some seconds") as caught:
            await engine.extract(spec.space(cut), rows, timeout_s=0.0)
        assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED
        use = (await engine.extract(spec.space(cut), rows)).codec_use
        assert (use.codec, use.trained_codec) == ("float16", "")
        assert use.embedding_error > 0
        # Known now: a call whose deadline has passed is dropped in the line, not at the measurement.
        with pytest.raises(WireError, match="the deadline passed"):
            await engine.extract(spec.space(cut), rows, timeout_s=0.0)
        assert (await engine.stats()).queued_rows == 0

    with_engine(backbone, blobs, test, clock=ManualClock())
