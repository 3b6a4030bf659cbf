"""Codecs and the quantised stem on a real cluster: what is announced is what arrives, and models tell them apart."""

import numpy as np
import pytest
import trunkline
from clusters import digits

pytestmark = pytest.mark.ray

BACKBONE, CUT, SIZE = "efficientnet_lite0", "blocks.2", 96


@pytest.fixture(scope="module")
def client(cluster):
    with cluster.connect() as connected:
        yield connected


@pytest.fixture(scope="module")
def cost(client):
    return client.cut_cost(BACKBONE, CUT, input_size=SIZE)


def stem_of(client, **options):
    return client.stem(BACKBONE, cut=CUT, input_size=SIZE, **options)


def test_features_in_every_codec_change_the_embedding_by_what_was_announced(client, cost):
    pictures, _ = digits(48)
    exact = client.extract(pictures, stem=stem_of(client, codec="float32"))
    errors = {}
    for codec in ("float16", "bfloat16", "int8", "int8+zstd", "int4", "int4+zstd"):
        got = client.extract(pictures, stem=stem_of(client, codec=codec))
        errors[codec] = np.linalg.norm(got - exact) / np.linalg.norm(exact)
        # The announced figure is the worst slice of other pictures; the whole embedding stays near or below it.
        assert errors[codec] <= 2 * cost.codec(codec).embedding_error
    assert errors["int8"] == errors["int8+zstd"]
    assert 0 < errors["float16"] < errors["bfloat16"]
    assert errors["float16"] < errors["int8"] < errors["int4"]


def test_the_codec_that_is_chosen_is_the_smallest_within_the_bound(client, cost):
    for bound in (0.05, 0.001):
        stem = stem_of(client, codec="auto", max_error=bound)
        fits = [one for one in cost.codecs if one.embedding_error <= bound]
        assert cost.codec(stem.codec) == min(fits, key=lambda one: one.bytes_per_row)
    assert cost.codec("int4").embedding_error > 0.001
    with pytest.raises(trunkline.TrunklineError, match="int4"):
        stem_of(client, codec="int4", max_error=0.001)


def test_a_model_of_the_quantised_stem_knows_digits_and_says_what_it_was_trained_on(client, cost):
    offered = cost.stem("int8")
    assert offered.refused == ""
    assert offered.size_bytes < cost.stem("float32").size_bytes
    pictures, labels = digits(500)
    stem = stem_of(client, precision="int8", codec="int8")
    assert stem.space.fingerprint == cost.cut.int8_fingerprint
    data = client.upload(pictures[:300], labels[:300], name="quantised-digits", stem=stem)
    assert data.codec == "int8@int8"
    model = client.train(data, name="quantised-head").result(progress=False)
    assert (model.codec, model.candidates[0].slices) == ("int8@int8", model.slices)
    report = model.evaluate(pictures[300:], labels[300:], stem=stem)
    assert report.accuracy > 0.9
    use = model.predict(pictures[300:310], stem=stem).codec_use
    assert (use.codec, use.trained_codec) == ("int8@int8", "int8@int8")
    assert 0 < use.embedding_error == pytest.approx(use.trained_error)


def test_a_model_refuses_features_whose_codec_is_too_far_from_its_own(client, cost):
    pictures, labels = digits(200)
    coarse = stem_of(client, codec="int4")
    data = client.upload(pictures, labels, name="coarse-digits", stem=coarse)
    model = client.train(data, name="coarse-head", embedding="pooled").result(progress=False)
    exact = stem_of(client, codec="float16")
    together = cost.codec("int4").embedding_error + cost.codec("float16").embedding_error
    if together <= trunkline_bound():
        use = model.predict(pictures[:4], stem=exact).codec_use
        assert (use.codec, use.trained_codec) == ("float16", "int4")
    else:
        with pytest.raises(trunkline.IncompatibleModelError, match=r"int4.*float16|float16.*int4"):
            model.predict(pictures[:4], stem=exact)
    assert model.predict(pictures[:4], stem=coarse).codec_use.codec == "int4"


def trunkline_bound():
    from trunkline_wire.limits import MAX_CODEC_ERROR

    return MAX_CODEC_ERROR
