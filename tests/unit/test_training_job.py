"""A job from its lease to the published model, on the real store, without Ray."""

import hashlib
import json

import numpy as np
import pytest
import serving_fakes as fakes
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.rows import row_id
from trunkline_worker.engine.api import Extraction
from trunkline_worker.heads.artefact import head_from_bytes, head_path
from trunkline_worker.store import chunks
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.database import Database
from trunkline_worker.store.failpoints import Failpoints, SimulatedKill
from trunkline_worker.store.metadata import MetadataStore
from trunkline_worker.store.records import JobSpec, JobState
from trunkline_worker.training.job import JobTools, manifest_path, run_job

NUM_ROWS = 300
LEASE_S = 3600.0


class FakeTrunk:
    """A trunk whose embedding is the mean of each channel, twice. Counts what goes through it."""

    def __init__(self):
        self.rows = 0
        self.spec = fakes.fake_spec()
        self.bad_row = None
        self.on_batch = lambda: None

    def describe(self, backbone, input_size):
        return self.spec

    def extract(self, batches):
        for space, rows in batches:
            self.on_batch()
            assert space.cut == "mid"
            self.rows += len(rows)
            errors = {}
            if self.bad_row is not None:
                errors[self.bad_row] = WireError(ErrorCode.CORRUPT_IMAGE, "not a picture")
            yield Extraction(rows.mean(axis=(2, 3)).astype(np.float32), self.spec.slices[1:], errors)


class Bench:
    """Store, blobs, trunk and one dataset that can be learnt."""

    def __init__(self, folder):
        self.failpoints = Failpoints()
        self.clock = ManualClock()
        self.blobs = BlobStore(f"file://{folder}/data")
        self.store = MetadataStore(Database(f"sqlite:///{folder}/metadata.sqlite"), clock=self.clock)
        self.trunk = FakeTrunk()
        spec = self.trunk.spec
        self.space = spec.space(spec.cut("mid"))
        rng = np.random.default_rng(0)
        labels = np.arange(NUM_ROWS) % 3
        features = rng.normal(size=(NUM_ROWS, 3, 2, 2)).astype(np.float16)
        features[np.arange(NUM_ROWS), labels] += 4
        ids = [row_id(self.space, "float16", hashlib.sha256(one.tobytes()).digest()) for one in features]
        sha256 = chunks.write_chunk(self.blobs, features)
        self.store.rows.add_chunk("default", sha256, self.space, "float16", ids)
        self.store.datasets.commit("default", "three", self.space, ids, ("a", "b", "c"), labels, None, "commit")

    def call(self, name, *args):
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


def test_features_of_other_weights_fail_the_job(bench):
    bench.submit()
    other = fakes.fake_spec()
    cut = other.cuts[1]
    object.__setattr__(cut, "fingerprint", "0" * 64)
    bench.trunk.spec = other
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
