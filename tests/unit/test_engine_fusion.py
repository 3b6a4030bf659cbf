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
from small_backbones import SIZE as SMALL
from small_backbones import small_backbone
from trunkline_wire.bottleneck import Bottleneck, ChannelLinear
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import HeadConfig
from trunkline_wire.quantise import pack
from trunkline_wire.specs import FeatureSpace, bottleneck_fingerprint, local_space, map_slice, map_tap
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.backbones.export import sample_images
from trunkline_worker.engine.targets import Target
from trunkline_worker.engine.tuning import RuntimeChooser
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


def refuses(code, *parts):
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

        await refuses(ErrorCode.INVALID_ARGUMENT, "another input: edge")(predict(model, None))
        await refuses(ErrorCode.INVALID_ARGUMENT, "has one input")(predict(plain, own))
        await refuses(ErrorCode.SHAPE_MISMATCH, "4 columns for 7 rows")(predict(model, own[:6]))
        await refuses(ErrorCode.SHAPE_MISMATCH, "(7, 3)")(predict(model, own[:, :3]))
        await refuses(ErrorCode.NOT_FINITE, "3")(predict(model, bad))
        await refuses(ErrorCode.DTYPE_MISMATCH, "float64")(predict(model, own.astype(np.float64)))
        await refuses(ErrorCode.SHAPE_MISMATCH, "(28)")(predict(model, own.ravel()))
        assert (await engine.stats()).queued_rows == 0
        other = dataclasses.replace(plain, head_sha256=model.head_sha256)
        await refuses(ErrorCode.CORRUPT_DATA, "m@1")(predict(other, None))

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
        await refuses(ErrorCode.INCOMPATIBLE, "ababababab", "efefefefef")(engine.predict(other, own, model))
        await refuses(ErrorCode.INCOMPATIBLE, "'float16'")(engine.predict(LOCAL, own.astype(np.float16), model))
        await refuses(ErrorCode.SHAPE_MISMATCH, "(rows, 4)")(engine.predict(LOCAL, own[:, :3], model))
        for kind in (np.uint8, np.int64, np.float64):
            wrong = own.astype(kind)
            await refuses(ErrorCode.DTYPE_MISMATCH, wrong.dtype.name)(engine.predict(LOCAL, wrong, model))
        await refuses(ErrorCode.DTYPE_MISMATCH, "images")(engine.predict(LOCAL, [b"picture"] * 7, model))
        await refuses(ErrorCode.NOT_FINITE)(engine.predict(LOCAL, own * np.inf, model))
        await refuses(ErrorCode.EMPTY_BATCH)(engine.predict(LOCAL, own[:0], model))
        await refuses(ErrorCode.INVALID_ARGUMENT, "enter no backbone")(engine.extract(LOCAL, own))
        features_model, _ = publish(blobs, spec, HeadConfig(), (POOLED,))
        await refuses(ErrorCode.INCOMPATIBLE)(engine.predict(LOCAL, own, features_model))
        at_cut = spec.space(spec.cut(CUT))
        await refuses(ErrorCode.INCOMPATIBLE, "'edge'")(engine.predict(at_cut, own, model))
        await refuses(ErrorCode.INVALID_ARGUMENT)(engine.forward(LOCAL, own))
        await refuses(ErrorCode.INVALID_ARGUMENT)(engine.backward(LOCAL, own, own))

    with_engine(backbone, blobs, test)


def test_several_local_models_feed_one_head(backbone, blobs, spec, own):
    other = ModelInput(local_space("other", "ef" * 32), "", ("other",), 2, "float32")
    inputs = (OWN, HeadInput(("other",), (2,)))
    model, head = publish(blobs, spec, HeadConfig(fuse="gate"), inputs, space=LOCAL, more=(other,))
    columns = np.concatenate([own, own[:, :2] * 3], axis=1)

    async def test(engine):
        calls = [engine.predict(LOCAL, columns[at:, :4], model, more_BE=columns[at:, 4:]) for at in range(6)]
        for at, answer in enumerate(await asyncio.gather(*calls)):
            expected = head.predict(torch.from_numpy(columns[at:])).numpy()
            np.testing.assert_allclose(answer.outputs_BK, expected, atol=1e-6)
        await refuses(ErrorCode.INVALID_ARGUMENT, "other")(engine.predict(LOCAL, own, model))

    with_engine(backbone, blobs, test, max_rows=4)


def test_clients_whose_local_models_are_alike_in_name_or_width_do_not_disturb_each_other(backbone, blobs, spec):
    def published(name, width):
        # Whoever names a fingerprint may name any.
        space = local_space(name, LOCAL.fingerprint)
        return space, width, *publish(blobs, spec, HeadConfig(), (HeadInput((name,), (width,)),), space=space)

    ways = [published("edge", 4), published("edge", 5), published("other", 4)]

    async def test(engine):
        for space, width, model, _ in ways:  # loads the heads, so that what follows arrives together
            await engine.predict(space, np.ones((1, width), np.float32), model)
        rows = {width: np.random.default_rng(width).normal(size=(3, width)).astype(np.float32) for width in (4, 5)}
        answers = await asyncio.gather(
            *(engine.predict(space, rows[width], model) for _ in range(3) for space, width, model, _ in ways)
        )
        for answer, (_, width, _, head) in zip(answers, ways * 3, strict=True):
            expected = head.predict(torch.from_numpy(rows[width])).numpy()
            np.testing.assert_allclose(answer.outputs_BK, expected, atol=1e-6)

    with_engine(backbone, blobs, test)


def test_a_convolutional_head_reads_the_map_at_its_tap(backbone, blobs, spec, features, own):
    shape = spec.cut(TAP).map_shape
    assert shape == (512, 2, 2)
    entry = HeadInput((map_slice(TAP),), (2048,), shape)
    config = HeadConfig("conv", channels=(6,), tap=TAP)
    model, head = publish(blobs, spec, config, (entry, OWN), more=MORE)
    space = spec.space(spec.cut(CUT))
    with torch.inference_mode():
        reference = backbone.trunk(CUT, map_slice(TAP))(torch.from_numpy(features))
        expected = head.predict(torch.cat([reference, torch.from_numpy(own)], dim=1)).numpy()

    async def test(engine):
        got = await engine.extract(space, features, (map_slice(TAP),))
        assert [(one.name, one.stop) for one in got.slices] == [("layer4.map", 2048)]
        scale = float(reference.abs().max())
        np.testing.assert_allclose(got.embedding_BD, reference.numpy(), rtol=0, atol=1e-5 * scale)
        answer = await engine.predict(space, features, model, more_BE=own)
        np.testing.assert_allclose(answer.outputs_BK, expected, atol=1e-5)
        # The tap may be the cut itself.
        here = await engine.extract(space, features, (map_slice(CUT),))
        np.testing.assert_array_equal(here.embedding_BD, features.reshape(7, -1))
        await refuses(ErrorCode.INVALID_ARGUMENT, "alone")(engine.extract(space, features, (map_slice(TAP), "pooled")))
        await refuses(ErrorCode.NOT_FOUND, "layer4.map")(engine.extract(space, features, ("fc.map",)))
        await refuses(ErrorCode.INVALID_ARGUMENT, "before the cut 'layer3'", "layer4.map")(
            engine.extract(space, features, ("layer1.map",))
        )
        await refuses(ErrorCode.INVALID_ARGUMENT, "no map", "layer4.map")(
            engine.extract(space, features, ("avgpool.map",))
        )

    with_engine(backbone, blobs, test)


def test_a_map_and_the_embedding_behind_one_cut_are_asked_for_side_by_side(backbone, blobs, spec, features):
    space, names = spec.space(spec.cut(CUT)), ((map_slice(TAP),), ("pooled",), (map_slice(CUT),))

    async def test(engine):
        alone = [(await engine.extract(space, features, name)).embedding_BD for name in names]
        calls = (engine.extract(space, features, name) for name in names * 3)
        for answer, expected in zip(await asyncio.gather(*calls), alone * 3, strict=True):
            np.testing.assert_allclose(answer.embedding_BD, expected, rtol=1e-5, atol=1e-6)

    with_engine(backbone, blobs, test)


def test_the_runtime_of_a_map_is_measured_once_and_found_again(blobs, monkeypatch):
    small = small_backbone()
    spec = small.describe()
    pictures = sample_images(2, SMALL).numpy()
    measured = []
    begin = RuntimeChooser.begin

    def counted(self, key, exported, **options):
        measured.append((key.cut, map_tap(key.whole) or ""))
        return begin(self, key, exported, **options)

    monkeypatch.setattr(RuntimeChooser, "begin", counted)

    async def test(engine):
        for slices in (("blocks.1.map",), ("blocks.3.map",), ("pooled",)):
            await engine.extract(spec.space(spec.cuts[0]), pictures, slices)

    for _ in range(2):  # a second engine reads what the first one found out
        with_engine(small, blobs, test, runtime=None)
    assert measured == [("input", "blocks.1"), ("input", "blocks.3"), ("input", "")]


def test_what_is_one_place_at_the_own_size_is_a_map_at_a_larger_one(blobs):
    deep = small_backbone("deep")
    own, large = deep.describe(), deep.describe(2 * SMALL)
    assert (own.cut("last").map_shape, large.cut("last").map_shape) == ((), (8, 2, 2))

    def pictures(size):
        return sample_images(2, size).numpy()

    async def test(engine):
        got = await engine.extract(large.space(large.cuts[0]), pictures(2 * SMALL), ("last.map",))
        assert got.embedding_BD.shape == (2, 32)
        with torch.inference_mode():
            expected = deep.stem("last")(sample_images(2, 2 * SMALL)).flatten(1).numpy()
        np.testing.assert_allclose(got.embedding_BD, expected, rtol=1e-4, atol=1e-6)
        await refuses(ErrorCode.INVALID_ARGUMENT, "no map")(
            engine.extract(own.space(own.cuts[0]), pictures(SMALL), ("last.map",))
        )

    with_engine(deep, blobs, test)


def bottleneck_at(spec, name, code_channels=6):
    draw = np.random.default_rng(3)
    cut = spec.cut(name)
    channels = cut.feature_shape[cut.channel_axis]

    def layer(outside, inside):
        weight = draw.normal(size=(outside, inside)) / inside**0.5
        return ChannelLinear(weight.astype(np.float32), draw.normal(size=outside).astype(np.float32))

    encoder, decoder = layer(code_channels, channels), layer(channels, code_channels)
    return Bottleneck(spec.space(cut), cut.feature_shape, cut.channel_axis, encoder, decoder, "int8", 0.125)


def decoded_by_torch(made, codes):
    """Decode with a 1x1 convolution, or a linear layer where channels come last."""
    weight, bias = torch.from_numpy(made.decoder.weight), torch.from_numpy(made.decoder.bias)
    codes = torch.from_numpy(codes)
    if made.channel_axis == 0:
        return torch.nn.functional.conv2d(codes, weight[:, :, None, None], bias).numpy()
    return torch.nn.functional.linear(codes, weight, bias).numpy()


@pytest.mark.parametrize("name", ["patch", "norm", "flatten"])
def test_codes_of_every_layout_become_features_again(blobs, name):
    # (C, H, W), (H, W, C), (T, C).
    small = small_backbone()
    spec = small.describe()
    cut, made = spec.cut(name), bottleneck_at(spec, name)
    with torch.inference_mode():
        features = small.stem(name)(sample_images(5, SMALL)).contiguous().numpy()
        codes = made.encoder.apply(features, made.channel_axis)
        expected = small.trunk(name)(torch.from_numpy(decoded_by_torch(made, codes))).numpy()
    assert codes.shape[1:] == made.code_shape
    space = made.code_space(SHA)
    assert space.fingerprint == bottleneck_fingerprint(cut.fingerprint, SHA)

    async def test(engine):
        got = await engine.extract(space, codes)
        np.testing.assert_allclose(got.embedding_BD, expected, rtol=1e-4, atol=1e-5)
        assert (got.codec_use.codec, got.codec_use.embedding_error) == ("float32", 0.125)
        half = await engine.extract(space, codes.astype(np.float16))
        np.testing.assert_allclose(half.embedding_BD, expected, rtol=0.02, atol=0.02)
        packed = await engine.extract(space, pack(codes, "int8", made.channel_axis))
        np.testing.assert_allclose(packed.embedding_BD, expected, rtol=0.1, atol=0.1)
        assert packed.codec_use.codec == "int8"

    with_engine(small, blobs, test, load_bottleneck=lambda _sha256: made)
    # They share a batch with features that came as they are.
    alike = [Target(spec, cut, "float32", spec.slices[-1:], one).key for one in (made, None)]
    assert alike == [(name, SMALL, "")] * 2


def test_models_on_codes_keep_to_their_bottleneck_and_codec(backbone, blobs, spec, features):
    made = bottleneck_at(spec, CUT)
    codes = made.encoder.apply(features, 0)
    space, exact_space = made.code_space(SHA), spec.space(spec.cut(CUT))
    model, head = publish(blobs, spec, HeadConfig(), (POOLED,), space=space, codec="int8")
    exact, _ = publish(blobs, spec, HeadConfig(), (POOLED,))

    async def test(engine):
        packed = pack(codes, "int8", 0)
        answer = await engine.predict(space, packed, model)
        embedding = torch.from_numpy((await engine.extract(space, packed, ("pooled",))).embedding_BD)
        np.testing.assert_allclose(answer.outputs_BK, head.predict(embedding).numpy(), atol=1e-5)
        use = answer.codec_use
        assert (use.codec, use.embedding_error, use.trained_codec) == ("int8", 0.125, "int8")
        await refuses(ErrorCode.INCOMPATIBLE, "'int8'")(engine.predict(space, codes, model))
        await refuses(ErrorCode.INCOMPATIBLE, "bottleneck")(engine.predict(exact_space, features, model))
        await refuses(ErrorCode.INCOMPATIBLE, "bottleneck")(engine.predict(space, packed, exact))
        other = made.code_space("ee" * 32)
        await refuses(ErrorCode.INCOMPATIBLE, "bottleneck eeee")(engine.predict(other, packed, model))

    with_engine(backbone, blobs, test, load_bottleneck=lambda _sha256: made)


def test_other_columns_follow_codes_through_batches(backbone, blobs, spec, features, own):
    made = bottleneck_at(spec, CUT)
    codes, space = made.encoder.apply(features, 0), made.code_space(SHA)
    model, head = publish(blobs, spec, HeadConfig(), (POOLED, OWN), space=space, more=MORE, codec="int8")
    packed = pack(np.concatenate([codes] * 8), "int8", 0)
    many = np.concatenate([own * factor for factor in range(8)])

    async def test(engine):
        answer = await engine.predict(space, packed, model, more_BE=many)
        embedding = (await engine.extract(space, packed, ("pooled",))).embedding_BD
        expected = head.predict(torch.from_numpy(np.concatenate([embedding, many], axis=1))).numpy()
        np.testing.assert_allclose(answer.outputs_BK, expected, atol=1e-5)

    with_engine(backbone, blobs, test, max_rows=1, load_bottleneck=lambda _sha256: made)


def test_codes_that_do_not_fit_are_refused(backbone, blobs, spec, features):
    made = bottleneck_at(spec, CUT)
    codes, space = made.encoder.apply(features, 0), made.code_space(SHA)

    async def test(engine):
        await refuses(ErrorCode.SHAPE_MISMATCH, "(6, ")(engine.extract(space, features))
        await refuses(ErrorCode.SHAPE_MISMATCH, "axis 1")(engine.extract(space, pack(codes, "int8", 1)))
        await refuses(ErrorCode.NOT_FINITE)(engine.extract(space, codes * np.inf))
        await refuses(ErrorCode.DTYPE_MISMATCH, "int32")(engine.extract(space, codes.astype(np.int32)))
        forged = dataclasses.replace(space, fingerprint="00" * 32)
        await refuses(ErrorCode.INCOMPATIBLE, "000000")(engine.extract(forged, codes))
        elsewhere = dataclasses.replace(
            space, cut=TAP, fingerprint=bottleneck_fingerprint(spec.cut(TAP).fingerprint, SHA)
        )
        await refuses(ErrorCode.INCOMPATIBLE, "not for cut 'layer4'")(engine.extract(elsewhere, codes))

    with_engine(backbone, blobs, test, load_bottleneck=lambda _sha256: made)
    wrong = dataclasses.replace(made, feature_shape=(256, 9, 9))

    async def of_another_shape(engine):
        await refuses(ErrorCode.INCOMPATIBLE, "not for cut 'layer3'")(engine.extract(space, codes))

    with_engine(backbone, blobs, of_another_shape, load_bottleneck=lambda _sha256: wrong)

    async def without(engine):
        await refuses(ErrorCode.UNSUPPORTED, "no bottlenecks")(engine.extract(space, codes))

    with_engine(backbone, blobs, without)


def test_a_bottleneck_is_loaded_once_for_all_and_a_failure_is_not_kept(backbone, blobs, spec, features):
    made = bottleneck_at(spec, CUT)
    codes, space = made.encoder.apply(features, 0), made.code_space(SHA)
    loaded = []

    def load(sha256):
        loaded.append(sha256)
        if len(loaded) == 1:
            raise WireError(ErrorCode.NOT_FOUND, "no such file")
        return made

    async def test(engine):
        await refuses(ErrorCode.NOT_FOUND, "no such file")(engine.extract(space, codes))
        await asyncio.gather(*(engine.extract(space, codes) for _ in range(4)))
        assert loaded == [SHA, SHA]

    with_engine(backbone, blobs, test, load_bottleneck=load)


def test_a_stem_of_ones_own_is_taken_at_its_word_and_models_keep_to_it(backbone, blobs, spec, features):
    space = FeatureSpace(spec.name, CUT, SIZE, "aa" * 32, local_model="mine")
    model, _ = publish(blobs, spec, HeadConfig(), (POOLED,), space=space, codec="float16")

    async def test(engine):
        half = features.astype(np.float16)
        got = await engine.extract(space, half)
        assert got.embedding_BD.shape[0] == 7
        assert (await engine.predict(space, half, model)).outputs_BK.shape == (7, 3)
        await refuses(ErrorCode.INCOMPATIBLE, "'float16'")(engine.predict(space, features, model))
        other = dataclasses.replace(space, fingerprint="bb" * 32)
        await refuses(ErrorCode.INCOMPATIBLE, "'mine'", "bbbb")(engine.predict(other, half, model))
        await refuses(ErrorCode.INCOMPATIBLE, "'mine'")(engine.predict(spec.space(spec.cut(CUT)), half, model))
        await refuses(ErrorCode.SHAPE_MISMATCH)(engine.extract(space, half[:, :5]))

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
