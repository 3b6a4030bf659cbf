"""Several inputs of a row: local features beside images or alone, and several backbones; heads of every kind."""

import io

import numpy as np
import pytest
import trunkline
from PIL import Image
from trunkline_wire.heads import HeadConfig


def mean_colour(x):
    return x.mean(axis=(1, 2)) / 255


@pytest.fixture
def stem(client, server):
    return client.stem(server.backbone, cut=server.cut, input_size=server.input_size, threads=1)


@pytest.fixture
def local():
    return trunkline.local_model(mean_colour, name="colour", version="1", input_size=8)


@pytest.fixture
def fused(client, stem, local, pictures, unique):
    """Train a model on features of a stem and of a local model."""
    data = client.upload(*pictures(30), name=unique("data"), stem=stem, local=local)
    return client.train(data, name=unique("model"), embedding="pooled").result(120)


@pytest.fixture
def other(server):
    """Name a second backbone."""
    if not server.other_backbone:
        pytest.skip("the cluster has one backbone")
    return server.other_backbone


def nothing_was_asked(server, *methods):
    """Whether none of these calls reached a fake, which counts them."""
    return server.fake is None or not any(server.fake.calls[one] for one in methods)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


class TestUpload:
    def test_only_what_is_missing_is_computed_and_sent(self, client, stem, pictures, unique):
        computed = []
        local = trunkline.local_model(
            lambda x: computed.append(len(x)) or mean_colour(x), name=unique("l")[:60], version="1", input_size=8
        )
        images, labels = pictures(12)
        row_bytes = 2 * int(np.prod(stem.feature_shape))
        first = client.upload(images, labels, name=unique("d"), stem=stem, local=local)
        assert (first.report.rows_sent, first.report.feature_bytes_sent) == (24, 12 * (row_bytes + 3 * 4))
        assert [one.space for one in first.inputs] == [stem.space, local.space]
        assert [one.codec for one in first.inputs] == ["float16", "float32"] and first.num_rows == 12
        del computed[:]
        again = client.upload(images, labels, name=first.name, stem=stem, local=local)
        assert (again.report.rows_sent, again.digest, again.version) == (0, first.digest, first.version)
        without = client.upload(images, labels, name=first.name, stem=stem)
        assert (without.report.rows_sent, without.digest != first.digest) == (0, True)
        assert without.record.more_inputs == () and not computed
        more = client.upload(*pictures(3), name=unique("more"), stem=stem, local=local)
        assert more.report.rows_sent == 6 and sum(computed) == 3

    def test_another_version_is_another_input(self, client, pictures, unique):
        images, labels = pictures(6)
        one, other = (trunkline.local_model(mean_colour, name="colour", version=unique(v), input_size=8) for v in "ab")
        first = client.upload(images, labels, name=unique("d"), local=one)
        second = client.upload(images, labels, name=first.name, local=other)
        assert (first.report.rows_sent, second.report.rows_sent) == (12, 6)
        assert second.version == first.version + 1 and second.digest != first.digest
        assert client.dataset(first.reference).record == first.record

    def test_several_local_models_with_rows_of_their_own(self, client, local, pictures, unique):
        images, labels = pictures(6)
        sensor = trunkline.local_model(lambda x: x, name="sensor", version="1", codec="int8")
        table = np.random.default_rng(0).random((6, 5))
        data = client.upload(images, labels, name=unique("d"), local=[local, sensor], local_inputs={"sensor": table})
        assert [one.space.source for one in data.inputs] == ["", "colour", "sensor"]
        assert [one.codec for one in data.record.more_inputs] == ["float32", "int8"]

    def test_equal_rows_are_sent_once(self, client, local, pictures, unique):
        images, labels = pictures(3)
        data = client.upload(np.concatenate([images] * 3), np.tile(labels, 3), name=unique("d"), local=local)
        assert (data.report.rows_sent, data.num_rows) == (6, 9)

    def test_number_of_rows(self, client, server, local, pictures, unique):
        images, labels = pictures(6)
        with pytest.raises(trunkline.ShapeMismatchError, match="5 rows of 'colour'; 6 are needed"):
            client.upload(images, labels, name=unique("d"), local=local, local_inputs=images[:5])
        assert nothing_was_asked(server, "FindMissingRows", "UploadRows", "CommitDataset")

    def test_row_that_is_not_finite_is_named(self, client, pictures, unique):
        images, labels = pictures(4)
        local = trunkline.local_model(lambda x: np.where(x == 2, np.nan, x), name="nan", version="1")
        with pytest.raises(trunkline.NotFiniteError, match="row 2: the local model 'nan'"):
            client.upload(images, labels, name=unique("d"), local=local, local_inputs=np.arange(4.0))

    @pytest.mark.parametrize(
        ("keywords", "said"),
        [
            ({"remote": False}, "there are none"),
            ({"remote": False, "local": "local", "stem": "stem"}, "no backbone reads them"),
            ({"remote": False, "local": "local", "input_size": 8}, "no backbone reads them"),
            ({"stem": "twice"}, "is there twice"),
            ({"local": "like the backbone"}, "is there twice"),
            ({"local": "nine"}, "at most 8"),
            ({"local": np.zeros((4, 2))}, "expected a local model"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_what_does_not_go_together(self, client, server, stem, local, pictures, unique, keywords, said):
        def at_hand(name):
            return trunkline.local_features(np.ones((4, 1)), name=name, version="1")

        known = {
            "local": local,
            "stem": stem,
            "twice": [stem, stem],
            "like the backbone": at_hand(server.backbone),
            "nine": [at_hand(f"l{number}") for number in range(9)],
        }
        chosen = {
            name: known.get(value, value) if isinstance(value, str) else value for name, value in keywords.items()
        }
        if "local" in chosen and chosen["local"] is known["like the backbone"]:
            chosen["stem"] = stem
        with pytest.raises(trunkline.InvalidArgumentError, match=said):
            client.upload(*pictures(4), name=unique("d"), **chosen)
        assert nothing_was_asked(server, "FindMissingRows", "UploadRows", "CommitDataset")


class TestLocalModel:
    def test_train_and_predict(self, client, fused, stem, local, pictures):
        assert fused.space == stem.space and fused.task == "classification"
        (needed,) = fused.more_inputs
        assert (needed.space, needed.slices, needed.width, needed.codec) == (local.space, ("colour",), 3, "float32")
        assert client.model(fused.name).record == fused.record
        images, labels = pictures(12)
        for choice in (stem, None, False):
            prediction = fused.predict(images, stem=choice, local=local)
            assert prediction.labels == [str(one) for one in labels]
        assert fused.evaluate(images, labels, local=local).accuracy == 1.0

    @pytest.mark.parametrize("choice", [None, False])
    def test_many_batches_keep_their_order(self, fused, local, pictures, choice):
        images, labels = pictures(41)
        prediction = fused.predict(images, stem=choice, local=local, batch_size=4, max_in_flight=3)
        assert prediction.indices.tolist() == labels.tolist() and not prediction.errors

    def test_the_head_reads_it(self, client, stem, pictures, unique):
        """Nothing can be seen in the pictures; the local rows have it all."""
        labels = np.random.default_rng(0).integers(0, 2, 80)
        images = np.random.default_rng(1).integers(0, 60, (80, 16, 16, 3)).astype(np.uint8)
        table = np.stack([labels * 2.0 - 1, np.zeros(80)], axis=1)
        sensor = trunkline.local_model(lambda x: x, name="sensor", version="1")
        data = client.upload(
            images[:60], labels[:60], name=unique("d"), stem=stem, local=sensor, local_inputs=table[:60]
        )
        model = client.train(data, name=unique("m"), embedding="pooled").result(120)
        prediction = model.predict(images[60:], local=sensor, local_inputs=table[60:])
        assert prediction.indices.tolist() == labels[60:].tolist()
        swapped = model.predict(images[60:], local=sensor, local_inputs=-table[60:])
        assert swapped.indices.tolist() == (1 - labels[60:]).tolist()

    @pytest.mark.parametrize("batch_size", [None, 2])
    @pytest.mark.parametrize("choice", [None, False])
    def test_rows_that_fail_leave_the_others_alone(self, client, stem, pictures, unique, choice, batch_size):
        images, labels = pictures(20)
        table = labels.astype(float)[:, None]
        local = trunkline.local_model(lambda x: np.where(x > 8, np.nan, x), name="sensor", version="1")
        data = client.upload(images, labels, name=unique("d"), stem=stem, local=local, local_inputs=table)
        model = client.train(data, name=unique("m"), embedding="pooled").result(120)
        rows = [png(one) for one in images[:6]]
        rows[2] = rows[2][: len(rows[2]) // 2]
        numbers = table[:6].copy()
        numbers[4] = 9
        prediction = model.predict(rows, stem=choice, local=local, local_inputs=numbers, batch_size=batch_size)
        assert {row: type(one) for row, one in prediction.errors.items()} == {
            2: trunkline.CorruptImageError,
            4: trunkline.NotFiniteError,
        }
        assert [prediction.labels[row] for row in (0, 1, 3, 5)] == [str(labels[row]) for row in (0, 1, 3, 5)]
        assert prediction.labels[2] is None and np.isnan(prediction.outputs_NK[[2, 4]]).all()

    def test_local_features_alone(self, client, local, pictures, unique):
        images, labels = pictures(30)
        data = client.upload(images, labels, name=unique("d"), local=local, remote=False)
        assert (data.report.rows_sent, data.report.feature_bytes_sent) == (30, 30 * 3 * 4)
        assert data.space == local.space and data.record.more_inputs == ()
        model = client.train(data, name=unique("m")).result(120)
        assert (model.space, model.slices, model.codec) == (local.space, ("colour",), "float32")
        images, labels = pictures(12)
        assert model.predict(images, local=local, batch_size=5).indices.tolist() == labels.tolist()
        assert model.evaluate(images, labels, local=local).accuracy == 1.0
        with pytest.raises(trunkline.UnsupportedError, match="trained on local features alone"):
            model.stem()

    def test_nothing_but_rows_of_its_own(self, client, unique):
        texts = ["good", "bad", "good good", "bad bad"] * 5
        labels = ["+", "-"] * 10
        words = trunkline.local_model(
            lambda x: [[one.count("good"), one.count("bad")] for one in x.tolist()], name="words", version="1"
        )
        data = client.upload(None, labels, name=unique("d"), local=words, local_inputs=texts, remote=False)
        model = client.train(data, name=unique("m")).result(120)
        assert model.predict(None, local=words, local_inputs=["bad", "good"]).labels == ["-", "+"]
        assert model.evaluate(None, ["+"], local=words, local_inputs=["good"]).accuracy == 1.0

    def test_two_local_models_alone(self, client, local, pictures, unique):
        images, labels = pictures(12)
        size = trunkline.local_model(lambda x: x, name="size", version="1", codec="float16")
        inputs = {"size": labels.astype(float)[:, None]}
        data = client.upload(images, labels, name=unique("d"), local=[size, local], local_inputs=inputs, remote=False)
        assert [one.space.source for one in data.inputs] == ["size", "colour"]
        model = client.train(data, name=unique("m")).result(120)
        prediction = model.predict(images, local=[local, size], local_inputs=inputs)
        assert prediction.indices.tolist() == labels.tolist()

    def test_features_at_hand(self, client, stem, pictures, unique):
        images, labels = pictures(20)
        vectors = mean_colour(images.astype(np.float32))

        def at_hand(rows, **keywords):
            return trunkline.local_features(rows, **{"name": "sensor", "version": "1", **keywords})

        data = client.upload_features(stem(images), labels, name=unique("d"), space=stem.space, local=at_hand(vectors))
        same = client.upload(images, labels, name=unique("e"), stem=stem, local=at_hand(vectors))
        # The features at hand have ids of their own; the vectors are the same rows.
        assert (data.report.rows_sent, same.report.rows_sent) == (40, 20)
        model = client.train(data, name=unique("m"), embedding="pooled").result(120)
        images, labels = pictures(6)
        vectors = mean_colour(images.astype(np.float32))
        by_features = client.predict_features(stem(images), model=model, local=at_hand(vectors))
        by_images = model.predict(images, local=at_hand(vectors))
        assert by_features.indices.tolist() == by_images.indices.tolist() == labels.tolist()
        with pytest.raises(trunkline.ShapeMismatchError, match="5 rows of 'sensor' beside 6"):
            model.predict(images, local=at_hand(vectors[:5]))
        with pytest.raises(trunkline.IncompatibleModelError, match="of fingerprint"):
            model.predict(images, local=at_hand(vectors, version="2"))

    @pytest.mark.parametrize(
        ("make", "error", "said"),
        [
            (lambda make: None, trunkline.InvalidArgumentError, "needs the local model 'colour', which is not given"),
            (lambda make: make(name="shade"), trunkline.InvalidArgumentError, "'colour'; 'shade' is given"),
            (
                lambda make: [make(), make(name="shade")],
                trunkline.InvalidArgumentError,
                "knows no local model 'shade'; it knows 'colour'",
            ),
            (lambda make: make(version="2"), trunkline.IncompatibleModelError, "'colour': of fingerprint .*, not "),
            (lambda make: make(input_size=16), trunkline.IncompatibleModelError, "of fingerprint"),
            (
                lambda make: make(function=lambda x: mean_colour(x)[:, :2]),
                trunkline.IncompatibleModelError,
                "of fingerprint",
            ),
            (
                lambda make: make(codec="float16"),
                trunkline.IncompatibleModelError,
                "in float32; these travel in float16",
            ),
        ],
        ids=["missing", "other name", "superfluous", "version", "input size", "width", "codec"],
    )
    def test_another_one_is_refused_before_anything_is_sent(self, server, fused, pictures, make, error, said):
        def local(function=mean_colour, **keywords):
            return trunkline.local_model(function, **{"name": "colour", "version": "1", "input_size": 8, **keywords})

        with pytest.raises(error, match=said):
            fused.predict(pictures(2)[0], local=make(local))
        assert nothing_was_asked(server, "Predict", "StreamPredict")

    def test_model_without_one_knows_none(self, client, stem, local, pictures, unique):
        data = client.upload(*pictures(6), name=unique("d"), stem=stem)
        model = client.train(data, name=unique("m"), embedding="pooled").result(120)
        with pytest.raises(trunkline.InvalidArgumentError, match="it knows none"):
            model.predict(pictures(2)[0], local=local)


class TestBackbones:
    @pytest.fixture
    def both(self, client, server, other, pictures, unique):
        """Train on images that two backbones read."""
        data = client.upload(*pictures(30), name=unique("data"), input_size=server.input_size)
        names = [server.backbone, other]
        return client.train(data, name=unique("model"), backbone=names, embedding="pooled").result(120)

    @pytest.fixture
    def make_second(self, client, server, other):
        """Make a stem of the other backbone."""

        def make(**keywords):
            cut = next(one.name for one in client.describe(other).cuts if one.is_stage)
            return client.stem(other, cut=cut, input_size=server.input_size, **keywords)

        return make

    def test_images_are_read_by_both(self, server, both, other, pictures):
        (needed,) = both.more_inputs
        assert (both.space.backbone, needed.space.backbone) == (server.backbone, other)
        assert both.space.is_input and needed.space.is_input
        assert both.space.input_size == needed.space.input_size == server.input_size
        assert both.slices == needed.slices == ("pooled",) and needed.width > 0
        # Small pictures travel as files, once for both; large ones as pixels.
        for size in (4, 200):
            images, labels = pictures(10, size=size)
            for batch_size in (None, 3):
                assert both.predict(images, batch_size=batch_size).indices.tolist() == labels.tolist()

    def test_a_file_travels_once(self, server, both, pictures):
        if server.fake is None:
            pytest.skip("only a fake counts bytes")
        images = [png(one) for one in pictures(8, size=4)[0]]
        before = server.fake.received_bytes
        both.predict(images)
        assert server.fake.received_bytes - before == sum(map(len, images))

    def test_stems_for_each(self, client, other, stem, make_second, pictures, unique):
        second = make_second(codec="int8")
        images, labels = pictures(24)
        data = client.upload(images, labels, name=unique("d"), stem=[stem, second])
        assert [one.space for one in data.inputs] == [stem.space, second.space]
        assert [one.codec for one in data.inputs] == ["float16", "int8"] and data.report.rows_sent == 48
        model = client.train(data, name=unique("m"), embedding="pooled").result(120)
        assert [one.space for one in model.inputs] == [stem.space, second.space]
        assert model.stem().space == stem.space
        assert (model.stem(backbone=other).space, model.stem(backbone=other).codec) == (second.space, "int8")
        images, labels = pictures(9)
        for choice in (None, False, [stem, second], [second, stem], stem, second):
            assert model.predict(images, stem=choice, batch_size=4).indices.tolist() == labels.tolist()
        features = [stem(images), second.pack(second(images))]
        assert model.predict_features(features).indices.tolist() == labels.tolist()
        spaces = [second.space, stem.space]
        assert model.predict_features(features[::-1], space=spaces).indices.tolist() == labels.tolist()
        with pytest.raises(trunkline.IncompatibleModelError, match=f"needs features of .* and of {other}"):
            model.predict_features(features[0], space=stem.space)
        with pytest.raises(trunkline.InvalidArgumentError, match="for 2 backbones"):
            model.predict_features(features[0])
        with pytest.raises(trunkline.InvalidArgumentError, match="two stems are of one backbone"):
            model.predict(images, stem=[stem, stem])
        with pytest.raises(trunkline.InvalidArgumentError, match="reads no backbone 'nobody'"):
            model.stem(backbone="nobody")

    def test_features_at_hand_of_both(self, client, other, stem, make_second, pictures, unique):
        second = make_second()
        images, labels = pictures(6)
        features = [stem(images), second(images)]
        data = client.upload_features(features, labels, name=unique("d"), space=[stem.space, second.space])
        assert [one.space for one in data.inputs] == [stem.space, second.space]
        with pytest.raises(trunkline.ShapeMismatchError, match=f"5 rows of '{other}'; 6 are needed"):
            client.upload_features(
                [features[0], features[1][:5]], labels, name=unique("d"), space=[stem.space, second.space]
            )

    @pytest.mark.parametrize("batch_size", [None, 2])
    def test_corrupt_image_among_good_ones(self, both, pictures, batch_size):
        images, labels = pictures(6)
        rows = [png(one) for one in images]
        rows[2] = rows[2][: len(rows[2]) // 2]
        prediction = both.predict(rows, batch_size=batch_size)
        assert set(prediction.errors) == {2} and isinstance(prediction.errors[2], trunkline.CorruptImageError)
        good = [0, 1, 3, 4, 5]
        assert [prediction.labels[row] for row in good] == [str(labels[row]) for row in good]

    def test_local_features_beside_both(self, client, server, other, local, pictures, unique):
        data = client.upload(*pictures(24), name=unique("d"), local=local, input_size=server.input_size)
        model = client.train(data, name=unique("m"), backbone=[server.backbone, other], embedding="pooled").result(120)
        assert {one.space.source for one in model.more_inputs} == {other, "colour"}
        images, labels = pictures(9)
        assert model.predict(images, local=local, batch_size=4).indices.tolist() == labels.tolist()

    def test_slices_of_each(self, client, server, other, pictures, unique):
        data = client.upload(*pictures(12), name=unique("d"), input_size=server.input_size)
        names = [server.backbone, other]
        embedding = [server.slices[0], f"{other}:pooled"]
        model = client.train(data, name=unique("m"), backbone=names, embedding=embedding).result(120)
        assert (model.slices, model.more_inputs[0].slices) == ((server.slices[0],), ("pooled",))

    def test_features_of_one_cannot_be_read_by_another(self, client, stem, server, other, pictures, unique):
        data = client.upload(*pictures(6), name=unique("d"), stem=stem)
        for names in (other, [server.backbone, other]):
            with pytest.raises(trunkline.InvalidArgumentError, match="holds features of"):
                client.train(data, name=unique("m"), backbone=names)


HEADS = {
    "linear": trunkline.Linear(),
    "linear, added": trunkline.Linear(fuse="add", fuse_width=16),
    "mlp": trunkline.MLP(hidden=(32, 16), activation="gelu", batch_norm=True, dropout=0.1),
    "mlp, gated": trunkline.MLP(hidden=(32,), fuse="gate"),
    "prototype": trunkline.Prototype(),
}


class TestHeads:
    @pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
    def test_every_kind(self, client, stem, local, pictures, unique, head):
        data = client.upload(*pictures(60), name=unique("d"), stem=stem, local=local)
        job = client.train(data, name=unique("m"), head=head, embedding="pooled", epochs=0)
        model = job.result(120)
        assert job.status().spec.head == model.head == head.config
        images, labels = pictures(12)
        assert (model.predict(images, local=local).indices == labels).mean() > 0.8

    def test_convolutions(self, client, server, stem, local, pictures, unique):
        data = client.upload(*pictures(60), name=unique("d"), stem=stem, local=local)
        model = client.train(data, name=unique("m"), head=trunkline.Conv(channels=(8,))).result(120)
        assert model.head.kind == "conv" and model.slices == (f"{model.head.tap}.map",)
        assert len(model.predict(pictures(12)[0], local=local)) == 12
        named = client.train(data, name=unique("n"), head=trunkline.Conv(tap=server.cut)).result(120)
        assert named.head.tap == server.cut and named.slices == (f"{server.cut}.map",)

    def test_names_of_kinds(self, client, stem, pictures, unique):
        data = client.upload(*pictures(12), name=unique("d"), stem=stem)
        model = client.train(data, name=unique("m"), head="prototype", embedding="pooled").result(120)
        assert model.head == HeadConfig("prototype")

    def test_huber(self, client, stem, pictures, unique):
        images, labels = pictures(30)
        data = client.upload(images, labels.astype(np.float32), name=unique("d"), stem=stem)
        job = client.train(data, name=unique("m"), loss=trunkline.Loss("huber", huber_delta=2.0), embedding="pooled")
        assert job.result(120).task == "regression"
        taken = job.status().spec.fit.loss
        assert (taken.kind, taken.huber_delta) == ("huber", 2.0)

    def test_huber_is_for_numbers(self, client, stem, pictures, unique):
        data = client.upload(*pictures(6), name=unique("d"), stem=stem)
        with pytest.raises(trunkline.InvalidArgumentError, match="'huber' is not one for classes"):
            client.train(data, name=unique("m"), loss="huber")

    def test_local_features_alone_have_no_backbone(self, client, server, local, pictures, unique):
        data = client.upload(*pictures(6), name=unique("d"), local=local, remote=False)
        for keywords in ({"backbone": server.backbone}, {"input_size": 8}):
            with pytest.raises(trunkline.InvalidArgumentError, match="no backbone reads"):
                client.train(data, name=unique("m"), **keywords)
            with pytest.raises(trunkline.InvalidArgumentError):
                client.train(data.reference, name=unique("m"), **keywords)
        with pytest.raises(trunkline.InvalidArgumentError):
            client.train(data, name=unique("m"), head="conv")


class TestSeveralClasses:
    NAMES = np.array(["red", "green", "blue"])

    @pytest.fixture
    def coloured(self):
        """Make pictures in which some channels are raised, and which these are."""

        def make(count, seed=0):
            generator = np.random.default_rng(seed)
            flags = generator.integers(0, 2, (count, 3)).astype(bool)
            images = generator.integers(0, 60, (count, 16, 16, 3)) + 150 * flags[:, None, None, :]
            return images.astype(np.uint8), flags

        return make

    @pytest.fixture
    def tagger(self, client, stem, coloured, unique):
        images, flags = coloured(80)
        tags = [list(self.NAMES[row]) for row in flags]
        data = client.upload(images, tags, name=unique("d"), stem=stem)
        assert (data.class_names, data.record.num_targets) == (("blue", "green", "red"), 3)
        assert data.task == "multi_label" and client.dataset(data.reference) == data
        return client.train(data, name=unique("m"), embedding="pooled").result(120)

    def test_predict(self, tagger, coloured):
        assert (tagger.task, tagger.class_names) == ("multi_label", ("blue", "green", "red"))
        images, flags = coloured(20, seed=1)
        prediction = tagger.predict(images, batch_size=6)
        expected = [tuple(sorted(self.NAMES[row])) for row in flags]
        assert prediction.label_sets() == expected == list(prediction.labels)
        assert prediction.probabilities.shape == (20, 3)
        assert prediction.label_sets(threshold=-0.5) == [("blue", "green", "red")] * 20

    def test_evaluate(self, tagger, coloured):
        images, flags = coloured(20, seed=1)
        tags = [set(self.NAMES[row]) for row in flags]
        report = tagger.evaluate(images, tags)
        assert report.task == "multi_label" and report.micro_f1 == report.subset_accuracy == 1.0
        assert tagger.evaluate(images, flags[:, ::-1]).micro_f1 == 1.0
        assert tagger.evaluate(images, ~flags[:, ::-1]).micro_f1 < 0.2
        with pytest.raises(trunkline.BadLabelsError, match="knows no class 'violet'"):
            tagger.evaluate(images, [["violet"]] * 20)

    def test_booleans_are_numbered(self, client, stem, coloured, unique):
        images, flags = coloured(10)
        data = client.upload(images, flags, name=unique("d"), stem=stem)
        assert data.class_names == ("0", "1", "2")

    def test_local_features_beside(self, client, local, coloured, unique):
        images, flags = coloured(60)
        data = client.upload(images, flags, name=unique("d"), local=local, remote=False)
        model = client.train(data, name=unique("m")).result(120)
        images, flags = coloured(20, seed=1)
        assert model.evaluate(images, flags, local=local).micro_f1 > 0.9
