"""Jobs and models: the state machine, leases, fences, events, idempotency, tenants."""

import hashlib
import itertools
import math
import os
import pickle  # noqa: TID251 - whether a StaleLeaseError stays one on the way back from an actor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import FineTuneConfig, LossConfig, OptimiserConfig
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import FeatureSpace, local_space
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.database import Database
from trunkline_worker.store.failpoints import Failpoints, SimulatedKill
from trunkline_worker.store.jobs import StaleLeaseError
from trunkline_worker.store.metadata import MetadataStore
from trunkline_worker.store.records import (
    TUNING_JOB,
    BackboneChoice,
    Candidate,
    Event,
    FineTuning,
    JobRecord,
    JobSpec,
    JobState,
    Lease,
    ModelInput,
    ModelRecord,
)

SPACE = FeatureSpace("net", "blocks.2", 96, "f" * 64)
ROWS = [hashlib.sha256(bytes([number])).digest() for number in range(4)]
HEAD = HeadConfig(
    "conv", (8, 4), "gelu", batch_norm=True, dropout=0.25, channels=(16, 8), tap="blocks.2", fuse="gate", fuse_width=32
)
SPEC = JobSpec(
    model="head",
    dataset="digits",
    backbone="net",
    input_size=96,
    slices=("a", "b"),
    head=HEAD,
    solver="adamw",
    l2=0.5,
    seed=7,
    loss=LossConfig("huber", huber_delta=1.5, class_weights=(1.0, 2.0)),
    optimiser=OptimiserConfig(ema=0.5, precision="bfloat16"),
    select_by="rmse",
    calibrate=False,
    more_backbones=(BackboneChoice("library/net", 224), BackboneChoice("third")),
)
MODEL = ModelRecord(
    tenant="",
    name="",
    version=0,
    task="classification",
    class_names=("a", "b"),
    num_outputs=2,
    space=SPACE,
    embedding_fingerprint="e" * 64,
    slices=("blocks.2:mean",),
    metrics={"accuracy": 0.75},
    dataset="digits@1",
    dataset_digest="d" * 64,
    head_sha256="1" * 64,
    versions={"trunkline": "0.1.0"},
    job_id="",
    create_time=0.0,
    codec="int8@int8",
    codec_error=0.03125,
    candidates=(Candidate(("blocks.2:mean",), 8, -0.25, 0.75), Candidate(("a", "b"), 4, -math.inf, None)),
    more_inputs=(
        ModelInput(
            FeatureSpace("second", "mid", 32, "d" * 64, bottleneck="b" * 64), "9" * 64, ("a", "b"), 4, "int8", 0.25
        ),
        ModelInput(local_space("sensor", "c" * 64), "", ("sensor",), 3, "float32"),
    ),
    head=HEAD,
    outliers_sha256="7" * 64,
)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


@pytest.fixture
def failpoints() -> Failpoints:
    return Failpoints()


@pytest.fixture
def store(database: Database, clock: ManualClock, failpoints: Failpoints) -> MetadataStore:
    numbers = itertools.count(1)
    store = MetadataStore(database, clock=clock, new_id=lambda: f"job{next(numbers)}", failpoints=failpoints)
    for tenant in ("t", "u"):
        store.rows.add_chunk(tenant, "a" * 64, SPACE, "float16", ROWS)
        store.datasets.commit(tenant, "digits", SPACE, ROWS, ["a", "b"], [0, 1, 0, 1], None, "d1")
    return store


def submit(store: MetadataStore, key: str = "", tenant: str = "t", spec: JobSpec = SPEC) -> JobRecord:
    return store.jobs.submit(tenant, spec, key or os.urandom(8).hex())


def leased(store: MetadataStore, lane: str = "lane", lease_s: float = 10.0) -> Lease:
    lease = store.jobs.lease(lane, lease_s)
    assert lease is not None
    return lease


def phases(store: MetadataStore, job_id: str, tenant: str = "t") -> list[str]:
    events = store.jobs.events(tenant, job_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event.phase for event in events]


def code_of(call: object) -> ErrorCode:
    with pytest.raises(WireError) as error:
        call()  # type: ignore[operator]
    return error.value.code


def test_submit_lease_succeed(store: MetadataStore, clock: ManualClock) -> None:
    job = submit(store)
    assert job.state is JobState.QUEUED
    assert job.spec == replace(SPEC, dataset="digits@1")
    assert job.create_time == 1000.0
    assert store.jobs.get("t", job.id) == job
    clock.advance(5)
    lease = leased(store)
    assert (lease.job.id, lease.job.tenant, lease.fence, lease.deadline) == (job.id, "t", 1, 1015.0)
    assert lease.job.state is JobState.RUNNING
    assert lease.job.start_time == 1005.0
    assert store.jobs.lease("other", 10.0) is None
    assert store.jobs.renew(job.id, lease.fence, 10.0) is False
    store.jobs.append_events(job.id, 1, [Event("fit", 0.5, {"loss": 0.25}, "half\0way"), Event("fit", 1.0, time=7.0)])
    clock.advance(5)
    model = store.jobs.succeed(job.id, lease.fence, MODEL)
    assert model == replace(MODEL, tenant="t", name="head", version=1, job_id=job.id, create_time=1010.0)
    ended = store.jobs.get("t", job.id)
    assert (ended.state, ended.model, ended.end_time) == (JobState.SUCCEEDED, "head@1", 1010.0)
    assert (ended.error_code, ended.error_message, ended.num_restarts) == ("", "", 0)
    queued, first, second, end = store.jobs.events("t", job.id)
    assert queued == Event("queued", time=1000.0, seq=1)
    assert first == Event("fit", 0.5, {"loss": 0.25}, "halfway", 1005.0, 2)
    assert second.time == 7.0
    assert end == Event("end", 1.0, {"accuracy": 0.75}, "published head@1", 1010.0, 4)
    assert store.jobs.events("t", job.id, after_seq=1, limit=1) == [first]
    assert store.models.get("t", "head") == store.models.get("t", "head@1") == model
    assert store.models.list("t") == [replace(model, candidates=())]


def test_a_job_trains_on_what_its_dataset_was_when_it_was_submitted(store: MetadataStore) -> None:
    job = submit(store)
    store.datasets.commit("t", "digits", SPACE, ROWS, ["a", "b"], [1, 1, 0, 0], None, "d2")
    assert leased(store).job.spec.dataset == "digits@1"
    assert store.jobs.get("t", job.id).spec.dataset == "digits@1"
    assert submit(store).spec.dataset == "digits@2"


def test_the_queue_is_first_in_first_out_across_tenants(store: MetadataStore) -> None:
    order = [submit(store, tenant=tenant).id for tenant in ("t", "u", "t")]
    assert [leased(store, f"lane{number}").job.id for number in range(3)] == order
    assert [job.id for job in store.jobs.list("t")] == [order[2], order[0]]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": "a/b"}, ErrorCode.INVALID_ARGUMENT),
        ({"model": ""}, ErrorCode.INVALID_ARGUMENT),
        ({"model": "head@1"}, ErrorCode.INVALID_ARGUMENT),
        ({"backbone": "../x"}, ErrorCode.INVALID_ARGUMENT),
        ({"more_backbones": (BackboneChoice("net"), BackboneChoice("a b"))}, ErrorCode.INVALID_ARGUMENT),
        ({"dataset": "a b"}, ErrorCode.INVALID_ARGUMENT),
        ({"dataset": "nothing"}, ErrorCode.NOT_FOUND),
        ({"dataset": "digits@9"}, ErrorCode.NOT_FOUND),
        ({"dataset": "one-class"}, ErrorCode.BAD_LABELS),
        ({"dataset": "no-class"}, ErrorCode.BAD_LABELS),
    ],
)
def test_bad_jobs_are_refused_at_submit(store: MetadataStore, changes: dict[str, Any], code: ErrorCode) -> None:
    store.datasets.commit("t", "one-class", SPACE, ROWS, ["a", "b"], [1, 1, 1, 1], None, "d2")
    store.datasets.commit("t", "no-class", SPACE, ROWS, ["a", "b"], [], np.zeros((4, 2), np.float32), "d3")
    assert code_of(lambda: submit(store, spec=replace(SPEC, **changes))) is code
    assert store.jobs.list("t") == []


def test_numbers_need_no_two_classes(store: MetadataStore) -> None:
    store.datasets.commit("t", "values", SPACE, ROWS, [], [], np.zeros((4, 1), np.float32), "d2")
    assert submit(store, spec=replace(SPEC, dataset="values", backbone="")).spec.dataset == "values@1"


def test_one_row_of_one_class_is_enough_where_a_row_may_be_of_several(store: MetadataStore) -> None:
    targets = np.zeros((4, 2), np.float32)
    targets[2, 1] = 1
    store.datasets.commit("t", "tags", SPACE, ROWS, ["a", "b"], [], targets, "d2")
    assert submit(store, spec=replace(SPEC, dataset="tags")).spec.dataset == "tags@1"


@pytest.mark.parametrize("point", ["before_commit", "after_commit"])
def test_a_lost_reply_to_submit(store: MetadataStore, failpoints: Failpoints, point: str) -> None:
    failpoints.arm(f"store.jobs.submit.{point}")
    with pytest.raises(SimulatedKill):
        submit(store, "key")
    job = submit(store, "key")
    store.datasets.commit("t", "digits", SPACE, ROWS, ["a", "b"], [1, 1, 0, 0], None, "d2")
    assert submit(store, "key").id == job.id
    assert [one.id for one in store.jobs.list("t")] == [job.id]
    with pytest.raises(WireError, match="different content") as error:
        submit(store, "key", spec=replace(SPEC, seed=8))
    assert error.value.code is ErrorCode.ALREADY_EXISTS
    assert submit(store, "key", tenant="u").id != job.id


def test_versions_count_per_name_and_tenant(store: MetadataStore) -> None:
    specs = [("t", "head"), ("t", "head"), ("u", "head"), ("t", "other"), ("t", "head")]
    references = []
    for number, (tenant, name) in enumerate(specs):
        submit(store, tenant=tenant, spec=replace(SPEC, model=name))
        lease = leased(store)
        model = replace(MODEL, head_sha256=str(number) * 64)
        references.append(store.jobs.succeed(lease.job.id, lease.fence, model).reference)
    assert references == ["head@1", "head@2", "head@1", "other@1", "head@3"]
    assert [one.reference for one in store.models.list("t")] == ["head@1", "head@2", "head@3", "other@1"]
    assert store.models.get("t", "head").head_sha256 == "4" * 64
    assert store.models.get("t", "head@2").head_sha256 == "1" * 64


def test_a_retried_success_is_the_same_model(store: MetadataStore, failpoints: Failpoints) -> None:
    job = submit(store)
    lease = leased(store)
    failpoints.arm("store.jobs.succeed.after_commit")
    with pytest.raises(SimulatedKill):
        store.jobs.succeed(job.id, lease.fence, MODEL)
    assert store.jobs.succeed(job.id, lease.fence, MODEL).reference == "head@1"
    assert len(store.models.list("t")) == 1
    with pytest.raises(StaleLeaseError):
        store.jobs.succeed(job.id, lease.fence, replace(MODEL, head_sha256="2" * 64))
    for call in everything_a_holder_does(store, job.id, lease.fence):
        if "succeed" not in call.__name__:
            with pytest.raises(StaleLeaseError):
                call()


def test_failure_is_kept_with_its_reason(store: MetadataStore) -> None:
    job = submit(store)
    lease = leased(store)
    for _ in range(2):
        store.jobs.fail(job.id, lease.fence, ErrorCode.STORAGE_FULL, "no space " + "x" * 5000)
    ended = store.jobs.get("t", job.id)
    assert (ended.state, ended.error_code) == (JobState.FAILED, "STORAGE_FULL")
    assert ended.error_message.startswith("no space")
    assert len(ended.error_message) == 2000
    assert phases(store, job.id) == ["queued", "end"]
    assert store.models.list("t") == []


# --- cancel -----------------------------------------------------------------------------------------------------------


def test_a_queued_job_is_cancelled_at_once(store: MetadataStore) -> None:
    job = submit(store)
    cancelled = store.jobs.request_cancel("t", job.id)
    assert (cancelled.state, cancelled.cancel_requested, cancelled.end_time) == (JobState.CANCELLED, True, 1000.0)
    assert store.jobs.lease("lane", 10.0) is None
    assert phases(store, job.id) == ["queued", "end"]
    assert code_of(lambda: store.jobs.request_cancel("t", job.id)) is ErrorCode.JOB_STATE


def test_a_running_job_is_asked(store: MetadataStore) -> None:
    job = submit(store)
    lease = leased(store)
    assert code_of(lambda: store.jobs.mark_cancelled(job.id, lease.fence)) is ErrorCode.JOB_STATE
    asked = store.jobs.request_cancel("t", job.id)
    assert (asked.state, asked.cancel_requested) == (JobState.RUNNING, True)
    assert store.jobs.request_cancel("t", job.id) == asked
    assert store.jobs.renew(job.id, lease.fence, 10.0) is True
    for _ in range(2):
        store.jobs.mark_cancelled(job.id, lease.fence)
    assert store.jobs.get("t", job.id).state is JobState.CANCELLED
    assert phases(store, job.id) == ["queued", "end"]


def test_nothing_is_published_after_a_cancel(store: MetadataStore) -> None:
    job = submit(store)
    lease = leased(store)
    store.jobs.request_cancel("t", job.id)
    for _ in range(2):
        with pytest.raises(StaleLeaseError, match=r"cancelled|CANCELLED"):
            store.jobs.succeed(job.id, lease.fence, MODEL)
    assert store.jobs.get("t", job.id).state is JobState.CANCELLED
    assert store.models.list("t") == []
    assert phases(store, job.id) == ["queued", "end"]


def test_a_cancelled_job_whose_worker_died_ends(store: MetadataStore, clock: ManualClock) -> None:
    job = submit(store)
    leased(store)
    store.jobs.request_cancel("t", job.id)
    clock.advance(11)
    assert store.jobs.expire() == [job.id]
    assert store.jobs.get("t", job.id).state is JobState.CANCELLED


def test_a_failure_after_a_cancel_keeps_its_reason(store: MetadataStore) -> None:
    job = submit(store)
    lease = leased(store)
    store.jobs.request_cancel("t", job.id)
    store.jobs.fail(job.id, lease.fence, ErrorCode.WORKER_OOM, "too big")
    assert store.jobs.get("t", job.id).state is JobState.FAILED


def test_a_job_that_has_ended_cannot_be_cancelled(store: MetadataStore) -> None:
    job = submit(store)
    store.jobs.succeed(job.id, leased(store).fence, MODEL)
    assert code_of(lambda: store.jobs.request_cancel("t", job.id)) is ErrorCode.JOB_STATE


def test_a_lost_reply_to_cancel(store: MetadataStore, failpoints: Failpoints) -> None:
    job, other = submit(store), submit(store)
    failpoints.arm("store.jobs.request_cancel.after_commit")
    with pytest.raises(SimulatedKill):
        store.jobs.request_cancel("t", job.id, "key")
    assert store.jobs.request_cancel("t", job.id, "key").state is JobState.CANCELLED
    assert code_of(lambda: store.jobs.request_cancel("t", job.id, "another")) is ErrorCode.JOB_STATE
    assert code_of(lambda: store.jobs.request_cancel("t", other.id, "key")) is ErrorCode.ALREADY_EXISTS


# --- leases and fences ------------------------------------------------------------------------------------------------


def everything_a_holder_does(store: MetadataStore, job_id: str, fence: int) -> list[object]:
    def renew() -> None:
        store.jobs.renew(job_id, fence, 10.0)

    def append_events() -> None:
        store.jobs.append_events(job_id, fence, [Event("fit")])

    def succeed() -> None:
        store.jobs.succeed(job_id, fence, MODEL)

    def fail() -> None:
        store.jobs.fail(job_id, fence, ErrorCode.INTERNAL, "late")

    def mark_cancelled() -> None:
        store.jobs.mark_cancelled(job_id, fence)

    return [renew, append_events, succeed, fail, mark_cancelled]


@pytest.mark.parametrize("leased_again", [False, True])
def test_a_paused_worker_that_wakes_up_late_changes_nothing(
    store: MetadataStore, clock: ManualClock, leased_again: bool
) -> None:
    job = submit(store)
    paused = leased(store, "first")
    clock.advance(11)
    assert store.jobs.expire() == [job.id]
    if leased_again:
        assert leased(store, "second").fence > paused.fence
    before = (store.jobs.get("t", job.id), store.jobs.events("t", job.id))
    for call in everything_a_holder_does(store, job.id, paused.fence):
        with pytest.raises(StaleLeaseError) as error:
            call()  # type: ignore[operator]
        assert error.value.code is ErrorCode.JOB_STATE
    assert (store.jobs.get("t", job.id), store.jobs.events("t", job.id)) == before
    assert store.models.list("t") == []


def test_both_workers_finish_and_one_counts(store: MetadataStore, clock: ManualClock) -> None:
    job = submit(store)
    first = leased(store, "first")
    clock.advance(11)
    store.jobs.expire()
    second = leased(store, "second")
    published = store.jobs.succeed(job.id, second.fence, replace(MODEL, head_sha256="2" * 64))
    with pytest.raises(StaleLeaseError):
        store.jobs.succeed(job.id, first.fence, MODEL)
    assert store.models.list("t") == [replace(published, candidates=())]


def test_a_renewed_lease_does_not_expire(store: MetadataStore, clock: ManualClock) -> None:
    job = submit(store)
    lease = leased(store)
    for _ in range(3):
        clock.advance(9)
        assert store.jobs.expire() == []
        store.jobs.renew(job.id, lease.fence, 10.0)
    clock.advance(10)
    assert store.jobs.expire() == [], "a lease holds until its deadline"
    clock.advance(0.5)
    assert store.jobs.expire() == [job.id]
    assert store.jobs.expire() == []


def test_late_but_not_yet_taken_back_still_counts(store: MetadataStore, clock: ManualClock) -> None:
    job = submit(store)
    lease = leased(store)
    clock.advance(60)
    assert store.jobs.succeed(job.id, lease.fence, MODEL).version == 1
    assert store.jobs.expire() == []


def test_a_job_taken_back_keeps_its_place_and_its_start(store: MetadataStore, clock: ManualClock) -> None:
    first, _ = submit(store), submit(store)
    leased(store)
    clock.advance(11)
    store.jobs.expire()
    again = leased(store)
    assert again.job.id == first.id
    assert (again.job.num_restarts, again.job.start_time, again.fence) == (1, 1000.0, 3)
    assert phases(store, first.id) == ["queued", "restart"]


def test_too_many_restarts_fail_the_job(store: MetadataStore, clock: ManualClock) -> None:
    job, healthy = submit(store), submit(store)
    for number in range(1, 6):
        assert leased(store).job.id == job.id
        clock.advance(11)
        store.jobs.expire()
        assert store.jobs.get("t", job.id).num_restarts == number
    assert leased(store).job.id == job.id
    clock.advance(11)
    assert store.jobs.expire() == [job.id]
    ended = store.jobs.get("t", job.id)
    assert (ended.state, ended.error_code, ended.num_restarts) == (JobState.FAILED, "INTERNAL", 5)
    assert "5 restarts" in ended.error_message
    assert phases(store, job.id) == ["queued", *["restart"] * 5, "end"]
    assert leased(store).job.id == healthy.id


def test_release_lane_takes_back_at_once(store: MetadataStore) -> None:
    job, other = submit(store), submit(store)
    old = leased(store, "lane")
    kept = leased(store, "other")
    assert store.jobs.release_lane("lane") == [job.id]
    assert store.jobs.release_lane("lane") == []
    assert store.jobs.get("t", job.id).state is JobState.QUEUED
    assert store.jobs.renew(other.id, kept.fence, 10.0) is False
    with pytest.raises(StaleLeaseError):
        store.jobs.renew(job.id, old.fence, 10.0)


def test_a_lane_that_asks_again_gets_its_job_with_a_new_fence(store: MetadataStore, failpoints: Failpoints) -> None:
    job = submit(store)
    submit(store)
    failpoints.arm("store.jobs.lease.after_commit")
    with pytest.raises(SimulatedKill):
        store.jobs.lease("lane", 10.0)
    lease = leased(store, "lane")
    assert (lease.job.id, lease.job.num_restarts) == (job.id, 1)
    assert [one.state for one in store.jobs.list("t")] == [JobState.QUEUED, JobState.RUNNING]


def test_whether_a_job_waits(store: MetadataStore) -> None:
    assert not store.jobs.has_queued()
    submit(store)
    assert store.jobs.has_queued()
    leased(store)
    assert not store.jobs.has_queued()
    store.jobs.release_lane("lane")
    assert store.jobs.has_queued()


def test_a_lane_needs_a_name(store: MetadataStore) -> None:
    assert code_of(lambda: store.jobs.lease("", 10.0)) is ErrorCode.INVALID_ARGUMENT


def test_a_stale_lease_stays_one_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(StaleLeaseError("gone")))
    assert isinstance(copy, StaleLeaseError)
    assert (copy.code, copy.message) == (ErrorCode.JOB_STATE, "gone")


# --- events -----------------------------------------------------------------------------------------------------------


def test_a_batch_of_events_sent_again_is_added_once(store: MetadataStore, failpoints: Failpoints) -> None:
    job = submit(store)
    lease = leased(store)
    failpoints.arm("store.jobs.append_events.after_commit")
    with pytest.raises(SimulatedKill):
        store.jobs.append_events(job.id, lease.fence, [Event("embed"), Event("fit")], batch=1)
    store.jobs.append_events(job.id, lease.fence, [Event("embed"), Event("fit")], batch=1)
    store.jobs.append_events(job.id, lease.fence, [Event("publish")], batch=2)
    store.jobs.append_events(job.id, lease.fence, [])
    assert phases(store, job.id) == ["queued", "embed", "fit", "publish"]
    store.jobs.release_lane("lane")
    again = leased(store)
    store.jobs.append_events(job.id, again.fence, [Event("embed")], batch=1)
    assert phases(store, job.id)[-2:] == ["restart", "embed"]


@pytest.mark.parametrize(
    "event",
    [
        Event("queued"),
        Event("restart"),
        Event("end"),
        Event(""),
        Event("Two Words"),
        Event("fit", 1.5),
        Event("fit", -0.1),
        Event("fit", float("nan")),
        Event("fit", time=float("inf")),
    ],
)
def test_events_that_no_worker_reports(store: MetadataStore, event: Event) -> None:
    job = submit(store)
    lease = leased(store)
    call = lambda: store.jobs.append_events(job.id, lease.fence, [Event("fit"), event])  # noqa: E731
    assert code_of(call) is ErrorCode.INVALID_ARGUMENT
    assert phases(store, job.id) == ["queued"]


def test_a_diverged_metric_is_kept(store: MetadataStore) -> None:
    job = submit(store)
    store.jobs.append_events(job.id, leased(store).fence, [Event("fit", metrics={"loss": float("inf")})])
    assert store.jobs.events("t", job.id)[-1].metrics == {"loss": float("inf")}


# --- tenants ----------------------------------------------------------------------------------------------------------


def test_another_tenants_job_and_model_look_like_none(store: MetadataStore) -> None:
    job = submit(store)
    store.jobs.succeed(job.id, leased(store).fence, MODEL)
    assert store.jobs.list("u") == []
    assert store.models.list("u") == []
    for call in (
        lambda one: store.jobs.get("u", one),
        lambda one: store.jobs.events("u", one),
        lambda one: store.jobs.request_cancel("u", one),
    ):
        messages = []
        for job_id in (job.id, "nobody"):
            with pytest.raises(WireError) as error:
                call(job_id)
            assert error.value.code is ErrorCode.NOT_FOUND
            messages.append(error.value.message.replace(job_id, "X"))
        assert messages[0] == messages[1]
    messages = []
    for reference in ("head", "head@1", "nobody"):
        with pytest.raises(WireError) as error:
            store.models.get("u", reference)
        assert error.value.code is ErrorCode.NOT_FOUND
        messages.append(error.value.message.replace(reference, "X"))
    assert len(set(messages)) == 1


def test_jobs_and_models_that_are_not_there(store: MetadataStore) -> None:
    for call in everything_a_holder_does(store, "nobody", 1):
        assert code_of(call) is ErrorCode.NOT_FOUND
    assert code_of(lambda: store.models.get("t", "a b")) is ErrorCode.INVALID_ARGUMENT


def test_fine_tuning_jobs_wait_for_whoever_does_them(store: MetadataStore) -> None:
    tuning = submit(store, spec=replace(SPEC, fine_tune=FineTuneConfig(cut="blocks.4", lora_rank=8)))
    assert store.jobs.has_queued(TUNING_JOB) and not store.jobs.has_queued()
    head = submit(store)
    assert leased(store).job.id == head.id
    assert store.jobs.lease("lane2", 10.0) is None
    lease = store.jobs.lease("tuning", 10.0, TUNING_JOB)
    assert lease is not None
    assert lease.job.id == tuning.id
    assert lease.job.spec.fine_tune == FineTuneConfig(cut="blocks.4", lora_rank=8)
    record = FineTuning(
        True, "kept", "blocks.4", "accuracy", 0.1, 0.05, 0.2, {"accuracy": 0.8}, {"accuracy": 0.9}, 7, 3
    )
    published = store.jobs.succeed(tuning.id, lease.fence, replace(MODEL, fine_tuning=record))
    assert store.models.get("t", published.reference).fine_tuning == record
