"""The engine in this process, end to end: checks, batches, heads, images, stems, counters."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import io
from collections.abc import Awaitable
from pathlib import Path

import engines
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import HeadConfig
from trunkline_wire.preprocess import decode_image, preprocess_image
from trunkline_wire.specs import IMAGES, INPUT_CUT, BackboneSpec, FeatureSpace
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.export import sample_images
from trunkline_worker.backbones.onnx_safety import check_onnx
from trunkline_worker.engine import local, stems
from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.heads.artefact import head_path, head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head, TrainedHead
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import ManualClock, SystemClock
from trunkline_worker.store.records import ModelRecord

SIZE = 64
CUT = "layer3"

with_engine = functools.partial(engines.with_engine, patience_s=120)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("resnet18", allow_untrained=True)


@pytest.fixture(scope="module")
def spec(backbone: Backbone) -> BackboneSpec:
    return backbone.describe(SIZE)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(f"file://{tmp_path}/store")


@torch.inference_mode()
def _features(backbone: Backbone, num_rows: int, seed: int = 0) -> tuple[np.ndarray, Tensor]:
    """Return features at the cut and the embedding behind it, computed directly."""
    features = backbone.stem(CUT)(sample_images(num_rows, SIZE, seed))
    return features.contiguous().numpy(), backbone.trunk(CUT)(features)


def _space(spec: BackboneSpec, cut: str = CUT) -> FeatureSpace:
    return spec.space(spec.cut(cut))  # type: ignore[arg-type]


def _close(got: np.ndarray, expected: Tensor, tolerance: float = 0.03) -> None:
    # The runtime may be bfloat16: its own bound is checked elsewhere.
    assert got.shape == tuple(expected.shape)
    assert np.abs(got - expected.numpy()).max() <= tolerance * float(expected.abs().max())


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def _refused(call: Awaitable[object], code: ErrorCode, *parts: str) -> Awaitable[None]:
    async def check() -> None:
        with pytest.raises(WireError) as caught:
            await call
        assert caught.value.code is code, caught.value
        for part in parts:
            assert part in caught.value.message

    return check()


def _model(
    blobs: BlobStore, spec: BackboneSpec, slices: tuple[str, ...], num_outputs: int = 3, seed: int = 0
) -> tuple[ModelRecord, TrainedHead]:
    widths = tuple(one.width for name in slices for one in spec.slices if one.name == name)
    names = tuple(f"class {index}" for index in range(num_outputs))
    module = Head(HeadConfig(), [HeadInput(slices, widths)], num_outputs)
    module.reset_parameters(torch.Generator().manual_seed(seed))
    head = TrainedHead(module.eval(), "classification", names)
    data = head_to_bytes(head)
    sha256 = hashlib.sha256(data).hexdigest()
    blobs.put(head_path(sha256), data)
    record = ModelRecord(
        "me",
        f"m{seed}",
        1,
        "classification",
        names,
        num_outputs,
        _space(spec),
        spec.embedding_fingerprint,
        slices,
        {},
        "d@1",
        "",
        sha256,
        {},
        "job",
        0.0,
    )
    return record, head


def test_extract_gives_the_embedding_behind_the_cut(backbone: Backbone, blobs: BlobStore, spec: BackboneSpec) -> None:
    features, expected = _features(backbone, 5)

    async def test(engine: LocalEngine) -> None:
        everything = await engine.extract(_space(spec), features)
        _close(everything.embedding_BD, expected)
        assert tuple(one.name for one in everything.slices) == spec.cut(CUT).slices  # type: ignore[union-attr]
        assert everything.embedding_BD.dtype == np.float32
        chosen = await engine.extract(_space(spec), features.astype(np.float16), ["pooled", "layer3.mean"])
        assert [(one.name, one.start, one.stop) for one in chosen.slices] == [
            ("pooled", 0, 512),
            ("layer3.mean", 512, 768),
        ]
        _close(chosen.embedding_BD, torch.cat([expected[:, -512:], expected[:, :256]], 1))
        assert chosen.row_errors == {}
        times = chosen.timings
        assert 0 < times.trunk_s <= times.total_s
        assert times.decode_s == 0

    with_engine(backbone, blobs, test)


def test_one_trunk_pass_serves_many_models(backbone: Backbone, blobs: BlobStore, spec: BackboneSpec) -> None:
    features, embedding = _features(backbone, 12)
    wanted = [("pooled",), ("layer4.grid", "layer3.std"), ("layer3.mean", "pooled")]
    models = [_model(blobs, spec, slices, seed=index) for index, slices in enumerate(wanted)]
    ranges = {one.name: one for one in spec.slices}
    first = ranges["layer3.mean"].start

    async def test(engine: LocalEngine) -> None:
        # Warm: the runtime chosen, the heads loaded, so that all of the calls below are in the line at once.
        for model, _ in models:
            await engine.predict(_space(spec), features[:1], model)
        before = await engine.stats()
        calls = [engine.predict(_space(spec), features[row : row + 1], models[row % 3][0]) for row in range(12)]
        results = await asyncio.gather(*calls)
        after = await engine.stats()
        assert after.trunk_calls - before.trunk_calls == 1
        assert after.trunk_rows - before.trunk_rows == 12
        assert after.head_calls - before.head_calls == 3
        assert after.queued_rows == 0
        for row, result in enumerate(results):
            _, head = models[row % 3]
            x = torch.cat(
                [
                    embedding[row : row + 1, ranges[name].start - first : ranges[name].stop - first]
                    for name in head.slices
                ],
                1,
            )
            assert result.outputs_BK.shape == (1, 3)
            np.testing.assert_allclose(result.outputs_BK, head.predict(x).numpy(), atol=0.05)
            assert float(result.outputs_BK.sum()) == pytest.approx(1.0, abs=1e-5)

    with_engine(backbone, blobs, test)


def test_rows_come_back_to_whoever_sent_them(backbone: Backbone, blobs: BlobStore, spec: BackboneSpec) -> None:
    features, expected = _features(backbone, 23)

    async def test(engine: LocalEngine) -> None:
        await engine.extract(_space(spec), features[:1])
        cuts = [(0, 1), (1, 8), (8, 9), (9, 23)]
        results = await asyncio.gather(*(engine.extract(_space(spec), features[a:b]) for a, b in cuts))
        for (a, b), result in zip(cuts, results, strict=True):
            _close(result.embedding_BD, expected[a:b])

    with_engine(backbone, blobs, test, max_rows=1)  # four rows of this size in a batch: requests are cut in slices


def test_images_are_decoded_and_one_bad_one_fails_alone(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec
) -> None:
    pictures = [_png(one) for one in sample_images(9, 100).numpy()]
    pictures[2], pictures[7] = b"no picture", pictures[7][: len(pictures[7]) // 2]
    good = [0, 1, 3, 4, 5, 6, 8]
    images = np.stack([preprocess_image(decode_image(pictures[row]), spec.preprocessing) for row in good])
    with torch.inference_mode():
        expected = backbone.trunk(INPUT_CUT)(torch.from_numpy(images))

    async def test(engine: LocalEngine) -> None:
        result = await engine.extract(_space(spec, INPUT_CUT), pictures)
        assert {row: error.code for row, error in result.row_errors.items()} == {
            2: ErrorCode.CORRUPT_IMAGE,
            7: ErrorCode.CORRUPT_IMAGE,
        }
        assert np.isnan(result.embedding_BD[[2, 7]]).all()
        _close(result.embedding_BD[good], expected)
        assert result.timings.decode_s > 0
        as_arrays = await engine.extract(_space(spec, INPUT_CUT), images)
        _close(as_arrays.embedding_BD, expected)
        all_bad = await engine.extract(_space(spec, INPUT_CUT), [b"x", b"y"])
        assert set(all_bad.row_errors) == {0, 1}
        assert np.isnan(all_bad.embedding_BD).all()

    with_engine(backbone, blobs, test, max_rows=1)


def test_images_for_no_backbone_take_the_models_size(backbone: Backbone, blobs: BlobStore, spec: BackboneSpec) -> None:
    model, head = _model(blobs, spec, ("pooled",))
    picture = _png(sample_images(1, 80).numpy()[0])
    image = preprocess_image(decode_image(picture), spec.preprocessing)[None].copy()
    with torch.inference_mode():
        expected = head.predict(backbone.trunk(INPUT_CUT)(torch.from_numpy(image))[:, -512:])

    async def test(engine: LocalEngine) -> None:
        result = await engine.predict(IMAGES, [picture], model)
        np.testing.assert_allclose(result.outputs_BK, expected.numpy(), atol=0.05)

    with_engine(backbone, blobs, test)


def test_a_row_on_which_the_network_overflows_fails_alone(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec
) -> None:
    features, expected = _features(backbone, 3)
    features[1] = np.finfo(np.float32).max

    async def test(engine: LocalEngine) -> None:
        result = await engine.extract(_space(spec), features)
        assert {row: error.code for row, error in result.row_errors.items()} == {1: ErrorCode.NOT_FINITE}
        assert np.isnan(result.embedding_BD[1]).all()
        _close(result.embedding_BD[[0, 2]], expected[[0, 2]])

    with_engine(backbone, blobs, test)


def test_bad_rows_are_refused_before_they_cost_anything(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec
) -> None:
    features, _ = _features(backbone, 2)
    nan = features.copy()
    nan[1, 0, 0, 0] = np.nan
    infinite = features.copy()
    infinite[0, 0, 0, :2] = [np.inf, -np.inf]
    images = sample_images(1, SIZE).numpy()

    async def test(engine: LocalEngine) -> None:
        at_cut, at_input = _space(spec), _space(spec, INPUT_CUT)
        for space, rows, code, *parts in [
            (at_cut, features[:0], ErrorCode.EMPTY_BATCH, "at least one"),
            (at_input, [], ErrorCode.EMPTY_BATCH, "at least one"),
            (at_cut, features[:, :100], ErrorCode.SHAPE_MISMATCH, "100 channels instead of 256"),
            (at_cut, features[:, :, :2], ErrorCode.SHAPE_MISMATCH, "(256, 4, 4)", "(256, 2, 4)"),
            (at_cut, features[0], ErrorCode.SHAPE_MISMATCH, "(4, 4)"),
            (at_cut, features.astype(np.float64), ErrorCode.DTYPE_MISMATCH, "float64"),
            (at_cut, features.astype(np.uint8), ErrorCode.DTYPE_MISMATCH, "uint8"),
            (at_cut, [b"picture"], ErrorCode.DTYPE_MISMATCH, "enter at cut 'input'"),
            (at_input, images[..., :1], ErrorCode.SHAPE_MISMATCH, "1 channels instead of 3"),
            (at_input, images[:, :50], ErrorCode.SHAPE_MISMATCH, "resize"),
            (at_input, images.astype(np.float32), ErrorCode.DTYPE_MISMATCH, "float32"),
            (at_cut, nan, ErrorCode.NOT_FINITE, "1 of 2 rows", "row 1"),
            (at_cut, infinite, ErrorCode.NOT_FINITE, "row 0"),
            (at_cut, nan.astype(np.float16), ErrorCode.NOT_FINITE, "row 1"),
        ]:
            await _refused(engine.extract(space, rows), code, *parts)  # type: ignore[arg-type]
        assert (await engine.stats()).trunk_calls == 0

    with_engine(backbone, blobs, test)


def test_another_space_is_refused_naming_both_sides(backbone: Backbone, blobs: BlobStore, spec: BackboneSpec) -> None:
    features, _ = _features(backbone, 1)
    space = _space(spec)

    async def test(engine: LocalEngine) -> None:
        for change, code, *parts in [
            ({"backbone": "vgg16"}, ErrorCode.INCOMPATIBLE, "'vgg16'", "'resnet18'"),
            ({"cut": "layer9"}, ErrorCode.NOT_FOUND, "layer9", "layer1, layer2"),
            (
                {"fingerprint": "ab" * 32},
                ErrorCode.INCOMPATIBLE,
                "abababababab",
                space.fingerprint[:12],
                "Fetch the stem again",
            ),
            ({"fingerprint": ""}, ErrorCode.INCOMPATIBLE, "none", space.fingerprint[:12]),
            ({"input_size": 96}, ErrorCode.INCOMPATIBLE, space.fingerprint[:12], "96 px"),
            ({"input_size": 9}, ErrorCode.INVALID_ARGUMENT, "32 to 1024"),
            ({"backbone": "", "fingerprint": ""}, ErrorCode.INCOMPATIBLE, "must name their backbone"),
        ]:
            await _refused(engine.extract(dataclasses.replace(space, **change), features), code, *parts)  # type: ignore[arg-type]

    with_engine(backbone, blobs, test)


def test_a_model_that_does_not_fit_is_refused(backbone: Backbone, blobs: BlobStore, spec: BackboneSpec) -> None:
    features, _ = _features(backbone, 1)
    model, _ = _model(blobs, spec, ("pooled",))
    early, _ = _model(blobs, spec, ("layer1.mean", "pooled"), seed=1)

    async def test(engine: LocalEngine) -> None:
        space = _space(spec)
        other = dataclasses.replace(model, embedding_fingerprint="cd" * 32)
        await _refused(
            engine.predict(space, features, other),
            ErrorCode.INCOMPATIBLE,
            "m0@1",
            "cdcdcdcdcdcd",
            spec.embedding_fingerprint[:12],
        )
        await _refused(engine.predict(space, features, early), ErrorCode.INCOMPATIBLE, "layer1.mean", "'layer1'")
        lying = dataclasses.replace(model, slices=("layer4.mean",))
        await _refused(engine.predict(space, features, lying), ErrorCode.CORRUPT_DATA, "registered")
        gone = dataclasses.replace(model, head_sha256="0" * 64)
        await _refused(engine.predict(space, features, gone), ErrorCode.NOT_FOUND)
        assert (await engine.stats()).trunk_calls == 0

    with_engine(backbone, blobs, test)


def test_unknown_and_early_slices_are_refused_with_what_there_is(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec
) -> None:
    features, _ = _features(backbone, 1)

    async def test(engine: LocalEngine) -> None:
        space = _space(spec)
        await _refused(engine.extract(space, features, ["layer4.men"]), ErrorCode.NOT_FOUND, "layer4.mean", "pooled")
        await _refused(engine.extract(space, features, ["layer2.std"]), ErrorCode.INCOMPATIBLE, "'layer2'")
        await _refused(engine.extract(space, features, ["pooled", "pooled"]), ErrorCode.INVALID_ARGUMENT, "twice")

    with_engine(backbone, blobs, test)


def test_a_deadline_that_has_passed_costs_nothing(backbone: Backbone, blobs: BlobStore, spec: BackboneSpec) -> None:
    features, _ = _features(backbone, 1)

    async def test(engine: LocalEngine) -> None:
        await engine.extract(_space(spec), features)
        before = (await engine.stats()).trunk_calls
        await _refused(engine.extract(_space(spec), features, timeout_s=0.0), ErrorCode.DEADLINE_EXCEEDED)
        await _refused(engine.extract(_space(spec), features, timeout_s=-5.0), ErrorCode.DEADLINE_EXCEEDED)
        assert (await engine.stats()).trunk_calls == before
        # First use of a size with no time to prepare it: said so, and prepared all the same.
        other = backbone.describe(96)
        await _refused(
            engine.extract(other.space(other.cuts[0]), [b"x"], timeout_s=0.0), ErrorCode.DEADLINE_EXCEEDED, "first time"
        )
        assert (INPUT_CUT, 96, "") in engine._runtimes

    with_engine(backbone, blobs, test, clock=ManualClock())


def test_a_full_engine_says_when_to_come_back(backbone: Backbone, blobs: BlobStore, spec: BackboneSpec) -> None:
    pictures = [_png(one) for one in sample_images(6, 64).numpy()]

    async def test(engine: LocalEngine) -> None:
        space = _space(spec, INPUT_CUT)
        await engine.extract(space, pictures[:1])
        calls = [engine.extract(space, pictures) for _ in range(3)]  # six rows each, ten may wait
        results = await asyncio.gather(*calls, return_exceptions=True)
        errors = [one for one in results if isinstance(one, WireError)]
        assert len(errors) == 2
        assert all(one.code is ErrorCode.OVERLOADED and one.retry_delay_s > 0 for one in errors)
        assert (await engine.stats()).queued_rows == 0
        await engine.extract(space, pictures)

    with_engine(backbone, blobs, test, max_queued_rows=10)


def test_a_full_engine_lets_wait_who_wants_to(backbone: Backbone, blobs: BlobStore, spec: BackboneSpec) -> None:
    pictures = [_png(one) for one in sample_images(6, 64).numpy()]

    async def test(engine: LocalEngine) -> None:
        space = _space(spec, INPUT_CUT)
        calls = [engine.extract(space, pictures, wait=True, caller=f"t/{one}") for one in range(4)]  # ten rows may wait
        for result in await asyncio.gather(*calls):
            assert not result.row_errors
        assert (await engine.stats()).queued_rows == 0
        with engine._batcher.hold(6):
            await _refused(engine.extract(space, pictures), ErrorCode.OVERLOADED)
            await _refused(
                engine.extract(space, pictures, timeout_s=0.05, wait=True), ErrorCode.DEADLINE_EXCEEDED, "for room"
            )

    with_engine(backbone, blobs, test, max_queued_rows=10)


def test_the_memory_of_waiting_rows_is_bounded(backbone: Backbone, blobs: BlobStore, spec: BackboneSpec) -> None:
    pictures = [_png(one) for one in sample_images(6, 64).numpy()]
    decoded = 6 * SIZE * SIZE * 3

    async def test(engine: LocalEngine) -> None:
        space = _space(spec, INPUT_CUT)
        with engine._batcher.hold(1, decoded):
            await _refused(engine.extract(space, pictures), ErrorCode.OVERLOADED, "MiB")
        assert not (await engine.extract(space, pictures)).row_errors

    with_engine(backbone, blobs, test, max_queued_bytes=decoded)


def test_memory_that_runs_out_is_named(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, _ = _features(backbone, 2)

    async def test(engine: LocalEngine) -> None:
        await engine.extract(_space(spec), features)
        runtime = engine._runtimes.known((CUT, SIZE, "")).runtime  # type: ignore[union-attr]
        monkeypatch.setattr(
            runtime,
            "run",
            lambda _rows: (_ for _ in ()).throw(RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        )
        await _refused(engine.extract(_space(spec), features), ErrorCode.WORKER_OOM, "fewer rows")

    with_engine(backbone, blobs, test)


def test_a_stem_is_exported_once_for_all_and_found_again(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports: list[str] = []
    export = stems.export_stem

    def counted(backbone: Backbone, cut: str, input_size: int) -> bytes:
        exports.append(cut)
        return export(backbone, cut, input_size)

    monkeypatch.setattr(stems, "export_stem", counted)

    async def test(engine: LocalEngine) -> None:
        files = await asyncio.gather(*(engine.stem("maxpool", SIZE) for _ in range(5)))
        assert exports == ["maxpool"]
        assert len(set(files)) == 1
        stem = files[0]
        assert (stem.precision, stem.embedding_error) == ("float32", 0.0)
        assert stem.space == _space(spec, "maxpool")
        assert (stem.feature_shape, stem.preprocessing) == ((64, 16, 16), spec.preprocessing)
        data = blobs.get_checked(stem.path, stem.sha256)
        assert stem.size_bytes == len(data)
        check_onnx(data)
        assert await engine.stem("maxpool", SIZE) == stem
        assert exports == ["maxpool"]
        blobs.put(stem.path, data[:-1] + b"\x00")  # damaged in storage: made anew
        assert blobs.get_checked((await engine.stem("maxpool", SIZE)).path, stem.sha256) == data
        await _refused(engine.stem("layer9", SIZE), ErrorCode.NOT_FOUND, "layer9")
        await _refused(engine.stem(INPUT_CUT, SIZE), ErrorCode.INVALID_ARGUMENT, "no stem")
        await _refused(engine.stem("maxpool", 7), ErrorCode.INVALID_ARGUMENT, "32 to 1024")

    with_engine(backbone, blobs, test)


def test_describe_says_which_runtime_runs(backbone: Backbone, blobs: BlobStore, spec: BackboneSpec) -> None:
    async def test(engine: LocalEngine) -> None:
        before = await engine.describe(SIZE)
        assert dataclasses.replace(before, device="") == spec
        await engine.extract(_space(spec, INPUT_CUT), sample_images(1, SIZE).numpy())
        after = await engine.describe(SIZE)
        assert after.runtime.startswith("torch-")
        assert after.device == "cpu"
        assert 0 <= after.runtime_error <= 0.02
        await _refused(engine.describe(31), ErrorCode.INVALID_ARGUMENT)

    with_engine(backbone, blobs, test)


def test_closing_finishes_what_was_accepted_and_takes_nothing_new(
    backbone: Backbone, blobs: BlobStore, spec: BackboneSpec
) -> None:
    pictures = [_png(one) for one in sample_images(9, 64).numpy()]

    async def test(engine: LocalEngine) -> None:
        space = _space(spec, INPUT_CUT)
        await engine.extract(space, pictures[:1])
        running = asyncio.ensure_future(engine.extract(space, pictures))
        while not (await engine.stats()).queued_rows:
            await asyncio.sleep(0)
        await engine.close()
        assert not (await running).row_errors
        await _refused(engine.extract(space, pictures), ErrorCode.UNAVAILABLE)
        await _refused(engine.describe(160), ErrorCode.UNAVAILABLE)

    with_engine(backbone, blobs, test, max_rows=1)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused(device: str, backbone: Backbone, blobs: BlobStore) -> None:
    with pytest.raises(WireError) as caught:
        LocalEngine(backbone, blobs, clock=SystemClock(), device=device)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_what_is_worked_out_for_spaces_is_kept_for_some_of_them_only(
    blobs: BlobStore, backbone: Backbone, spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_MAX_TARGETS", 2)
    features, _ = _features(backbone, 1)

    async def test(engine: LocalEngine) -> None:
        spaces = [dataclasses.replace(_space(spec), local_model=f"mine-{index}") for index in range(4)]
        answers = [await engine.extract(space, features, ["pooled"]) for space in (*spaces, *spaces)]
        assert len(engine._targets) == 2
        for one in answers:
            np.testing.assert_array_equal(one.embedding_BD, answers[0].embedding_BD)
        await _refused(engine.extract(spaces[3], features[:, :1], ["pooled"]), ErrorCode.SHAPE_MISMATCH, "channels")
        await _refused(engine.extract(_space(spec), features, ["nope"]), ErrorCode.NOT_FOUND, "nope")
        assert len(engine._targets) == 2

    with_engine(backbone, blobs, test)
