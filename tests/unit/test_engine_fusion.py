"""Heads on several inputs, on local features alone, on maps, and behind a bottleneck: in this process."""

import asyncio
import dataclasses
import functools
import hashlib
import io

import engines
import numpy as np
import pytest
import torch
from PIL import Image
from trunkline_wire.bottleneck import Bottleneck, ChannelLinear
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import HeadConfig
from trunkline_wire.quantise import pack
from trunkline_wire.specs import FeatureSpace, bottleneck_fingerprint, local_space, map_slice
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.embedding import map_shape
from trunkline_worker.backbones.export import sample_images
from trunkline_worker.heads.artefact import head_path, head_to_bytes
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head, TrainedHead
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.records import ModelInput, ModelRecord

SIZE, CUT, TAP = 64, "layer3", "layer4"
LOCAL = local_space("edge", "ab" * 32)
SHA = "cd" * 32

with_engine = functools.partial(engines.with_engine, patience_s=120)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("resnet18", allow_untrained=True)


@pytest.fixture(scope="module")
def spec(backbone):
    return backbone.describe(SIZE)


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(f"file://{tmp_path}/store")


@pytest.fixture(scope="module")
def features(backbone):
    with torch.inference_mode():
        return backbone.stem(CUT)(sample_images(7, SIZE, 0)).contiguous().numpy()


@pytest.fixture(scope="module")
def own():
    return np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)


def publish(blobs, spec, config, inputs, *, space=None, more=(), codec="float32"):
    """Store a head with drawn numbers and return its model and itself."""
    module = Head(config, inputs, 3)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    head = TrainedHead(module.eval(), "classification", ("a", "b", "c"))
    data = head_to_bytes(head)
    sha256 = hashlib.sha256(data).hexdigest()
    blobs.put(head_path(sha256), data)
    record = ModelRecord(
        tenant="me",
        name="m",
        version=1,
        task="classification",
        class_names=head.class_names,
        num_outputs=3,
        space=space or spec.space(spec.cut(CUT)),
        embedding_fingerprint="" if space is not None and space.is_local else spec.embedding_fingerprint,
        slices=head.slices,
        metrics={},
        dataset="d@1",
        dataset_digest="",
        head_sha256=sha256,
        versions={},
        job_id="job",
        create_time=0.0,
        codec=codec,
        more_inputs=more,
        head=config,
    )
    return record, head


POOLED = HeadInput(("pooled",), (512,))
OWN = HeadInput(("edge",), (4,))
MORE = (ModelInput(LOCAL, "", ("edge",), 4, "float32"),)


def refuses(engine, code, *parts):
    async def check(call):
        with pytest.raises(WireError) as caught:
            await call
        assert caught.value.code is code, caught.value
        for part in parts:
            assert part in caught.value.message

    return check


def test_other_columns_follow_their_rows_through_batches_and_concurrent_callers(backbone, blobs, spec, features, own):
    model, head = publish(blobs, spec, HeadConfig("mlp", (8,), fuse="add"), (POOLED, OWN), more=MORE)
    plain, plain_head = publish(blobs, spec, HeadConfig(), (POOLED,))
    space = spec.space(spec.cut(CUT))

    async def test(engine):
        embedding = (await engine.extract(space, features, ("pooled",))).embedding_BD
        expected = head.predict(torch.from_numpy(np.concatenate([embedding, own], axis=1))).numpy()
        many = np.concatenate([features] * 6), np.concatenate([own] * 6)
        answers = await asyncio.gather(
            engine.predict(space, many[0], model, more_BE=many[1]),
            engine.predict(space, features[::-1], model, more_BE=own[::-1]),
            engine.predict(space, features, plain),
            engine.predict(space, features[:1], model, more_BE=own[:1]),
        )
        np.testing.assert_allclose(answers[0].outputs_BK, np.concatenate([expected] * 6), atol=1e-5)
        np.testing.assert_allclose(answers[1].outputs_BK, expected[::-1], atol=1e-5)
        np.testing.assert_allclose(
            answers[2].outputs_BK, plain_head.predict(torch.from_numpy(embedding)).numpy(), atol=1e-5
        )
        np.testing.assert_allclose(answers[3].outputs_BK, expected[:1], atol=1e-5)

    with_engine(backbone, blobs, test, max_rows=4)


def test_a_picture_that_cannot_be_read_takes_no_other_rows_columns(backbone, blobs, spec, own):
    cut = spec.cut("input")
    model, head = publish(blobs, spec, HeadConfig(), (POOLED, OWN), space=spec.space(cut), more=MORE, codec="images")
    pictures = np.random.default_rng(1).integers(0, 255, size=(7, SIZE, SIZE, 3), dtype=np.uint8)

    def png(one):
        file = io.BytesIO()
        Image.fromarray(one).save(file, "PNG")
        return file.getvalue()

    files = [png(one) for one in pictures]
    files[2] = b"no picture"

    async def test(engine):
        answer = await engine.predict(spec.space(cut), files, model, more_BE=own)
        assert set(answer.row_errors) == {2}
        good = [0, 1, 3, 4, 5, 6]
        embedding = (await engine.extract(spec.space(cut), [files[one] for one in good], ("pooled",))).embedding_BD
        expected = head.predict(torch.from_numpy(np.concatenate([embedding, own[good]], axis=1))).numpy()
        np.testing.assert_allclose(answer.outputs_BK[good], expected, atol=1e-5)

    with_engine(backbone, blobs, test, max_rows=4)


def test_columns_that_do_not_fit_are_refused(backbone, blobs, spec, features, own):
    model, _ = publish(blobs, spec, HeadConfig(), (POOLED, OWN), more=MORE)
    plain, _ = publish(blobs, spec, HeadConfig(), (POOLED,))
    space = spec.space(spec.cut(CUT))
    bad = own.copy()
    bad[3, 1] = np.nan

    async def test(engine):
        def predict(record, more):
            return engine.predict(space, features, record, more_BE=more)

        await refuses(engine, ErrorCode.INVALID_ARGUMENT, "another input: edge")(predict(model, None))
        await refuses(engine, ErrorCode.INVALID_ARGUMENT, "has one input")(predict(plain, own))
        await refuses(engine, ErrorCode.SHAPE_MISMATCH, "4 columns for 7 rows")(predict(model, own[:6]))
        await refuses(engine, ErrorCode.SHAPE_MISMATCH, "(7, 3)")(predict(model, own[:, :3]))
        await refuses(engine, ErrorCode.NOT_FINITE, "3")(predict(model, bad))
        other = dataclasses.replace(plain, head_sha256=model.head_sha256)
        await refuses(engine, ErrorCode.CORRUPT_DATA, "m@1")(predict(other, None))

    with_engine(backbone, blobs, test)


def test_local_features_alone_need_no_trunk(backbone, blobs, spec, own):
    model, head = publish(blobs, spec, HeadConfig("mlp", (8,)), (OWN,), space=LOCAL)
    packed, _ = publish(blobs, spec, HeadConfig("mlp", (8,)), (OWN,), space=LOCAL, codec="int8")
    expected = head.predict(torch.from_numpy(own)).numpy()

    async def test(engine):
        answer = await engine.predict(LOCAL, own, model)
        np.testing.assert_allclose(answer.outputs_BK, expected, atol=1e-6)
        assert answer.codec_use.codec == "float32"
        lossy = await engine.predict(LOCAL, pack(own, "int8", 0), packed)
        np.testing.assert_allclose(lossy.outputs_BK, expected, atol=0.02)
        assert (await engine.stats()).trunk_rows == 0
        other = local_space("edge", "ef" * 32)
        await refuses(engine, ErrorCode.INCOMPATIBLE, "ababababab", "efefefefef")(engine.predict(other, own, model))
        await refuses(engine, ErrorCode.INCOMPATIBLE, "'float16'")(engine.predict(LOCAL, own.astype(np.float16), model))
        await refuses(engine, ErrorCode.SHAPE_MISMATCH, "(rows, 4)")(engine.predict(LOCAL, own[:, :3], model))
        await refuses(engine, ErrorCode.DTYPE_MISMATCH, "floats")(engine.predict(LOCAL, own.astype(np.uint8), model))
        await refuses(engine, ErrorCode.NOT_FINITE)(engine.predict(LOCAL, own * np.inf, model))
        await refuses(engine, ErrorCode.EMPTY_BATCH)(engine.predict(LOCAL, own[:0], model))
        await refuses(engine, ErrorCode.INVALID_ARGUMENT, "enter no backbone")(engine.extract(LOCAL, own))
        features_model, _ = publish(blobs, spec, HeadConfig(), (POOLED,))
        await refuses(engine, ErrorCode.INCOMPATIBLE)(engine.predict(LOCAL, own, features_model))

    with_engine(backbone, blobs, test)


def test_a_convolutional_head_reads_the_map_at_its_tap(backbone, blobs, spec, features, own):
    shape = spec.cut(TAP).map_shape
    assert shape == (512, 2, 2)
    entry = HeadInput((map_slice(TAP),), (2048,), shape)
    config = HeadConfig("conv", channels=(6,), tap=TAP)
    model, head = publish(blobs, spec, config, (entry, OWN), more=MORE)
    space = spec.space(spec.cut(CUT))
    with torch.inference_mode():
        reference = backbone.trunk(CUT, TAP)(torch.from_numpy(features))
        expected = head.predict(torch.cat([reference, torch.from_numpy(own)], dim=1)).numpy()

    async def test(engine):
        got = await engine.extract(space, features, (map_slice(TAP),))
        assert [(one.name, one.stop) for one in got.slices] == [("layer4.map", 2048)]
        scale = float(reference.abs().max())
        assert np.abs(got.embedding_BD - reference.numpy()).max() <= 0.02 * scale  # the runtime may be bfloat16
        answer = await engine.predict(space, features, model, more_BE=own)
        np.testing.assert_allclose(answer.outputs_BK, expected, atol=0.02)
        # The tap may be the cut itself.
        here = await engine.extract(space, features, (map_slice(CUT),))
        np.testing.assert_allclose(here.embedding_BD, features.reshape(7, -1), rtol=1e-2, atol=1e-6)
        await refuses(engine, ErrorCode.INVALID_ARGUMENT, "alone")(
            engine.extract(space, features, (map_slice(TAP), "pooled"))
        )
        await refuses(engine, ErrorCode.NOT_FOUND, "layer4.map")(engine.extract(space, features, ("fc.map",)))
        await refuses(engine, ErrorCode.INVALID_ARGUMENT, "before the cut")(
            engine.extract(space, features, ("layer1.map",))
        )

    with_engine(backbone, blobs, test)


def test_maps_of_every_layout_are_channels_first():
    assert map_shape((512, 7, 7)) == (512, 7, 7)
    assert map_shape((14, 14, 96)) == (96, 14, 14)
    assert map_shape((197, 768)) == (768, 14, 14)
    assert map_shape((10, 768)) == (768, 3, 3)
    assert map_shape((512,)) == ()
    assert map_shape((512, 1, 1)) == ()


def test_the_map_of_tokens_leaves_out_those_that_stand_for_no_place():
    vit = load_backbone("timm/test_vit", allow_untrained=True)
    spec = vit.describe()
    tap = next(one for one in reversed(spec.cuts) if one.is_stage and one.map_shape)
    channels, height, width = tap.map_shape
    with torch.inference_mode():
        tokens = vit.stem(tap.name)(sample_images(2, spec.preprocessing.input_size, 0))
        flat = vit.trunk(tap.name, tap.name)(tokens)
    assert tokens.shape[1] == height * width + 1
    expected = tokens[:, 1:].permute(0, 2, 1).reshape(2, channels, height, width)
    torch.testing.assert_close(flat.view(2, channels, height, width), expected)


def bottleneck(spec, codec="float32"):
    draw = np.random.default_rng(3)
    cut = spec.cut(CUT)
    encoder = ChannelLinear(draw.normal(size=(6, 256)).astype(np.float32) / 16, np.zeros(6, np.float32))
    decoder = ChannelLinear(draw.normal(size=(256, 6)).astype(np.float32), draw.normal(size=256).astype(np.float32))
    return Bottleneck(spec.space(cut), cut.feature_shape, 0, encoder, decoder, codec, 0.125)


def test_codes_of_a_bottleneck_become_features_again(backbone, blobs, spec, features):
    made = bottleneck(spec)
    codes = made.encoder.apply(features, 0)
    weight = torch.from_numpy(made.decoder.weight)[:, :, None, None]
    decoded = torch.nn.functional.conv2d(torch.from_numpy(codes), weight, torch.from_numpy(made.decoder.bias)).numpy()
    np.testing.assert_allclose(made.decoder.apply(codes, 0), decoded, rtol=1e-4, atol=1e-4)
    cut = spec.cut(CUT)
    space = FeatureSpace(spec.name, CUT, SIZE, bottleneck_fingerprint(cut.fingerprint, SHA), bottleneck=SHA)
    model, _ = publish(blobs, spec, HeadConfig(), (POOLED,), space=space, codec="int8")
    exact, _ = publish(blobs, spec, HeadConfig(), (POOLED,))
    loaded = []

    def load(sha256):
        loaded.append(sha256)
        return made

    async def test(engine):
        got = await engine.extract(space, codes)
        plain = await engine.extract(spec.space(cut), decoded)
        np.testing.assert_allclose(got.embedding_BD, plain.embedding_BD, rtol=1e-3, atol=1e-4)
        assert got.codec_use.embedding_error == 0.125
        answer = await engine.predict(space, pack(codes, "int8", 0), model)
        assert (answer.codec_use.codec, answer.codec_use.trained_codec) == ("int8", "int8")
        assert loaded == [SHA]
        await refuses(engine, ErrorCode.INCOMPATIBLE, "'int8'")(engine.predict(space, codes, model))
        await refuses(engine, ErrorCode.INCOMPATIBLE, "bottleneck")(engine.predict(spec.space(cut), features, model))
        await refuses(engine, ErrorCode.INCOMPATIBLE, "bottleneck")(engine.predict(space, codes, exact))
        await refuses(engine, ErrorCode.SHAPE_MISMATCH, "(6, ")(engine.extract(space, features))
        forged = dataclasses.replace(space, fingerprint="00" * 32)
        await refuses(engine, ErrorCode.INCOMPATIBLE)(engine.extract(forged, codes))
        elsewhere = FeatureSpace(
            spec.name,
            TAP,
            SIZE,
            bottleneck_fingerprint(spec.cut(TAP).fingerprint, SHA),
            bottleneck=SHA,
        )
        await refuses(engine, ErrorCode.INCOMPATIBLE, "not for cut 'layer4'")(engine.extract(elsewhere, codes))

    with_engine(backbone, blobs, test, load_bottleneck=load)

    async def without(engine):
        await refuses(engine, ErrorCode.UNSUPPORTED)(engine.extract(space, codes))

    with_engine(backbone, blobs, without)


def test_a_stem_of_ones_own_is_taken_at_its_word_and_models_keep_to_it(backbone, blobs, spec, features):
    space = FeatureSpace(spec.name, CUT, SIZE, "aa" * 32, local_model="mine")
    model, _ = publish(blobs, spec, HeadConfig(), (POOLED,), space=space, codec="float16")

    async def test(engine):
        half = features.astype(np.float16)
        got = await engine.extract(space, half)
        assert got.embedding_BD.shape[0] == 7
        assert (await engine.predict(space, half, model)).outputs_BK.shape == (7, 3)
        await refuses(engine, ErrorCode.INCOMPATIBLE, "'float16'")(engine.predict(space, features, model))
        other = dataclasses.replace(space, fingerprint="bb" * 32)
        await refuses(engine, ErrorCode.INCOMPATIBLE, "'mine'", "bbbb")(engine.predict(other, half, model))
        await refuses(engine, ErrorCode.INCOMPATIBLE, "'mine'")(engine.predict(spec.space(spec.cut(CUT)), half, model))
        await refuses(engine, ErrorCode.SHAPE_MISMATCH)(engine.extract(space, half[:, :5]))

    with_engine(backbone, blobs, test)


def test_a_reader_computes_some_slices_and_nothing_else(backbone, spec, features):
    behind = [one for one in spec.slices if one.name in spec.cut(CUT).slices]
    with torch.inference_mode():
        whole = backbone.trunk(CUT)(torch.from_numpy(features))
        for names in (("pooled",), ("layer4.std", "layer3.grid"), ("pooled", "layer3.mean")):
            got = backbone.reader(CUT, names)(torch.from_numpy(features))
            columns = [
                whole[:, one.start - behind[0].start : one.stop - behind[0].start]
                for name in names
                for one in behind
                if one.name == name
            ]
            torch.testing.assert_close(got, torch.cat(columns, dim=1))
    early = backbone.reader(CUT, ("layer3.mean",))
    assert not any(node.target == "layer4" or "layer4" in str(node.target) for node in early[0].graph.nodes)
