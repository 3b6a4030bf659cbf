"""A job from its lease to the published model, on the real store, without Ray."""

import collections
import dataclasses
import hashlib
import json
from dataclasses import asdict

import numpy as np
import pytest
import serving_fakes as fakes
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import LossConfig, OptimiserConfig, SweepConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.quantise import PackedRows, pack, unpack
from trunkline_wire.rows import row_id
from trunkline_wire.specs import (
    FLOAT32,
    IMAGES,
    INT8,
    CodecUse,
    SliceSpec,
    bottleneck_fingerprint,
    codec_label,
    embedding_fingerprint,
    feature_fingerprint,
    local_space,
)
from trunkline_worker.engine.api import Extraction
from trunkline_worker.heads.artefact import head_from_bytes, head_path
from trunkline_worker.heads.outliers import detector_from_bytes, outliers_path
from trunkline_worker.store import chunks
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.database import Database
from trunkline_worker.store.evaluations import evaluation_from_bytes, evaluation_path
from trunkline_worker.store.failpoints import Failpoints, SimulatedKill
from trunkline_worker.store.metadata import MetadataStore
from trunkline_worker.store.records import BackboneChoice, JobSpec, JobState, ModelInput
from trunkline_worker.training.job import JobTools, manifest_path, run_job

NUM_ROWS = 300
LEASE_S = 3600.0
BOTTLENECK_ERROR = 0.07


def second_spec():
    """Describe a backbone with other weights than `fake`."""
    spec = fakes.fake_spec()
    cuts = (
        dataclasses.replace(cut, fingerprint=feature_fingerprint("w2", cut.name, spec.preprocessing))
        for cut in spec.cuts
    )
    return dataclasses.replace(
        spec,
        name="second",
        weights_sha256="w2",
        cuts=tuple(cuts),
        embedding_fingerprint=embedding_fingerprint("w2", spec.preprocessing),
    )


class FakeTrunk:
    """Trunks whose embedding is the mean of each channel. Counts what goes through them and what they are asked."""

    def __init__(self):
        self.rows = 0
        self.rows_of = collections.Counter()
        self.slices_of = {}
        self.spec = fakes.fake_spec()
        self.second = second_spec()
        self.bad_row = None
        self.on_batch = lambda: None
        self.spaces = set()
        self.costs_asked = []

    def describe(self, backbone, input_size):
        return self.second if backbone == "second" else self.spec

    def cut_cost(self, backbone, cut, input_size):
        self.costs_asked.append((backbone, cut, input_size))
        return fakes.fake_cost(self.spec.cut(cut))

    def extract(self, batches, slices=()):
        for space, rows in batches:
            self.on_batch()
            self.rows += len(rows)
            self.rows_of[space.backbone] += len(rows)
            self.slices_of[space.backbone] = slices
            self.spaces.add(space)
            errors = {}
            if self.bad_row is not None:
                errors[self.bad_row] = WireError(ErrorCode.CORRUPT_IMAGE, "not a picture")
            spec = self.describe(space.backbone, space.input_size)
            values = unpack(rows) if isinstance(rows, PackedRows) else rows
            known = [one for one in spec.slices if one.name in spec.cut(space.cut).slices]
            if slices == ("mid.map",):
                embedding = values.reshape(len(values), -1).astype(np.float32)
                known = [SliceSpec("mid.map", 0, embedding.shape[1])]
            elif space.is_input:
                embedding = np.zeros((len(rows), 6), np.float32)
                embedding[:, 3:] = np.stack([np.frombuffer(row, np.uint8)[:3] for row in rows])
            else:
                # The single channel of a code stands for all of them.
                embedding = np.broadcast_to(values.mean(axis=(2, 3)), (len(rows), known[-1].stop - known[0].start))
            use = fakes.fake_use(space, rows, spec)
            if space.bottleneck:
                use = CodecUse(use.codec, BOTTLENECK_ERROR)
            yield Extraction(np.array(embedding, np.float32), tuple(known), errors, codec_use=use)


class Bench:
    """Store, blobs, trunk and one dataset, `three`, that can be learnt."""

    def __init__(self, folder):
        self.failpoints = Failpoints()
        self.clock = ManualClock()
        self.blobs = BlobStore(f"file://{folder}/data")
        self.store = MetadataStore(Database(f"sqlite:///{folder}/metadata.sqlite"), clock=self.clock)
        self.trunk = FakeTrunk()
        self.embedding_keys = set()
        spec = self.trunk.spec
        self.space = spec.space(spec.cut("mid"))
        rng = np.random.default_rng(0)
        self.labels = np.arange(NUM_ROWS) % 3
        self.features = rng.normal(size=(NUM_ROWS, 3, 2, 2)).astype(np.float16)
        self.features[np.arange(NUM_ROWS), self.labels] += 4
        self.upload("three", "float16")

    def upload(self, name, codec, precision=FLOAT32):
        """Store the features in a codec, as a stem of that precision made them, and make a dataset of them."""
        space = self.trunk.spec.space(self.trunk.spec.cut("mid"), precision)
        self.store_rows(name, space, codec_label(codec, precision), pack(self.features, codec))

    def store_rows(self, name, space, codec, rows):
        ids = [row_id(space, codec, hashlib.sha256(one.tobytes()).digest()) for one in self.features]
        sha256 = chunks.write_chunk(self.blobs, rows)
        self.store.rows.add_chunk("default", sha256, space, codec, ids)
        self.store.datasets.commit("default", name, space, ids, ("a", "b", "c"), self.labels, None, name)

    def call(self, name, *args):
        if name == "embeddings.missing":
            self.embedding_keys.add(args[1])
        area, _, method = name.partition(".")
        return getattr(getattr(self.store, area), method)(*args)

    def tools(self):
        return JobTools(self.call, self.blobs, self.trunk, self.clock, {"numpy": "x"}, LEASE_S, self.failpoints)

    def submit(self, key="job", **spec):
        spec = {"model": "head", "dataset": "three", "backbone": "fake", "input_size": 8, "embedding": "pooled", **spec}
        return self.store.jobs.submit("default", JobSpec(**spec), key)

    def run(self):
        lease = self.store.jobs.lease("lane", LEASE_S)
        run_job(lease, self.tools())
        return self.store.jobs.get("default", lease.job.id)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_a_job_ends_with_a_model_whose_file_and_manifest_are_there(bench):
    bench.submit()
    job = bench.run()
    assert (job.state, job.model) == (JobState.SUCCEEDED, "head@1")
    model = bench.store.models.get("default", "head")
    head = head_from_bytes(bench.blobs.get_checked(head_path(model.head_sha256), model.head_sha256))
    assert head.class_names == model.class_names == ("a", "b", "c")
    assert model.metrics["accuracy"] > 0.9
    assert model.space == bench.space
    assert (model.dataset, model.job_id) == ("three@1", job.id)
    manifest = json.loads(bench.blobs.get(manifest_path(job.id, 1)))
    assert manifest["model"]["head_sha256"] == model.head_sha256
    assert manifest["job"]["dataset"] == "three@1"
    phases = [event.phase for event in bench.store.jobs.events("default", job.id)]
    assert phases[0] == "queued"
    assert phases[-2:] == ["publish", "end"]
    assert {"embed", "fit"} <= set(phases)


def test_a_second_job_sends_nothing_through_the_trunk(bench):
    bench.submit()
    bench.run()
    assert bench.trunk.rows == NUM_ROWS
    bench.submit("again", model="other", embedding="auto")
    assert bench.run().state is JobState.SUCCEEDED
    assert bench.trunk.rows == NUM_ROWS


def test_a_row_that_cannot_be_read_fails_the_job_and_is_named(bench):
    bench.submit()
    bench.trunk.bad_row = 7
    job = bench.run()
    assert (job.state, job.error_code) == (JobState.FAILED, "CORRUPT_IMAGE")
    assert "row 7" in job.error_message
    bench.trunk.bad_row = None
    bench.submit("again")
    assert bench.run().state is JobState.SUCCEEDED


QUICK = {"l2": 0.01, "refit": False}
"""One fit instead of dozens, where it does not matter how good the model is."""


def test_a_job_knows_which_rows_are_views_and_which_belong_together(bench):
    whole = bench.store.datasets.rows("default", "three")
    order = np.argsort(bench.labels, kind="stable").reshape(-1, 2)  # the views of a picture are of one class
    groups = (np.arange(len(order)) % 5).repeat(2)
    ids, labels = [whole.row_ids[row] for row in order.ravel()], bench.labels[order.ravel()]
    bench.store.datasets.commit(
        *("default", "viewed", bench.space, ids, ("a", "b", "c"), labels, None, "viewed"), groups=groups, views=2
    )
    bench.submit(dataset="viewed", **QUICK)
    job = bench.run()
    assert job.state is JobState.SUCCEEDED
    metrics = bench.store.models.get("default", "head").metrics
    assert (metrics["num_rows"], metrics["num_views"], metrics["num_groups"]) == (len(order), 2, 5)
    assert bench.trunk.rows == len(ids)
    bench.submit("again", dataset="viewed", model="other", **QUICK)
    bench.run()
    assert bench.trunk.rows == len(ids), "views are cached like other rows"


@pytest.mark.parametrize(
    ("codec", "precision"),
    [
        ("float32", FLOAT32),
        ("float32", INT8),
        ("float16", FLOAT32),
        ("bfloat16", FLOAT32),
        ("int8", INT8),
        ("int4", FLOAT32),
        ("int4", INT8),
    ],
)
def test_a_model_says_how_its_rows_were_made_and_what_that_does_to_the_embedding(bench, codec, precision):
    bench.upload("other", codec, precision)
    bench.submit(dataset="other", **QUICK)
    assert bench.run().state is JobState.SUCCEEDED
    model = bench.store.models.get("default", "head")
    assert model.codec == codec_label(codec, precision)
    expected = fakes.CODEC_ERRORS.get(codec, 0.0) + (fakes.INT8_STEM_ERROR if precision == INT8 else 0.0)
    assert model.codec_error == pytest.approx(expected)
    assert model.space == bench.trunk.spec.space(bench.trunk.spec.cut("mid"), precision)
    assert bench.trunk.spaces == {model.space}
    assert bench.trunk.costs_asked == [], "what the trunk said of the rows is enough"
    assert model.metrics["accuracy"] > 0.9
    manifest = json.loads(bench.blobs.get(manifest_path(model.job_id, 1)))
    assert (manifest["model"]["codec"], manifest["model"]["codec_error"]) == (model.codec, model.codec_error)

    # Once more, with every embedding cached: the same is said, and the trunk is asked only where something is lost.
    bench.submit("again", dataset="other", **QUICK)
    bench.run()
    again = bench.store.models.get("default", "head@2")
    assert (again.codec, again.codec_error) == (model.codec, pytest.approx(model.codec_error))
    assert bench.trunk.rows == NUM_ROWS
    assert bench.trunk.costs_asked == ([("fake", "mid", 8)] if expected else [])


def test_images_are_exact_and_nobody_is_asked(bench):
    rows = [bytes(row) + b"jpeg" for row in (np.eye(3, dtype=np.uint8)[bench.labels] * 200)]
    bench.store_rows("pictures", IMAGES, "images", rows)
    for key in ("first", "second"):
        bench.submit(key, dataset="pictures", **QUICK)
        assert bench.run().state is JobState.SUCCEEDED
        model = bench.store.models.get("default", "head")
        assert (model.codec, model.codec_error, model.space) == ("images", 0.0, fakes.images_space())
    assert bench.trunk.costs_asked == []


def test_a_codec_that_the_cut_offers_no_more_fails_the_job(bench):
    bench.submit(**QUICK)
    bench.run()
    cost = bench.trunk.cut_cost

    def less(backbone, cut, input_size):
        whole = cost(backbone, cut, input_size)
        return dataclasses.replace(whole, codecs=tuple(one for one in whole.codecs if one.codec != "float16"))

    bench.trunk.cut_cost = less
    bench.submit("again")
    job = bench.run()
    assert (job.state, job.error_code) == (JobState.FAILED, "UNSUPPORTED")
    assert "float16" in job.error_message


def test_embeddings_of_one_stem_are_not_taken_for_those_of_another(bench):
    """The same pictures in the same codec: only the stem differs."""
    bench.upload("exact", "int8")
    bench.upload("quantised", "int8", INT8)
    for key, dataset in (("one", "exact"), ("two", "quantised")):
        bench.submit(key, dataset=dataset, **QUICK)
        bench.run()
    assert bench.trunk.rows == 2 * NUM_ROWS
    assert len(bench.embedding_keys) == 2


def test_embeddings_of_other_slices_are_not_taken_for_these(bench):
    """The backbone has one tap more than when the embeddings were cached: their columns mean something else."""
    bench.submit(**QUICK)
    bench.run()
    spec = bench.trunk.spec
    (mid,) = [cut for cut in spec.cuts if cut.name == "mid"]
    bench.trunk.spec = dataclasses.replace(
        spec,
        cuts=(spec.cuts[0], dataclasses.replace(mid, slices=("pooled.2",))),
        slices=(spec.slices[0], SliceSpec("pooled.2", 3, 6)),
    )
    bench.submit("again", embedding="auto", **QUICK)
    assert bench.run().state is JobState.SUCCEEDED
    assert bench.trunk.rows == 2 * NUM_ROWS
    assert bench.store.models.get("default", "head").slices == ("pooled.2",)


def test_slices_behind_a_cut_are_counted_from_its_first_column(bench):
    """Whatever comes before them in the whole embedding is not in what the trunk returns from there."""
    spec = bench.trunk.spec
    (mid,) = [cut for cut in spec.cuts if cut.name == "mid"]
    bench.trunk.spec = dataclasses.replace(
        spec,
        cuts=(spec.cuts[0], dataclasses.replace(mid, slices=("c", "pooled"))),
        slices=(SliceSpec("a", 0, 4), SliceSpec("c", 4, 5), SliceSpec("pooled", 5, 7)),
    )
    bench.submit(embedding="slices", slices=("pooled",), **QUICK)
    assert bench.run().state is JobState.SUCCEEDED
    model = bench.store.models.get("default", "head")
    head = head_from_bytes(bench.blobs.get_checked(head_path(model.head_sha256), model.head_sha256))
    assert (model.slices, head.inputs[0].widths) == (("pooled",), (2,))


def test_the_sets_of_slices_that_were_tried_are_published_best_first(bench):
    rows = [bytes(row) + b"jpeg" for row in (np.eye(3, dtype=np.uint8)[bench.labels] * 200)]
    bench.store_rows("pixels", fakes.images_space(), "images", rows)
    bench.submit(dataset="pixels", embedding="auto", **QUICK)
    assert bench.run().state is JobState.SUCCEEDED
    model = bench.store.models.get("default", "head")
    assert {one.slices for one in model.candidates} >= {("a",), ("pooled",)}
    scores = [one.score for one in model.candidates]
    assert scores == sorted(scores, reverse=True)
    assert model.candidates[0].slices == model.slices
    for one in model.candidates:
        assert one.width == 3 * len(one.slices)
        assert one.accuracy is not None
    manifest = json.loads(bench.blobs.get(manifest_path(model.job_id, 1)))
    assert [tuple(one["slices"]) for one in manifest["candidates"]] == [one.slices for one in model.candidates]


@pytest.mark.parametrize("precision", [FLOAT32, INT8])
def test_features_of_other_weights_fail_the_job(bench, precision):
    bench.upload("other", "int8", precision)
    bench.submit(dataset="other")
    other = fakes.fake_spec()
    cut = other.cuts[1]
    name = "fingerprint" if precision == FLOAT32 else "int8_fingerprint"
    bench.trunk.spec = dataclasses.replace(other, cuts=(other.cuts[0], dataclasses.replace(cut, **{name: "0" * 64})))
    job = bench.run()
    assert (job.state, job.error_code) == (JobState.FAILED, "INCOMPATIBLE")


def test_a_full_disk_fails_the_job_with_the_reason_and_the_next_one_succeeds(bench, monkeypatch):
    put = BlobStore.put
    full = [True]

    def maybe(self, path, data):
        if full[0]:
            raise WireError(ErrorCode.STORAGE_FULL, "no space is left")
        put(self, path, data)

    monkeypatch.setattr(BlobStore, "put", maybe)
    bench.submit()
    job = bench.run()
    assert (job.state, job.error_code) == (JobState.FAILED, "STORAGE_FULL")
    full[0] = False
    bench.submit("again")
    assert bench.run().state is JobState.SUCCEEDED


def test_an_error_that_nobody_foresaw_says_nothing_internal(bench):
    bench.submit()

    def fail():
        raise RuntimeError("secret path /var/secret")

    bench.trunk.on_batch = fail
    job = bench.run()
    assert (job.state, job.error_code) == (JobState.FAILED, "INTERNAL")
    assert "secret" not in job.error_message


def test_a_cancelled_job_stops_and_publishes_nothing(bench, monkeypatch):
    from trunkline_worker.training import keeper

    monkeypatch.setattr(keeper, "RENEW_INTERVAL_S", 0.0)
    job = bench.submit()
    asked = []

    def cancel():
        if not asked:
            asked.append(bench.store.jobs.request_cancel("default", job.id))

    bench.trunk.on_batch = cancel
    job = bench.run()
    assert job.state is JobState.CANCELLED
    assert bench.store.models.list("default") == []


def test_a_worker_that_lost_its_lease_publishes_nothing(bench):
    job = bench.submit()
    lease = bench.store.jobs.lease("lane", LEASE_S)
    assert bench.store.jobs.release_lane("lane") == [job.id]
    second = bench.store.jobs.lease("other lane", LEASE_S)
    run_job(lease, bench.tools())
    assert bench.store.jobs.get("default", job.id).state is JobState.RUNNING
    assert bench.store.models.list("default") == []
    run_job(second, bench.tools())
    assert bench.store.jobs.get("default", job.id).model == "head@1"


POINTS = [
    "job.embedding_written",
    "job.head_written",
    "job.manifest_written",
    "job.before_succeed",
    "job.after_succeed",
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_the_job_is_done_by_the_next_worker_once(bench, point):
    job = bench.submit()
    bench.failpoints.arm(point)
    lease = bench.store.jobs.lease("lane", LEASE_S)
    with pytest.raises(SimulatedKill):
        run_job(lease, bench.tools())
    bench.failpoints.disarm()
    taken_back = bench.store.jobs.release_lane("lane")
    assert taken_back == ([] if point == "job.after_succeed" else [job.id])
    if taken_back:
        run_job(bench.store.jobs.lease("lane", LEASE_S), bench.tools())
    done = bench.store.jobs.get("default", job.id)
    assert (done.state, done.num_restarts) == (JobState.SUCCEEDED, len(taken_back))
    assert [model.version for model in bench.store.models.list("default")] == [1]
    if point not in ("job.embedding_written",):
        assert bench.trunk.rows == NUM_ROWS  # what was computed before the death is not computed again


def test_every_failpoint_of_a_job_is_killed_at(bench):
    seen = bench.failpoints.record()
    bench.submit()
    bench.run()
    assert set(seen) == set(POINTS)


class Fused(Bench):
    """Besides `three`: local features, whole or alone, and pictures that two backbones read."""

    def __init__(self, folder):
        super().__init__(folder)
        self.edge = local_space("edge", "ab" * 32)
        self.own = np.random.default_rng(1).normal(size=(NUM_ROWS, 5)).astype(np.float32)
        self.own_ids = self.store_input(self.edge, "float32", self.own)
        self.feature_ids = self.store.datasets.rows("default", "three").row_ids

    def store_input(self, space, codec, rows):
        ids = [row_id(space, codec, hashlib.sha256(one.tobytes()).digest()) for one in self.features]
        sha256 = chunks.write_chunk(self.blobs, rows)
        self.store.rows.add_chunk("default", sha256, space, codec, ids)
        return ids

    def commit(self, name, space, ids, *, more=(), names=("a", "b", "c"), targets=None):
        labels = self.labels if targets is None else ()
        self.store.datasets.commit("default", name, space, ids, names, labels, targets, name, more_inputs=more)

    def train(self, key="job", **spec):
        """Do a whole job. Returns its record and what it published."""
        self.submit(key, **spec)
        job = self.run()
        assert job.state is JobState.SUCCEEDED, job.error_message
        model = self.store.models.get("default", job.model)
        return job, model, head_from_bytes(self.blobs.get_checked(head_path(model.head_sha256), model.head_sha256))

    def embed_messages(self, job):
        """Return which inputs the events of a job name, in order."""
        events = self.store.jobs.events("default", job.id)
        return list(dict.fromkeys(event.message for event in events if event.phase == "embed"))


@pytest.fixture
def fused(tmp_path):
    return Fused(tmp_path)


def test_local_features_stand_beside_the_embedding_and_in_the_manifest(fused):
    fused.commit("both", fused.space, fused.feature_ids, more=[(fused.edge, fused.own_ids)])
    fused.submit(dataset="both", head=HeadConfig("mlp", (16,), fuse="add"), solver="adamw", epochs=15, **QUICK)
    job = fused.run()
    assert job.state is JobState.SUCCEEDED, job.error_message
    model = fused.store.models.get("default", "head")
    [needed] = model.more_inputs
    assert (needed.space, needed.slices, needed.width, needed.codec) == (fused.edge, ("edge",), 5, "float32")
    assert model.head == HeadConfig("mlp", (16,), fuse="add")
    head = head_from_bytes(fused.blobs.get_checked(head_path(model.head_sha256), model.head_sha256))
    assert [one.slices for one in head.inputs] == [("pooled",), ("edge",)]
    manifest = json.loads(fused.blobs.get(manifest_path(job.id, 1)))
    assert manifest["model"]["more_inputs"][0]["space"]["fingerprint"] == "ab" * 32
    assert [one["name"] for one in manifest["backbones"]] == ["fake"]
    embeds = [event.message for event in fused.store.jobs.events("default", job.id) if event.phase == "embed"]
    assert set(embeds) == {"fake", "edge"}
    # Once more: nothing goes through the trunk.
    fused.submit("again", dataset="both", **QUICK)
    assert fused.run().state is JobState.SUCCEEDED
    assert fused.trunk.rows == NUM_ROWS


def test_local_features_alone_need_no_backbone(fused):
    fused.own[np.arange(NUM_ROWS), fused.labels] += 4
    ids = fused.store_input(local_space("own", "cd" * 32), "float32", fused.own)
    fused.commit("alone", local_space("own", "cd" * 32), ids)
    fused.submit(dataset="alone", backbone="", input_size=0, embedding="auto")
    job = fused.run()
    assert job.state is JobState.SUCCEEDED, job.error_message
    model = fused.store.models.get("default", "head")
    assert (model.space, model.slices, model.embedding_fingerprint) == (local_space("own", "cd" * 32), ("own",), "")
    assert model.metrics["accuracy"] > 0.8
    assert fused.trunk.rows == 0


def test_several_labels_a_row(fused):
    targets = np.stack([fused.labels == 0, fused.labels > 0], axis=1).astype(np.float32)
    fused.commit("tags", fused.space, fused.feature_ids, names=("zero", "more"), targets=targets)
    fused.submit(dataset="tags")
    assert fused.run().state is JobState.SUCCEEDED
    model = fused.store.models.get("default", "head")
    assert (model.task, model.class_names) == ("multi_label", ("zero", "more"))
    assert model.metrics["subset_accuracy"] > 0.9


def test_pictures_are_read_by_each_backbone_once(fused):
    rows = [bytes(row) + b"jpeg" for row in (np.eye(3, dtype=np.uint8)[fused.labels] * 200)]
    fused.store_rows("pictures", IMAGES, "images", rows)
    for key in ("one", "two"):
        job, model, head = fused.train(key, dataset="pictures", more_backbones=(BackboneChoice("second", 8),), **QUICK)
        assert fused.trunk.rows_of == {"fake": NUM_ROWS, "second": NUM_ROWS}
        assert fused.embed_messages(job) == ["fake", "second"]
    second = fused.trunk.second
    assert model.space == fakes.images_space()
    assert model.more_inputs == (
        ModelInput(second.space(second.cut("input")), second.embedding_fingerprint, ("pooled",), 3, codec="images"),
    )
    assert [one.slices for one in head.inputs] == [("pooled",), ("pooled",)]


def test_features_of_each_backbone_go_through_it_once(fused):
    second = fused.trunk.second
    space = second.space(second.cut("mid"))
    ids = fused.store_input(space, "float16", fused.features)
    fused.commit("all", fused.space, fused.feature_ids, more=[(space, ids), (fused.edge, fused.own_ids)])
    for key in ("one", "two"):
        job, model, head = fused.train(key, dataset="all", **QUICK)
        assert fused.trunk.rows_of == {"fake": NUM_ROWS, "second": NUM_ROWS}
        assert fused.embed_messages(job) == ["fake", "second", "edge"]
        assert model.more_inputs == (
            ModelInput(space, second.embedding_fingerprint, ("pooled",), 3, "float16", fakes.CODEC_ERRORS["float16"]),
            ModelInput(fused.edge, "", ("edge",), 5, "float32"),
        )
    assert [sum(one.widths) for one in head.inputs] == [3, 3, 5]
    assert len(fused.embedding_keys) == 2


def with_map(spec, shape):
    (first, mid) = spec.cuts
    return dataclasses.replace(spec, cuts=(first, dataclasses.replace(mid, map_shape=shape)))


def test_a_convolutional_head_reads_the_map_at_its_tap(fused):
    fused.commit("both", fused.space, fused.feature_ids, more=[(fused.edge, fused.own_ids)])
    fused.trunk.spec = with_map(fused.trunk.spec, (3, 2, 2))
    asked = {
        "dataset": "both",
        "head": HeadConfig("conv", channels=(8,), tap="mid"),
        "embedding": "slices",
        "slices": ("mid.map",),
        "solver": "adamw",
        "epochs": 25,
        **QUICK,
    }
    for key in ("one", "two"):
        _, model, head = fused.train(key, **asked)
        assert fused.trunk.rows_of == {"fake": NUM_ROWS}
    assert fused.trunk.slices_of == {"fake": ("mid.map",)}
    assert [(one.slices, one.map_shape) for one in head.inputs] == [(("mid.map",), (3, 2, 2)), (("edge",), ())]
    assert (model.slices, model.head) == (("mid.map",), asked["head"])
    assert not model.outliers_sha256
    assert model.metrics["accuracy"] > 0.9
    # Neither the embedding nor a map of another shape is taken for it.
    fused.train("pooled", dataset="both", **QUICK)
    fused.trunk.spec = with_map(fused.trunk.spec, (3, 4, 1))
    fused.train("other", **asked)
    assert fused.trunk.rows_of == {"fake": 3 * NUM_ROWS}


OWN_STEM = dataclasses.replace(fakes.images_space(cut="mid"), fingerprint="9" * 64, local_model="mine")
CODES = dataclasses.replace(
    fakes.images_space(cut="mid"),
    fingerprint=bottleneck_fingerprint(fakes.fake_spec().cut("mid").fingerprint, "c" * 64),
    bottleneck="c" * 64,
)


@pytest.mark.parametrize(
    ("space", "channels", "error"),
    [(CODES, 1, BOTTLENECK_ERROR), (OWN_STEM, 3, fakes.CODEC_ERRORS["int8"])],
    ids=["bottleneck", "own stem"],
)
def test_what_the_trunk_says_of_rows_of_ones_own_stands(fused, space, channels, error):
    ids = fused.store_input(space, "int8", pack(fused.features[:, :channels], "int8"))
    fused.commit("own", space, ids)
    for key, rows in (("one", NUM_ROWS), ("two", NUM_ROWS + 1)):
        # Once every embedding is cached, one row goes there to ask.
        _, model, _ = fused.train(key, dataset="own", **QUICK)
        assert (model.space, model.codec, model.codec_error) == (space, "int8", error)
        assert fused.trunk.rows == rows
    assert fused.trunk.costs_asked == []


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_local_features_in_fewer_bytes_are_unpacked(fused, codec):
    fused.own[np.arange(NUM_ROWS), fused.labels] += 4
    space = local_space("own", "cd" * 32)
    fused.commit("alone", space, fused.store_input(space, codec, pack(fused.own, codec)))
    _, model, head = fused.train(dataset="alone", backbone="", input_size=0, **QUICK)
    assert (model.codec, model.codec_error, head.num_features) == (codec, 0.0, 5)
    assert model.metrics["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda own: np.where(np.arange(NUM_ROWS)[:, None] == 7, np.float32(np.nan), own), "NOT_FINITE"),
        (lambda own: own[:, :, None], "CORRUPT_DATA"),
        (lambda own: [b"jpeg"] * NUM_ROWS, "CORRUPT_DATA"),
    ],
    ids=["nan", "maps", "images"],
)
def test_local_features_that_are_none_fail_the_job(fused, change, code):
    space = local_space("own", "cd" * 32)
    fused.commit("own", fused.space, fused.feature_ids, more=[(space, fused.store_input(space, "", change(fused.own)))])
    fused.submit(dataset="own", **QUICK)
    job = fused.run()
    assert (job.state, job.error_code) == (JobState.FAILED, code)
    assert ("row 7" if code == "NOT_FINITE" else "'own'") in job.error_message


def test_a_manifest_says_all_that_a_model_was_made_of(fused):
    fused.commit("both", fused.space, fused.feature_ids, more=[(fused.edge, fused.own_ids)])
    job, model, _ = fused.train(dataset="both", **QUICK)
    manifest = json.loads(fused.blobs.get(manifest_path(job.id, 1)))
    head = {
        "kind": "linear",
        "hidden": [],
        "activation": "relu",
        "batch_norm": False,
        "dropout": 0.0,
        "channels": [],
        "tap": "",
        "fuse": "concat",
        "fuse_width": 0,
        "slices": [],
        "lora_rank": 0,
    }
    assert manifest == {
        "format": 2,
        "model": {
            "tenant": "default",
            "name": "head",
            "version": None,
            "task": "classification",
            "class_names": ["a", "b", "c"],
            "num_outputs": 3,
            "space": {
                "backbone": "fake",
                "cut": "mid",
                "input_size": 8,
                "fingerprint": fused.space.fingerprint,
                "local_model": "",
                "bottleneck": "",
            },
            "embedding_fingerprint": fused.trunk.spec.embedding_fingerprint,
            "slices": ["pooled"],
            "metrics": model.metrics,
            "dataset": "both@1",
            "dataset_digest": fused.store.datasets.get("default", "both@1").digest,
            "head_sha256": model.head_sha256,
            "versions": {"numpy": "x"},
            "job_id": job.id,
            "create_time": fused.clock.now(),
            "codec": "float16",
            "codec_error": 0.0005,
            "more_inputs": [
                {
                    "space": {
                        "backbone": "",
                        "cut": "",
                        "input_size": 0,
                        "fingerprint": "ab" * 32,
                        "local_model": "edge",
                        "bottleneck": "",
                    },
                    "embedding_fingerprint": "",
                    "slices": ["edge"],
                    "width": 5,
                    "codec": "float32",
                    "codec_error": 0.0,
                }
            ],
            "head": head,
            "conformal": json.loads(json.dumps(asdict(model.conformal))),
            "warnings": list(model.warnings),
            "evaluation_sha256": model.evaluation_sha256,
            "outliers_sha256": model.outliers_sha256,
            "fine_tuning": None,
        },
        "job": {
            "model": "head",
            "dataset": "both@1",
            "backbone": "fake",
            "input_size": 8,
            "embedding": "pooled",
            "slices": [],
            "head": head,
            "solver": "lbfgs",
            "epochs": 0,
            "batch_size": 0,
            "learning_rate": 0.0,
            "l2": 0.01,
            "validation_fraction": 0.2,
            "refit": False,
            "seed": 0,
            "loss": asdict(LossConfig()) | {"class_weights": [], "class_order": []},
            "optimiser": asdict(OptimiserConfig()),
            "select_by": "",
            "calibrate": True,
            "more_backbones": [],
            "sweep": None,
            "fine_tune": None,
        },
        "backbones": [
            {
                "name": "fake",
                "weights": "none",
                "weights_sha256": "w",
                "runtime": "",
                "preprocessing": {
                    "input_size": 8,
                    "crop_fraction": 1.0,
                    "interpolation": "nearest",
                    "mean": [0.5] * 3,
                    "std": [0.5] * 3,
                },
            }
        ],
        "candidates": [],
        "trials": [],
    }
    assert model.conformal.num_rows == model.metrics["num_validation_rows"]
    evaluation = evaluation_from_bytes(
        fused.blobs.get_checked(evaluation_path(model.evaluation_sha256), model.evaluation_sha256)
    )
    assert evaluation.num_held_out == model.metrics["num_validation_rows"]
    assert evaluation.answers.shape == (len(evaluation.rows), 3)
    assert evaluation.curves["loss"]
    detector = detector_from_bytes(fused.blobs.get_checked(outliers_path(model.outliers_sha256), model.outliers_sha256))
    assert (detector.slices, detector.more_width) == (("pooled",), 5)
    assert detector.is_held_out and detector.num_rows == model.metrics["num_validation_rows"]


def test_local_features_of_two_widths_fail_the_job(fused):
    space = local_space("odd", "ef" * 32)
    ids = [row_id(space, "float32", hashlib.sha256(one.tobytes()).digest()) for one in fused.features]
    for part, width in ((slice(0, 100), 5), (slice(100, None), 6)):
        values = np.zeros((len(ids[part]), width), np.float32)
        fused.store.rows.add_chunk("default", chunks.write_chunk(fused.blobs, values), space, "float32", ids[part])
    fused.commit("odd", fused.space, fused.feature_ids, more=[(space, ids)])
    fused.submit(dataset="odd")
    job = fused.run()
    assert (job.state, job.error_code) == (JobState.FAILED, "SHAPE_MISMATCH")
    assert "'odd'" in job.error_message


class Signals(Failpoints):
    """Failpoints that do something else than kill."""

    def __init__(self):
        super().__init__()
        self.at = {}

    def hit(self, name):
        """Do what is to be done at this point."""
        super().hit(name)
        self.at.get(name, lambda: None)()


class TestCancel:
    """A job that is cancelled in each of its phases ends CANCELLED, and publishes nothing."""

    @pytest.fixture
    def bench(self, tmp_path, monkeypatch):
        from trunkline_worker.training import keeper

        monkeypatch.setattr(keeper, "RENEW_INTERVAL_S", 0.0)
        bench = Bench(tmp_path)
        bench.failpoints = Signals()
        return bench

    def ended(self, bench, job):
        job = bench.store.jobs.get("default", job.id)
        assert (job.state, job.model) == (JobState.CANCELLED, "")
        assert bench.store.models.list("default") == []
        last = bench.store.jobs.events("default", job.id)[-1]
        assert (last.phase, last.message) == ("end", "cancelled")
        assert bench.store.jobs.lease("lane", LEASE_S) is None
        bench.submit("again")
        assert bench.run().model == "head@1"

    def test_while_it_queues(self, bench):
        job = bench.submit()
        bench.store.jobs.request_cancel("default", job.id)
        self.ended(bench, job)

    def test_when_a_worker_has_just_taken_it(self, bench):
        job = bench.submit()
        lease = bench.store.jobs.lease("lane", LEASE_S)
        bench.store.jobs.request_cancel("default", job.id)
        run_job(lease, bench.tools())
        self.ended(bench, job)

    @pytest.mark.parametrize("phase", ["select", "sweep", "fit", "assess"])
    def test_while_it_runs(self, bench, monkeypatch, phase):
        from trunkline_worker.training.keeper import LeaseKeeper

        report, keepers = LeaseKeeper.report, []

        def told(self, event):
            report(self, event)
            if event.phase == phase and not keepers:
                keepers.append(self)
                bench.store.jobs.request_cancel("default", job.id)
                # The next question to the store has the answer; nothing else is waited for.
                self._cancelled |= bench.store.jobs.renew(job.id, 1, LEASE_S)

        monkeypatch.setattr(LeaseKeeper, "report", told)
        sweep = SweepConfig(l2=(1.0, 2.0)) if phase == "sweep" else None
        job = bench.submit(embedding="auto" if phase == "select" else "pooled", sweep=sweep)
        bench.run()
        monkeypatch.undo()
        phases = [one.phase for one in bench.store.jobs.events("default", job.id)]
        assert keepers and "publish" not in phases
        self.ended(bench, job)

    @pytest.mark.parametrize("point", ["job.head_written", "job.manifest_written", "job.before_succeed"])
    def test_while_it_saves(self, bench, point):
        job = bench.submit()
        bench.failpoints.at[point] = lambda: bench.store.jobs.request_cancel("default", job.id)
        bench.run()
        bench.failpoints.at.clear()
        self.ended(bench, job)

    def test_after_it_was_saved_it_is_too_late(self, bench):
        job = bench.submit()
        asked = []

        def cancel():
            with pytest.raises(WireError) as caught:
                bench.store.jobs.request_cancel("default", job.id)
            asked.append(caught.value.code)

        bench.failpoints.at["job.after_succeed"] = cancel
        assert (bench.run().model, asked) == ("head@1", [ErrorCode.JOB_STATE])


@pytest.mark.parametrize("folder", ["chunks", "heads", "evaluations", "models"])
def test_a_disk_that_becomes_full_at_any_file_fails_the_job_and_the_next_one_succeeds(bench, monkeypatch, folder):
    put, refused = BlobStore.put, []

    def maybe(self, path, data):
        if path.startswith(f"{folder}/"):
            refused.append(path)
            raise WireError(ErrorCode.STORAGE_FULL, "no space is left")
        put(self, path, data)

    job = bench.submit()
    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "put", maybe)
        bench.run()
    assert refused
    ended = bench.store.jobs.get("default", job.id)
    assert (ended.state, ended.error_code) == (JobState.FAILED, "STORAGE_FULL")
    assert "no space is left" in ended.error_message and bench.store.models.list("default") == []
    bench.submit("again")
    assert bench.run().model == "head@1"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")],
    ids=["python", "torch"],
)
def test_a_job_that_memory_is_too_small_for_says_so(bench, error):
    def fail():
        raise error

    bench.trunk.on_batch = fail
    bench.submit()
    job = bench.run()
    assert (job.state, job.error_code) == (JobState.FAILED, "WORKER_OOM")
    bench.trunk.on_batch = lambda: None
    bench.submit("again")
    assert bench.run().state is JobState.SUCCEEDED


def test_a_name_that_is_there_gets_its_next_version_and_what_was_there_stays(bench):
    first = bench.submit()
    bench.run()
    kept = bench.store.models.get("default", "head@1")
    bench.submit("again", seed=5)
    assert bench.run().model == "head@2"
    assert bench.store.models.get("default", "head@1") == kept
    assert bench.store.models.get("default", "head").version == 2
    assert bench.store.jobs.get("default", first.id).model == "head@1"


def test_more_answers_than_memory_holds_are_refused_when_the_job_is_submitted(bench, monkeypatch):
    from trunkline_wire import sizes

    monkeypatch.setattr(sizes, "MAX_ANSWERS", 3 * NUM_ROWS - 1)
    with pytest.raises(WireError, match=r"300 rows of 3 classes.*Leave rare classes out") as caught:
        bench.submit()
    assert caught.value.code is ErrorCode.BAD_LABELS
