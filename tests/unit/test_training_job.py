"""A job from its lease to the published model, on the real store, without Ray."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import serving_fakes as fakes
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.heads import HeadConfig
from trunkline_wire.quantise import PackedRows, pack, unpack
from trunkline_wire.rows import row_id
from trunkline_wire.specs import FLOAT32, IMAGES, INT8, SliceSpec, codec_label, local_space
from trunkline_worker.engine.api import Extraction
from trunkline_worker.heads.artefact import head_from_bytes, head_path
from trunkline_worker.store import chunks
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.database import Database
from trunkline_worker.store.failpoints import Failpoints, SimulatedKill
from trunkline_worker.store.metadata import MetadataStore
from trunkline_worker.store.records import BackboneChoice, JobSpec, JobState
from trunkline_worker.training.job import JobTools, manifest_path, run_job

NUM_ROWS = 300
LEASE_S = 3600.0


class FakeTrunk:
    """A trunk whose embedding is the mean of each channel. Counts what goes through it and what it is asked."""

    def __init__(self):
        self.rows = 0
        self.spec = fakes.fake_spec()
        self.bad_row = None
        self.on_batch = lambda: None
        self.spaces = set()
        self.costs_asked = []

    def describe(self, backbone, input_size):
        return self.spec

    def cut_cost(self, backbone, cut, input_size):
        self.costs_asked.append((backbone, cut, input_size))
        return fakes.fake_cost(self.spec.cut(cut))

    def extract(self, batches, slices=()):
        for space, rows in batches:
            self.on_batch()
            self.rows += len(rows)
            self.spaces.add(space)
            errors = {}
            if self.bad_row is not None:
                errors[self.bad_row] = WireError(ErrorCode.CORRUPT_IMAGE, "not a picture")
            if space.is_input:
                embedding = np.zeros((len(rows), 6), np.float32)
                embedding[:, 3:] = np.stack([np.frombuffer(row, np.uint8)[:3] for row in rows])
            else:
                values = unpack(rows) if isinstance(rows, PackedRows) else rows
                embedding = values.mean(axis=(2, 3)).astype(np.float32)
            slices = [one for one in self.spec.slices if one.name in self.spec.cut(space.cut).slices]
            yield Extraction(embedding, tuple(slices), errors, codec_use=fakes.fake_use(space, rows))


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

    def commit(self, name, space, ids, *, more=(), names=("a", "b", "c"), indices=None, targets=None):
        labels = self.labels if indices is None and targets is None else (indices or ())
        self.store.datasets.commit("default", name, space, ids, names, labels, targets, name, more_inputs=more)


@pytest.fixture
def fused(tmp_path):
    return Fused(tmp_path)


def test_local_features_stand_beside_the_embedding_and_in_the_manifest(fused):
    fused.commit("both", fused.space, fused.feature_ids, more=[(fused.edge, fused.own_ids)])
    fused.submit(dataset="both", head=HeadConfig("mlp", (16,), fuse="add"), solver="adam", epochs=15)
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
    more = (BackboneChoice("second", 8),)
    for key in ("one", "two"):
        fused.submit(key, dataset="pictures", more_backbones=more, **QUICK)
        job = fused.run()
        assert job.state is JobState.SUCCEEDED, job.error_message
        # The fake has one network under two names: what the first read serves the second.
        assert fused.trunk.rows == NUM_ROWS
    model = fused.store.models.get("default", "head")
    assert [one.slices for one in model.more_inputs] == [("pooled",)]


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
