"""How rows become batches, and answers become one: without a server."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from trunkline import errors, local_model
from trunkline._calls import Batch, MoreRows, RawPrediction
from trunkline._features import Features, check_features, rows_per_chunk
from trunkline._feeds import FeatureFeed, ImageFeed, JoinedFeed, LocalModelFeed
from trunkline._inference import Collector, run
from trunkline._row_sources import FeatureRows, ImageRows
from trunkline.images import pictures
from trunkline_wire.limits import CHUNK_BYTES, MAX_BATCH_ROWS, MAX_PAYLOAD_BYTES
from trunkline_wire.quantise import PackedRows, codec_of, pack, parse_codec, row_bytes, unpack
from trunkline_wire.specs import CodecUse, CutSpec, FeatureSpace, Preprocessing, Timings

SPACE = FeatureSpace("net", "half", 8, "ab" * 32)
PREPROCESSING = Preprocessing(8, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def answer(batch, error_rows=()):
    outputs = np.array([[row, 1.0] for row in batch.row_numbers], np.float32)
    failed = {row: errors.CorruptImageError("bad") for row in error_rows}
    return RawPrediction("m@1", outputs, tuple(map(str, batch.row_numbers)), failed, Timings(total_s=1.0))


def at_hand(features, space=SPACE, codec=None):
    """Check features at a cut of their own shape."""
    cut = CutSpec("half", features.shape[1:], space.fingerprint, ())
    return Features(features, space, cut, None if codec is None else parse_codec(codec))


def feed(rows=10):
    return FeatureFeed(at_hand(np.zeros((rows, 3), np.float16)))


def test_answers_in_any_order_are_put_in_place():
    def backwards(batches, window):
        assert window == 4
        return ((batch, answer(batch)) for batch in reversed(list(batches)))

    found = run(feed(), batch_size=3, max_in_flight=4, one=answer, many=backwards)
    assert found.matrix_NX[:, 0].tolist() == list(range(10))
    assert found.labels == [str(row) for row in range(10)] and found.timings.total_s == 4.0


def test_one_batch_needs_no_stream():
    found = run(feed(3), batch_size=None, max_in_flight=4, one=answer, many=None)
    assert len(found.matrix_NX) == 3


def test_failed_rows_have_no_answer():
    collector = Collector(feed(4))
    collector.take(Batch(None, (0, 1)), answer(Batch(None, (0, 1)), error_rows=[1]))
    collector.take(Batch(None, (2, 3)), errors.WorkerOutOfMemoryError("no room"))
    found = collector.collect()
    assert sorted(found.errors) == [1, 2, 3] and found.labels == ["0", None, None, None]
    assert np.isnan(found.matrix_NX[1:]).all() and not np.isnan(found.matrix_NX[0]).any()


def test_first_error_is_raised_where_nothing_went_well():
    collector = Collector(feed(2))
    collector.take(Batch(None, (1,)), errors.WorkerOutOfMemoryError("second"))
    collector.take(Batch(None, (0,)), errors.OverloadedError("first"))
    with pytest.raises(errors.OverloadedError, match="first"):
        collector.collect()


def test_codec_of_the_batch_with_the_largest_error_is_told():
    collector = Collector(feed(6))
    for rows, use in (((0, 1), CodecUse("images")), ((2, 3), CodecUse("int8", 0.01)), ((4, 5), CodecUse("uint8"))):
        collector.take(Batch(None, rows), dataclasses.replace(answer(Batch(None, rows)), codec_use=use))
    assert collector.collect().codec_use == CodecUse("int8", 0.01)


def test_answers_of_the_wrong_size():
    with pytest.raises(errors.InternalError, match="2 rows; 3 were sent"):
        Collector(feed(3)).take(Batch(None, (0, 1, 2)), answer(Batch(None, (0, 1))))


@pytest.mark.parametrize("size", [4, 400])
def test_images_travel_in_whichever_form_is_smaller(size, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (3, size, size, 3)).astype(np.uint8)
    for row in range(3):
        Image.fromarray(noise[row]).save(tmp_path / f"{row}.png")
    for rows in (pictures(noise), pictures(sorted(tmp_path.iterdir()))):
        image_feed = ImageFeed(rows, SPACE, PREPROCESSING)
        (batch,) = image_feed.batches(10)
        as_files = isinstance(batch.rows, list)
        # A file of 4 x 4 has about 110 bytes and one of 400 x 400 half a million; the network's pixels have 192.
        assert as_files is (size == 4)
        assert (sum(map(len, batch.rows)) if as_files else batch.rows.nbytes) <= 3 * 192


def test_rows_that_fail_here_are_left_out():
    rows = pictures([np.zeros((40, 40, 3), np.uint8), b"x" * 9999, np.zeros((40, 40, 3), np.uint8), b"x" * 9999])
    image_feed = ImageFeed(rows, SPACE, PREPROCESSING)
    batches = list(image_feed.batches(2))
    assert [one.row_numbers for one in batches] == [(0,), (2,)]
    assert sorted(image_feed.errors) == [1, 3]


def test_batch_sizes():
    small, large = feed(100), FeatureFeed(at_hand(np.zeros((2, CHUNK_BYTES), np.float16)))
    assert small.batch_rows(None) == 64 and small.batch_rows(7) == 7 and large.batch_rows(None) == 1
    assert small.batch_rows(10**6) == 10**6  # more than there is: one batch of a hundred
    with pytest.raises(errors.PayloadTooLargeError, match=f"batch_size={MAX_BATCH_ROWS}"):
        feed(MAX_BATCH_ROWS + 1).batch_rows(MAX_BATCH_ROWS + 1)
    for bad in ({"batch_size": 0}, {"max_in_flight": 0}):
        with pytest.raises(errors.InvalidArgumentError):
            run(feed(), **{"batch_size": None, "max_in_flight": 4, "one": answer, "many": None, **bad})


def test_row_over_the_limit():
    with pytest.raises(errors.PayloadTooLargeError, match="one row"):
        rows_per_chunk(MAX_PAYLOAD_BYTES + 1)
    with pytest.raises(errors.PayloadTooLargeError):
        at_hand(np.zeros((1, MAX_PAYLOAD_BYTES // 4 + 1), np.float32))
    assert len(at_hand(np.zeros((1, MAX_PAYLOAD_BYTES // 4 + 1), np.float32), codec="int8")) == 1


def test_features_at_the_input_are_pixels():
    space = FeatureSpace("net", "input", 8, "ef" * 32)
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    assert check_features(pixels, (8, 8, 3), space) is pixels
    with pytest.raises(errors.DtypeMismatchError, match="uint8"):
        check_features(pixels.astype(np.float32), (8, 8, 3), space)
    with pytest.raises(errors.DtypeMismatchError, match="float16 or float32"):
        check_features(pixels, (8, 8, 3), SPACE)


def test_chunks_hold_what_was_wanted():
    features = np.random.default_rng(0).random((9, CHUNK_BYTES // 16)).astype(np.float32)
    source = FeatureRows(at_hand(features))
    chunks = list(source.chunks([0, 2, 3, 5, 6, 8]))
    assert [len(one.row_ids) for one in chunks] == [4, 2]
    assert [one for chunk in chunks for one in chunk.row_ids] == [source.row_ids[n] for n in (0, 2, 3, 5, 6, 8)]
    np.testing.assert_array_equal(np.concatenate([one.rows for one in chunks]), features[[0, 2, 3, 5, 6, 8]])


def test_row_ids_tell_spaces_and_codecs_apart():
    features = np.ones((1, 4), np.float32)
    other = FeatureSpace("net", "half", 16, "cd" * 32)
    ids = {
        FeatureRows(at_hand(features)).row_ids[0],
        FeatureRows(at_hand(features, other)).row_ids[0],
        FeatureRows(at_hand(features.astype(np.float16))).row_ids[0],
        FeatureRows(at_hand(features * 2)).row_ids[0],
        FeatureRows(at_hand(features, codec="int8")).row_ids[0],
        FeatureRows(at_hand(features, codec="int4")).row_ids[0],
        FeatureRows(at_hand(pack(features, "int4"))).row_ids[0],
    }
    assert len(ids) == 7
    assert FeatureRows(at_hand(features.astype(np.float64))).row_ids[0] in ids
    assert FeatureRows(at_hand(features, codec="int8+zstd")).row_ids[0] in ids


@pytest.mark.parametrize("codec", ["float16", "bfloat16", "int8", "int4"])
def test_features_are_packed_a_chunk_at_a_time(codec):
    features = np.random.default_rng(0).random((9, 3, CHUNK_BYTES // 12)).astype(np.float32)
    source = FeatureRows(at_hand(features, codec=codec + "+zstd"))
    chunks = list(source.chunks([0, 2, 3, 5, 6, 8]))
    assert all(one.compress and codec_of(one.rows) == codec and one.rows.nbytes <= CHUNK_BYTES for one in chunks)
    assert len(chunks) == -(-6 // (CHUNK_BYTES // row_bytes(features.shape[1:], codec)))
    parts = [unpack(one.rows) if isinstance(one.rows, PackedRows) else one.rows for one in chunks]
    np.testing.assert_allclose(np.concatenate(parts), features[[0, 2, 3, 5, 6, 8]], atol=0.04)


def test_image_chunks_stay_small(monkeypatch):
    monkeypatch.setattr("trunkline._row_sources.CHUNK_BYTES", 1000)
    noise = np.random.default_rng(0).integers(0, 255, (5, 12, 12, 3)).astype(np.uint8)
    chunks = list(ImageRows(pictures(noise)).chunks(range(5)))
    assert all(sum(map(len, one.rows)) <= 1000 for one in chunks) and sum(len(one.row_ids) for one in chunks) == 5
    assert len(chunks) >= 3


OTHER = FeatureSpace("other", "input", 4, "cd" * 32)


@pytest.mark.parametrize("side", [4, 60])
def test_images_for_several_backbones_travel_once_or_as_pixels_for_each(side):
    noise = np.random.default_rng(0).integers(0, 255, (3, side, side, 3)).astype(np.uint8)
    smaller = dataclasses.replace(PREPROCESSING, input_size=4)
    image_feed = ImageFeed(pictures(noise), SPACE, PREPROCESSING, [(OTHER, smaller)])
    assert image_feed.row_bytes == 3 * (8 * 8 + 4 * 4)
    (batch,) = image_feed.batches(10)
    if side == 4:
        assert all(isinstance(one, bytes) for one in batch.rows) and batch.more == (MoreRows(OTHER, None),)
    else:
        assert batch.rows.shape == (3, 8, 8, 3)
        (more,) = batch.more
        assert more.space == OTHER and more.rows.shape == (3, 4, 4, 3)


def local_feed(rows, function=lambda x: x, **keywords):
    local = local_model(function, name="mean", version="1", **keywords)
    return LocalModelFeed(local.rows(rows), local)


def test_local_rows_that_fail_are_left_out():
    rows = np.arange(5.0)[:, None]
    found = local_feed(rows, lambda x: np.where(x == 3, np.nan, x))
    batches = list(found.batches(2))
    assert [one.row_numbers for one in batches] == [(0, 1), (2,), (4,)]
    assert isinstance(found.errors[3], errors.NotFiniteError) and "row 3" in str(found.errors[3])


@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
def test_inputs_beside_each_other(codec):
    first = FeatureFeed(at_hand(np.arange(20.0).reshape(10, 2).astype(np.float16)))
    second = local_feed(np.arange(10.0)[:, None] + [[0.0, 1.0]], codec=codec)
    joined = JoinedFeed(first, [second])
    assert joined.space == SPACE and joined.row_bytes == first.row_bytes + second.row_bytes
    batches = list(joined.batches(4))
    assert [len(one.row_numbers) for one in batches] == [4, 4, 2]
    (more,) = batches[1].more
    assert more.space == second.space and codec_of(more.rows) == codec and len(more.rows) == 4
    values = unpack(more.rows) if isinstance(more.rows, PackedRows) else more.rows
    np.testing.assert_allclose(values[:, 0], [4, 5, 6, 7], atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_row_that_fails_in_one_input_fails(order):
    """Whichever input comes first: what the others made of the row is taken out again."""
    pixels = np.random.default_rng(0).integers(0, 255, (6, 40, 40, 3)).astype(np.uint8)
    images = [*pixels]
    images[1] = b"x" * 9999
    numbers = np.arange(6.0)[:, None]
    feeds = [
        ImageFeed(pictures(images), SPACE, PREPROCESSING, [(OTHER, dataclasses.replace(PREPROCESSING, input_size=4))]),
        local_feed(numbers, lambda x: np.where(x == 3, np.inf, x), codec="int8"),
        FeatureFeed(at_hand(numbers.astype(np.float32), dataclasses.replace(SPACE, backbone="third"))),
    ]
    first, *others = (feeds[one] for one in order)
    joined = JoinedFeed(first, others)
    batches = list(joined.batches(3))
    assert [one.row_numbers for one in batches] == [(0, 2), (4, 5)]
    assert sorted(joined.errors) == [1, 3]
    for batch in batches:
        assert len(batch.rows) == 2 and all(len(one.rows) == 2 for one in batch.more)
        assert {one.space.source for one in batch.more} == {"net", "other", "mean", "third"} - {first.space.source}
        rows = [one.rows for one in batch.more if one.space.source == "third"] or [batch.rows]
        np.testing.assert_array_equal(rows[0].ravel(), batch.row_numbers)


def test_batch_of_which_nothing_is_left():
    feeds = FeatureFeed(at_hand(np.zeros((4, 2), np.float32))), local_feed(np.array([[np.nan]] * 2 + [[1.0]] * 2))
    joined = JoinedFeed(feeds[0], [feeds[1]])
    assert [one.row_numbers for one in joined.batches(2)] == [(2, 3)] and sorted(joined.errors) == [0, 1]


def test_inputs_of_different_numbers_of_rows():
    with pytest.raises(errors.ShapeMismatchError, match="4 rows of 'mean' beside 10 of 'net'"):
        JoinedFeed(feed(), [local_feed(np.zeros((4, 1)))])


def test_all_inputs_fit_a_message_together():
    wide = FeatureFeed(at_hand(np.zeros((4, CHUNK_BYTES // 16), np.float32)))
    assert wide.batch_rows(None) == 4
    assert JoinedFeed(wide, [FeatureFeed(at_hand(np.zeros((4, CHUNK_BYTES // 16), np.float32)))]).batch_rows(None) == 2
