"""Codecs and quantised stems: what the cluster says they cost, what travels, and what a model makes of it."""

import dataclasses

import fake_backbone
import numpy as np
import pytest
import trunkline
from trunkline_wire import quantise
from trunkline_wire.limits import MAX_CODEC_ERROR
from trunkline_wire.quantise import CODECS, ZSTD

EVERY = [codec + suffix for codec in CODECS for suffix in ("", ZSTD)]


@pytest.fixture
def make_stem(client, server):
    """Make stems at the server's cut."""
    return lambda **keywords: client.stem(
        server.backbone, cut=server.cut, input_size=server.input_size, threads=1, **keywords
    )


@pytest.fixture
def cost(client, server):
    return client.cut_cost(server.backbone, server.cut, input_size=server.input_size)


@pytest.fixture
def int8_stem(make_stem, cost):
    """Make the quantised stem, where the cluster offers one at its cut."""
    if cost.stem("int8").refused:
        with pytest.raises(trunkline.UnsupportedError):
            make_stem(precision="int8")
        pytest.skip(cost.stem("int8").refused)
    return make_stem(precision="int8", codec="int8")


def relative(got, expected):
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


class TestCosts:
    def test_cluster_names_its_codecs(self, client):
        assert set(CODECS) <= set(client.info.codecs)

    def test_sizes_and_errors(self, client, server, cost):
        cut = client.describe(server.backbone, input_size=server.input_size).cut(server.cut)
        assert cost.cut == cut and cost.sample and cost.jpeg_bytes_per_row > 0
        assert {one.codec for one in cost.codecs} == set(EVERY)
        for codec in CODECS:
            plain, packed = cost.codec(codec), cost.codec(codec + ZSTD)
            assert plain.bytes_per_row == quantise.row_bytes(cut.feature_shape, codec, cut.channel_axis)
            assert packed.bytes_per_row <= plain.bytes_per_row
            assert packed.embedding_error == plain.embedding_error
        assert cost.codec("float32").embedding_error < 1e-4
        assert cost.codec("float16").embedding_error < cost.codec("int8").embedding_error
        assert cost.codec("int8").embedding_error < cost.codec("int4").embedding_error

    def test_stems(self, client, server, cost, make_stem):
        exact = cost.stem("float32")
        assert (exact.embedding_error, exact.refused) == (0.0, "")
        assert make_stem().size_bytes == exact.size_bytes and make_stem().stem_error == 0.0
        assert cost.stem("int8") is not None

    def test_pictures_are_files(self, client, server):
        cost = client.cut_cost(server.backbone, "input", input_size=server.input_size)
        # A file may lose something against the pixels it was made from; pixels lose nothing.
        assert cost.codec("images").embedding_error >= 0.0
        rest = [one for one in cost.codecs if one.codec != "images"]
        assert all(one.codec.startswith("uint8") and one.embedding_error == 0.0 for one in rest)

    def test_what_is_no_cut(self, client, server):
        with pytest.raises(trunkline.NotFoundError, match="nowhere") as caught:
            client.cut_cost(server.backbone, "nowhere", input_size=server.input_size)
        assert server.cut in str(caught.value)


@pytest.mark.parametrize("codec", EVERY)
class TestEveryCodec:
    def test_embedding(self, client, server, make_stem, cost, pictures, codec):
        images, _ = pictures(20)
        inexact = 2 * client.describe(server.backbone, input_size=server.input_size).runtime_error
        exact = client.extract(images, stem=make_stem(codec="float32"))
        got = client.extract(images, stem=make_stem(codec=codec), batch_size=6)
        # These are other pictures than the sample, and all slices together.
        assert relative(got, exact) <= 20 * cost.codec(codec).embedding_error + 1e-4 + inexact

    def test_upload(self, client, server, make_stem, pictures, unique, codec):
        images, labels = pictures(9)
        stem = make_stem(codec=codec)
        plain = codec.removesuffix(ZSTD)
        if server.fake is not None:
            server.fake.received_bytes = 0
        data = client.upload(images, labels, name=unique("d"), stem=stem)
        sent = data.report.feature_bytes_sent
        assert data.codec == plain == client.dataset(data.reference).codec
        assert sent <= 9 * stem.row_bytes if stem.compress else sent == 9 * stem.row_bytes
        assert server.fake is None or server.fake.received_bytes == sent
        # What zstd does to a message is no part of a row.
        other = make_stem(codec=plain if stem.compress else codec + ZSTD)
        again = client.upload(images, labels, name=data.name, stem=other)
        assert (again.report.rows_sent, again.version) == (0, data.version)


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8+zstd", "int4"])
def test_model_of_a_codec(client, make_stem, cost, pictures, unique, codec):
    images, labels = pictures(30)
    data = client.upload(images, labels, name=unique("d"), stem=make_stem(codec=codec))
    model = client.train(data, name=unique("m")).result(120)
    plain = codec.removesuffix(ZSTD)
    error = pytest.approx(cost.codec(plain).embedding_error, rel=0.01, abs=1e-6)
    assert model.codec == plain and model.codec_error == error
    prediction = model.predict(images)
    use = prediction.codec_use
    assert (use.codec, use.trained_codec) == (plain, plain)
    assert use.embedding_error == error and use.trained_error == error
    assert prediction.to_dict()["codec_use"]["codec"] == plain and plain in repr(prediction)
    assert prediction.indices.tolist() == labels.tolist()
    assert model.evaluate(images, labels).codec_use.codec == plain


class TestFeaturesAtHand:
    @pytest.mark.parametrize("codec", ["int4", "bfloat16+zstd"])
    def test_are_brought_into_a_codec(self, client, make_stem, pictures, unique, codec):
        images, labels = pictures(8)
        stem = make_stem(codec="float32")
        features = stem(images)
        data = client.upload_features(features, labels, name=unique("d"), space=stem.space, codec=codec)
        assert data.codec == codec.removesuffix(ZSTD)
        again = client.upload_features(features, labels, name=data.name, space=stem.space, codec=codec)
        assert again.report.rows_sent == 0
        other = client.upload_features(features, labels, name=unique("d"), space=stem.space)
        assert (other.codec, other.report.rows_sent) == ("float32", 8)
        embedding = client.extract_features(features, space=stem.space, codec=codec, batch_size=3)
        assert relative(embedding, client.extract_features(features, space=stem.space)) < 0.2

    @pytest.mark.parametrize("codec", ["bfloat16", "int8", "int4"])
    def test_may_be_packed_already(self, client, make_stem, pictures, unique, codec):
        images, labels = pictures(8)
        stem = make_stem(codec=codec)
        packed = stem.pack(stem(images))
        assert packed.codec == codec
        data = client.upload_features(packed, labels, name=unique("d"), space=stem.space)
        assert (data.codec, data.report.feature_bytes_sent) == (codec, 8 * stem.row_bytes)
        np.testing.assert_allclose(
            client.extract_features(packed, space=stem.space),
            client.extract(images, stem=stem),
            rtol=1e-3,
            atol=1e-4,
        )
        model = client.train(data, name=unique("m")).result(120)
        assert model.predict_features(packed).codec_use.codec == codec

    def test_that_do_not_fit(self, client, make_stem, pictures):
        stem = make_stem(codec="int8")
        features = stem(pictures(3)[0])
        packed = stem.pack(features)
        cases = [
            (quantise.pack(features[:, 1:], "int8"), {}, trunkline.ShapeMismatchError),
            (quantise.pack(features, "int8", 1), {}, trunkline.ShapeMismatchError),
            (packed.take([]), {}, trunkline.EmptyBatchError),
            (packed, {"codec": "int4"}, trunkline.InvalidArgumentError),
            (dataclasses.replace(packed, scale_BC=packed.scale_BC * np.nan), {}, trunkline.NotFiniteError),
            (features, {"codec": "int3"}, trunkline.UnsupportedError),
            (np.full_like(features, 1e30), {"codec": "float16"}, trunkline.NotFiniteError),
        ]
        for rows, keywords, error in cases:
            with pytest.raises(error):
                client.upload_features(rows, [0, 1, 0][: len(rows)], name="d", space=stem.space, **keywords)
            with pytest.raises(error):
                client.extract_features(rows, space=stem.space, **keywords)

    def test_pictures_have_no_codec(self, client, server):
        spec = client.describe(server.backbone, input_size=server.input_size)
        cut = spec.cut("input")
        pixels = np.zeros((2, *cut.feature_shape), np.uint8)
        with pytest.raises(trunkline.InvalidArgumentError, match="uint8"):
            client.extract_features(pixels, space=spec.space(cut), codec="int8")


class TestQuantisedStem:
    def test_is_a_stem_of_its_own(self, client, server, make_stem, int8_stem, cost, pictures):
        cut = client.describe(server.backbone, input_size=server.input_size).cut(server.cut)
        assert int8_stem.space.fingerprint == cut.int8_fingerprint != cut.fingerprint
        assert int8_stem.stem_error == pytest.approx(cost.stem("int8").embedding_error, rel=0.01)
        images, _ = pictures(20)
        exact = make_stem(codec="float32")
        got = client.extract(images, stem=make_stem(precision="int8", codec="float32"))
        expected = client.extract(images, stem=exact)
        assert 0 < relative(got, expected) <= 20 * int8_stem.stem_error

    def test_is_kept_beside_the_exact_one(self, server, make_stem, int8_stem, tmp_path):
        make_stem()
        assert len(list((tmp_path / "cache" / "stems").glob("*.onnx"))) == 2
        with server.connect() as again:
            same = again.stem(server.backbone, cut=server.cut, input_size=server.input_size, precision="int8")
            assert (same.stem_error, same.size_bytes) == (int8_stem.stem_error, int8_stem.size_bytes)
        if server.fake is not None:
            assert server.fake.calls["FetchStem"] == 2

    def test_datasets_and_models_tell(self, client, make_stem, int8_stem, cost, pictures, unique):
        images, labels = pictures(30)
        data = client.upload(images, labels, name=unique("d"), stem=int8_stem)
        assert data.codec == "int8@int8" and data.space == int8_stem.space
        exact = client.upload(images, labels, name=unique("e"), stem=make_stem(codec="int8"))
        assert exact.report.rows_sent == 30 and exact.codec == "int8"
        model = client.train(data, name=unique("m")).result(120)
        assert model.codec == "int8@int8"
        assert model.codec_error >= max(cost.stem("int8").embedding_error, cost.codec("int8").embedding_error) * 0.5
        own = model.stem(threads=1)
        assert (own.precision, own.codec) == ("int8", "int8")
        prediction = model.predict(images)
        assert prediction.codec_use.codec == "int8@int8" == prediction.codec_use.trained_codec
        assert prediction.indices.tolist() == labels.tolist()
        # Two stems of one cut do not count as other weights.
        if model.codec_error + cost.codec("float16").embedding_error <= MAX_CODEC_ERROR:
            assert model.predict(images, stem=make_stem()).codec_use.codec == "float16"

    def test_pictures_serve_a_model_of_features(self, client, make_stem, int8_stem, pictures, unique):
        images, labels = pictures(30)
        data = client.upload(images, labels, name=unique("d"), stem=int8_stem)
        model = client.train(data, name=unique("m")).result(120)
        if model.codec_error > MAX_CODEC_ERROR:
            with pytest.raises(trunkline.IncompatibleModelError, match="int8@int8"):
                model.predict(images, stem=False)
            return
        use = model.predict(images, stem=False).codec_use
        assert use.codec in ("images", "uint8") and use.embedding_error == 0.0 and use.trained_codec == "int8@int8"

    def test_features_at_hand(self, client, int8_stem, pictures):
        features = int8_stem(pictures(4)[0])
        assert features.dtype == np.float32
        assert len(client.extract_features(features, space=int8_stem.space)) == 4


class TestChoice:
    @pytest.mark.parametrize("max_error", [None, 1e-4, 0.0])
    def test_auto_takes_the_fewest_bytes_allowed(self, make_stem, cost, max_error):
        stem = make_stem(codec="auto", max_error=max_error)
        bound = MAX_CODEC_ERROR if max_error is None else max_error
        allowed = [one for one in cost.codecs if one.embedding_error <= bound]
        chosen = cost.codec(stem.codec)
        assert chosen in allowed and chosen.bytes_per_row == min(one.bytes_per_row for one in allowed)
        assert stem.codec_error == chosen.embedding_error

    def test_error_of_the_stem_counts(self, make_stem, int8_stem, cost):
        stem_error = cost.stem("int8").embedding_error
        with pytest.raises(trunkline.UnsupportedError, match="float32") as caught:
            make_stem(precision="int8", codec="auto", max_error=stem_error / 2)
        assert "int4" in str(caught.value) and "max_error" in caught.value.hint
        chosen = make_stem(precision="int8", codec="auto", max_error=stem_error + 1e-3)
        assert chosen.codec_error <= 1e-3

    def test_codec_that_is_named_may_be_bounded(self, make_stem, cost):
        error = cost.codec("int4").embedding_error
        assert make_stem(codec="int4", max_error=error * 2).codec_error == error
        with pytest.raises(trunkline.UnsupportedError, match="int4"):
            make_stem(codec="int4", max_error=error / 2)

    @pytest.mark.parametrize(
        ("keywords", "error", "said"),
        [
            ({"codec": "int3"}, trunkline.UnsupportedError, "bfloat16"),
            ({"codec": "zstd"}, trunkline.UnsupportedError, "float16"),
            ({"codec": 7}, trunkline.InvalidArgumentError, "codec is 7"),
            ({"precision": "int4"}, trunkline.UnsupportedError, "float32, int8"),
            ({"codec": "auto", "max_error": -1.0}, trunkline.InvalidArgumentError, "max_error"),
            ({"codec": "auto", "max_error": float("nan")}, trunkline.InvalidArgumentError, "max_error"),
        ],
        ids=str,
    )
    def test_what_cannot_be_asked_for(self, server, make_stem, keywords, error, said):
        with pytest.raises(error, match=said):
            make_stem(**keywords)
        if server.fake is not None:
            assert not server.fake.calls["FetchStem"]

    def test_aliases(self, make_stem):
        assert [make_stem(codec=one).codec for one in ("fp32", "fp16", "bf16+zstd")] == [
            "float32",
            "float16",
            "bfloat16+zstd",
        ]


@pytest.fixture
def coarse_server(server):
    """Leave real clusters out: their stems are refused at cuts of their own."""
    if server.backbone != fake_backbone.NAME:
        pytest.skip("needs a stem that is refused for certain")
    return server


class TestRefusals:
    def test_quantised_stem_that_strays_too_far(self, client, coarse_server):
        for keywords in ({}, {"codec": "auto"}):
            with pytest.raises(trunkline.UnsupportedError, match="over the bound"):
                client.stem(coarse_server.backbone, cut=fake_backbone.COARSE_CUT, precision="int8", **keywords)

    def test_codec_too_far_from_the_trained_one(self, client, coarse_server, pictures, unique, monkeypatch):
        monkeypatch.setattr(fake_backbone, "MAX_CODEC_ERROR", 1e-3)
        images, labels = pictures(12)
        stems = {one: client.stem(coarse_server.backbone, cut="half", codec=one) for one in ("float16", "int4")}
        model = client.train(
            client.upload(images, labels, name=unique("d"), stem=stems["float16"]), name=unique("m")
        ).result(60)
        with pytest.raises(trunkline.IncompatibleModelError, match="float16") as caught:
            model.predict(images, stem=stems["int4"])
        assert "int4" in caught.value.message
        assert model.predict(images, stem=stems["float16"]).codec_use.codec == "float16"


class TestCandidates:
    def test_scores_of_what_was_tried(self, client, make_stem, pictures, unique):
        data = client.upload(*pictures(40), name=unique("d"), stem=make_stem())
        model = client.train(data, name=unique("m"), embedding="auto").result(120)
        scores = [one.score for one in model.candidates]
        # Scores as good as equal are ordered by width.
        assert scores and scores[0] >= max(scores) - 0.01 and scores[-1] <= scores[0]
        assert set(model.candidates[0].slices) == set(model.slices)
        assert all(one.width > 0 for one in model.candidates)
        (listed,) = [one for one in client.models() if one.reference == model.reference]
        assert listed.record.candidates == () and listed.candidates == model.candidates
        assert "sets of slices tried" in model._repr_html_()

    def test_none_where_nothing_was_chosen(self, client, make_stem, pictures, unique):
        data = client.upload(*pictures(30), name=unique("d"), stem=make_stem())
        model = client.train(data, name=unique("m"), embedding="pooled").result(120)
        assert model.candidates == () and "tried" not in model._repr_html_()
