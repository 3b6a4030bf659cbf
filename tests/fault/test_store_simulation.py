"""Random histories of the metadata store, each from a seed, compared step by step with a small model of it.

Clients commit datasets of one or several inputs, submit and cancel; lanes lease and work, workers die, pause and wake
up late, replies are lost and calls retried, the controller is killed before and after commits and starts again on the
same database. A failing history names its seed:
``TRUNKLINE_SIMULATION_SEED=N pytest tests/fault/test_store_simulation.py -k replay`` plays it again.
"""

import hashlib
import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import FeatureSpace, local_space
from trunkline_worker.store import datasets, idempotency, leases, schema, serial
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.database import Database
from trunkline_worker.store.failpoints import Failpoints, SimulatedKill
from trunkline_worker.store.jobs import Jobs
from trunkline_worker.store.metadata import MetadataStore
from trunkline_worker.store.models import Models
from trunkline_worker.store.records import Event, JobSpec, JobState, ModelRecord

SPACE = FeatureSpace("net", "blocks.2", 96, "f" * 64)
ROWS = [hashlib.sha256(bytes([number])).digest() for number in range(2)]
SECOND, LOCAL = FeatureSpace("second", "mid", 32, "2" * 64), local_space("sensor", "5" * 64)
CODECS = {SECOND: "int8", LOCAL: "float32"}
MORE_ROWS = {
    space: [hashlib.sha256(f"{space.source} {number}".encode()).digest() for number in range(2)] for space in CODECS
}
NO_ROW = hashlib.sha256(b"never uploaded").digest()
TENANTS = ("t", "u")
NAMES = ("head", "other")
LANES = ("lane1", "lane2", "lane3")
LEASE_S = 10.0
MAX_RESTARTS = 2
NUM_HISTORIES = 200
NUM_STEPS = 40
MODEL = ModelRecord(
    "", "", 0, "classification", ("a", "b"), 2, SPACE, "e" * 64, (), {}, "digits@1", "d" * 64, "", {}, "", 0.0
)


@dataclass
class JobModel:
    """What must be true of one job."""

    id: str
    tenant: str
    name: str
    dataset: str
    state: JobState = JobState.QUEUED
    fence: int = 0
    lane: str = ""
    deadline: float = 0.0
    cancel: bool = False
    restarts: int = 0
    model: str = ""
    head: str = ""
    batch: int = 0
    phases: list[str] = field(default_factory=lambda: ["queued"])

    def end(self, state: JobState) -> None:
        self.state, self.lane = state, ""
        self.phases.append("end")

    def take_back(self) -> None:
        self.fence += 1
        self.lane = ""
        if self.cancel:
            self.end(JobState.CANCELLED)
        elif self.restarts >= MAX_RESTARTS:
            self.end(JobState.FAILED)
        else:
            self.state = JobState.QUEUED
            self.restarts += 1
            self.phases.append("restart")


@dataclass(frozen=True)
class Commit:
    """What a client wants to be the next version of the dataset ``mixed``."""

    labels: tuple[int, ...]
    more_inputs: tuple[tuple[FeatureSpace, tuple[bytes, ...]], ...]

    @property
    def can_work(self) -> bool:
        return not any(NO_ROW in ids for _, ids in self.more_inputs)


@dataclass
class Held:
    """A lease as a worker knows it, whether or not it is still good."""

    job: JobModel
    fence: int
    batch: int = 0


class Refused(Exception):
    """What the model expects where the store must refuse."""

    def __init__(self, code: ErrorCode) -> None:
        super().__init__(code)
        self.code = code


class History:
    """One history: the store, the model beside it, and the workers."""

    def __init__(self, seed: int, url: str = "sqlite://", database: Database | None = None) -> None:
        self.random = random.Random(seed)
        self.url = url
        self.clock = ManualClock()
        self.failpoints = Failpoints()
        self.ids = (f"job{number}" for number in itertools.count(1))
        self.keys = (f"key{number}" for number in itertools.count(1))
        self.database = database or Database(url)
        self.store = self.open()
        with self.database.write() as connection:
            for table in reversed(schema.metadata.sorted_tables):
                if table is not schema.store_info:
                    connection.execute(table.delete())
        for tenant in TENANTS:
            self.store.rows.add_chunk(tenant, "a" * 64, SPACE, "float16", ROWS)
            self.store.datasets.commit(tenant, "digits", SPACE, ROWS, ["a", "b"], [0, 1], None, "dataset")
            for space, codec in CODECS.items():
                self.store.rows.add_chunk(tenant, "b" * 64, space, codec, MORE_ROWS[space])
        self.versions: dict[str, list[Commit]] = {tenant: [] for tenant in TENANTS}
        self.commits: list[tuple[str, str, Commit, str]] = []
        self.jobs: list[JobModel] = []
        self.holding: dict[str, Held] = {}
        self.ghosts: list[Held] = []
        self.lease_fences: dict[str, list[int]] = {}
        self.ends: dict[str, JobState] = {}
        self.counts: Counter[str] = Counter()

    def open(self) -> MetadataStore:
        return MetadataStore(
            self.database,
            clock=self.clock,
            new_id=lambda: next(self.ids),
            failpoints=self.failpoints,
            max_restarts=MAX_RESTARTS,
        )

    def restart(self) -> None:
        """The controller dies and comes back: all that is left is the database."""
        self.counts["restart"] += 1
        if self.url != "sqlite://":
            self.database.close()
            self.database = Database(self.url)
        self.store = self.open()

    def call(
        self, name: str, act: Callable[[], Any], expect: Callable[[], Any], *, retry: bool = False, area: str = "jobs"
    ) -> Any:
        """Call the store, perhaps killing it at a failpoint, and compare with the model.

        Returns what the store answered, or None where it refused as expected or the reply was lost.
        """
        self.counts[name] += 1
        point = self.random.choice(["before_commit", "after_commit"]) if self.random.random() < 0.15 else ""
        if point:
            self.failpoints.arm(f"store.{area}.{name}.{point}")
        try:
            answer: Any = act()
        except SimulatedKill:
            self.counts[f"killed {point}"] += 1
            if point == "after_commit":
                self.expected(expect)
            self.restart()
            return self.call(name, act, expect, retry=True, area=area) if retry else None
        except WireError as error:
            answer = error
        finally:
            self.failpoints.disarm()
        expected = self.expected(expect)
        if isinstance(answer, WireError):
            assert isinstance(expected, Refused), f"{name} was refused with {answer}; expected {expected}"
            assert answer.code is expected.code, (name, answer, expected)
            self.counts["refused"] += 1
            return None
        assert not isinstance(expected, Refused), f"{name} gave {answer}; expected to be refused with {expected.code}"
        assert expected is None or answer == expected, f"{name} gave {answer}; expected {expected}"
        return answer

    @staticmethod
    def expected(expect: Callable[[], Any]) -> Any:
        try:
            return expect()
        except Refused as refused:
            return refused

    # What happens. Each step calls the store and says what the model expects.

    def commit(self) -> None:
        tenant, key = self.random.choice(TENANTS), next(self.keys)
        more = []
        for space in self.random.sample(list(CODECS), self.random.randint(0, 2)):
            ids = self.random.sample(MORE_ROWS[space], 2)
            if self.random.random() < 0.1:
                ids[0] = NO_ROW
            more.append((space, tuple(ids)))
        content = Commit(tuple(self.random.sample([0, 1], 2)), tuple(more))
        versions = self.versions[tenant]

        def expect() -> str:
            if not content.can_work:
                raise Refused(ErrorCode.NOT_FOUND)
            if versions[-1:] != [content]:
                versions.append(content)
            return f"mixed@{len(versions)}"

        act = lambda: self.committed(tenant, key, content)  # noqa: E731
        reference = self.call("commit", act, expect, retry=True, area="datasets")
        if reference is not None:
            self.commits.append((tenant, key, content, reference))

    def commit_again(self) -> None:
        """A client that did not hear the answer asks once more, perhaps long after."""
        if self.commits:
            tenant, key, content, reference = self.random.choice(self.commits)
            act = lambda: self.committed(tenant, key, content)  # noqa: E731
            self.call("commit", act, lambda: reference, retry=True, area="datasets")

    def committed(self, tenant: str, key: str, content: Commit) -> str:
        return self.store.datasets.commit(
            tenant, "mixed", SPACE, ROWS, ["a", "b"], content.labels, None, key, content.more_inputs
        ).reference

    def submit(self) -> None:
        tenant, name, key = self.random.choice(TENANTS), self.random.choice(NAMES), next(self.keys)
        num_versions = len(self.versions[tenant])
        dataset = self.random.choice([f"mixed@{num_versions}", "digits@1"] if num_versions else ["digits@1"])
        spec = JobSpec(model=name, dataset=dataset.partition("@")[0], backbone="net", input_size=96)
        job = self.call("submit", lambda: self.store.jobs.submit(tenant, spec, key), lambda: None, retry=True)
        self.jobs.append(JobModel(job.id, tenant, name, dataset))
        if self.random.random() < 0.3:  # the client did not hear it, and asks again
            again = self.store.jobs.submit(tenant, spec, key)
            assert again == job, "a retry of submit gave another answer"

    def cancel(self) -> None:
        if not self.jobs:
            return
        job = self.random.choice(self.jobs[-4:])
        key, done = next(self.keys), []

        def expect() -> None:
            if done:
                return
            if job.state.has_ended:
                raise Refused(ErrorCode.JOB_STATE)
            done.append(True)
            job.cancel = True
            if job.state is JobState.QUEUED:
                job.end(JobState.CANCELLED)

        record = self.call(
            "request_cancel", lambda: self.store.jobs.request_cancel(job.tenant, job.id, key), expect, retry=True
        )
        assert record is None or (record.state is job.state and record.cancel_requested)

    def other_tenant(self) -> None:
        if not self.jobs:
            return
        job = self.random.choice(self.jobs)
        with pytest.raises(WireError) as error:
            self.store.jobs.request_cancel("nobody", job.id)
        assert error.value.code is ErrorCode.NOT_FOUND

    def lease(self) -> None:
        lane = self.random.choice(LANES)
        given: list[JobModel] = []

        def expect() -> None:
            given.clear()
            for job in self.jobs:
                if job.state is JobState.RUNNING and job.lane == lane:
                    job.take_back()
            for job in self.jobs:
                if job.state is JobState.QUEUED:
                    job.state, job.lane, job.batch = JobState.RUNNING, lane, 0
                    job.fence += 1
                    job.deadline = self.clock.now() + LEASE_S
                    given.append(job)
                    return

        if lane in self.holding:  # the worker was replaced; the old one may still be somewhere
            self.ghosts.append(self.holding.pop(lane))
        lease = self.call("lease", lambda: self.store.jobs.lease(lane, LEASE_S), expect)
        if lease is None:
            return
        assert [lease.job.id, lease.fence, lease.deadline] == [given[0].id, given[0].fence, given[0].deadline]
        fences = self.lease_fences.setdefault(lease.job.id, [])
        assert not fences or lease.fence > fences[-1], f"fences of {lease.job.id} do not grow: {fences}, {lease.fence}"
        fences.append(lease.fence)
        self.holding[lane] = Held(given[0], lease.fence)

    def work(self) -> None:
        """Somebody with a lease, good or not, does what workers do."""
        candidates = [*self.holding.values(), *self.ghosts]
        if not candidates:
            return
        held = self.random.choice(candidates)
        self.random.choice([self.renew, self.append, self.append, self.succeed, self.succeed, self.fail, self.stop])(
            held
        )

    def check(self, held: Held) -> JobModel:
        if held.job.state is not JobState.RUNNING or held.job.fence != held.fence:
            raise Refused(ErrorCode.JOB_STATE)
        return held.job

    def renew(self, held: Held) -> None:
        def expect() -> bool:
            job = self.check(held)
            job.deadline = self.clock.now() + LEASE_S
            return job.cancel

        self.call("renew", lambda: self.store.jobs.renew(held.job.id, held.fence, LEASE_S), expect)

    def append(self, held: Held) -> None:
        phases = self.random.choices(["embed", "select", "fit"], k=self.random.randint(1, 3))
        held.batch += 1
        batch = held.batch

        def expect() -> None:
            job = self.check(held)
            if batch > job.batch:
                job.batch = batch
                job.phases += phases

        events = [Event(phase) for phase in phases]
        act = lambda: self.store.jobs.append_events(held.job.id, held.fence, events, batch)  # noqa: E731
        self.call("append_events", act, expect, retry=True)

    def succeed(self, held: Held) -> None:
        head = hashlib.sha256(f"{held.job.id} {held.fence}".encode()).hexdigest()

        def expect() -> str:
            job = held.job
            if job.state is JobState.SUCCEEDED and (job.fence, job.head) == (held.fence, head):
                return job.model
            self.check(held)
            if job.cancel:
                job.end(JobState.CANCELLED)
                raise Refused(ErrorCode.JOB_STATE)
            earlier = sum((one.tenant, one.name) == (job.tenant, job.name) and bool(one.model) for one in self.jobs)
            job.model, job.head = f"{job.name}@{earlier + 1}", head
            job.end(JobState.SUCCEEDED)
            return job.model

        def act() -> str:
            return self.store.jobs.succeed(held.job.id, held.fence, replace(MODEL, head_sha256=head)).reference

        self.call("succeed", act, expect, retry=True)

    def fail(self, held: Held) -> None:
        def expect() -> None:
            if held.job.state is JobState.FAILED and held.job.fence == held.fence:
                return
            self.check(held).end(JobState.FAILED)

        act = lambda: self.store.jobs.fail(held.job.id, held.fence, ErrorCode.WORKER_OOM, "too big")  # noqa: E731
        self.call("fail", act, expect, retry=True)

    def stop(self, held: Held) -> None:
        def expect() -> None:
            if held.job.state is JobState.CANCELLED and held.job.fence == held.fence:
                return
            if not self.check(held).cancel:
                raise Refused(ErrorCode.JOB_STATE)
            held.job.end(JobState.CANCELLED)

        self.call("mark_cancelled", lambda: self.store.jobs.mark_cancelled(held.job.id, held.fence), expect, retry=True)

    def pause(self) -> None:
        """A worker stops answering; it may wake up later, and thinks that it holds its job."""
        if self.holding:
            lane = self.random.choice(sorted(self.holding))
            self.ghosts.append(self.holding.pop(lane))

    def crash(self) -> None:
        if self.holding:
            del self.holding[self.random.choice(sorted(self.holding))]

    def wait(self) -> None:
        self.clock.advance(self.random.choice([0.5, 3.0, 11.0]))

    def set_clock(self) -> None:
        self.clock.set_wall(self.clock.now() + self.random.choice([-30.0, 30.0]))

    def expire(self) -> None:
        def expect() -> list[str]:
            late = [one for one in self.jobs if one.state is JobState.RUNNING and one.deadline < self.clock.now()]
            for job in late:
                job.take_back()
            return [job.id for job in late]

        self.call("expire", lambda: self.store.jobs.expire(), expect)

    def release_lane(self) -> None:
        lane = self.random.choice(LANES)

        def expect() -> list[str]:
            held = [one for one in self.jobs if one.state is JobState.RUNNING and one.lane == lane]
            for job in held:
                job.take_back()
            return [job.id for job in held]

        self.call("release_lane", lambda: self.store.jobs.release_lane(lane), expect)

    # What must hold at any moment.

    def verify(self) -> None:
        with self.database.read() as connection:
            rows = connection.execute(sa.select(schema.jobs.c.id, schema.jobs.c.fence)).all()
            assert {row.id: row.fence for row in rows} == {job.id: job.fence for job in self.jobs}
            events: dict[str, list[tuple[int, str]]] = {job.id: [] for job in self.jobs}
            table = schema.job_events
            for row in connection.execute(sa.select(table.c.job_id, table.c.seq, table.c.phase).order_by(table.c.seq)):
                events[row.job_id].append((row.seq, row.phase))
        for tenant in TENANTS:
            mine = [job for job in self.jobs if job.tenant == tenant]
            records = {record.id: record for record in self.store.jobs.list(tenant)}
            assert records.keys() == {job.id for job in mine}, "a job was lost, or came from nowhere"
            for job in mine:
                record = records[job.id]
                found = (record.state, record.num_restarts, record.cancel_requested, record.model, record.spec.model)
                assert found == (job.state, job.restarts, job.cancel, job.model, job.name), job
                assert record.spec.dataset == job.dataset
                if job.id in self.ends:
                    assert record.state is self.ends[job.id], "a job ended twice"
                elif record.state.has_ended:
                    self.ends[job.id] = record.state
                assert events[job.id] == list(enumerate(job.phases, start=1)), "events are wrong or have gaps"
                assert job.phases.count("end") == record.state.has_ended
                assert job.phases.count("restart") == record.num_restarts
            models = self.store.models.list(tenant)
            assert {one.job_id: one.reference for one in models} == {one.id: one.model for one in mine if one.model}
            assert len({one.job_id for one in models}) == len(models), "two models of one job"
            for name in NAMES:
                versions = [one.version for one in models if one.name == name]
                assert versions == list(range(1, len(versions) + 1)), "versions have gaps"
            self.verify_datasets(tenant)

    def verify_datasets(self, tenant: str) -> None:
        references = [one.reference for one in self.store.datasets.list(tenant)]
        expected = self.versions[tenant]
        assert references == ["digits@1", *(f"mixed@{number}" for number in range(1, len(expected) + 1))]
        for reference, commit in zip(references[1:], expected, strict=True):
            content = self.store.datasets.rows(tenant, reference)
            assert content.row_ids == ROWS
            assert tuple(content.class_indices.tolist()) == commit.labels
            more = zip(content.record.more_inputs, content.more_row_ids, strict=True)
            found = tuple((source.space, tuple(ids)) for source, ids in more)
            assert found == commit.more_inputs, f"{reference} has other inputs than it was committed with"
            assert [one.codec for one in content.record.more_inputs] == [CODECS[space] for space, _ in found]

    def run(self, num_steps: int = NUM_STEPS) -> Counter[str]:
        steps: dict[Callable[[], None], int] = {
            self.commit: 3,
            self.commit_again: 1,
            self.submit: 6,
            self.lease: 8,
            self.work: 18,
            self.cancel: 2,
            self.wait: 5,
            self.expire: 4,
            self.pause: 2,
            self.crash: 1,
            self.release_lane: 1,
            self.restart: 1,
            self.set_clock: 1,
            self.other_tenant: 1,
        }
        choices = self.random.choices(list(steps), list(steps.values()), k=num_steps)
        for number, step in enumerate(choices):
            step()
            if number % 15 == 14:
                self.verify()
        self.verify()
        return self.counts


def play(
    seed: int, url: str = "sqlite://", num_steps: int = NUM_STEPS, database: Database | None = None
) -> Counter[str]:
    history = History(seed, url, database)
    try:
        return history.run(num_steps)
    except Exception as error:
        raise AssertionError(
            f"seed {seed} fails: {error}. Again: TRUNKLINE_SIMULATION_SEED={seed} pytest {__file__} -k replay"
        ) from error
    finally:
        if database is None:
            history.database.close()


@pytest.fixture
def memory() -> Iterator[Database]:
    """One database for many histories, emptied before each: making tables would take longer than the history."""
    database = Database("sqlite://")
    yield database
    database.close()


def test_histories_in_memory(memory: Database) -> None:
    counts: Counter[str] = Counter()
    for seed in range(NUM_HISTORIES):
        counts += play(seed, database=memory)
    # A simulation that never gets anywhere would pass too.
    for name in (
        "commit",
        "submit",
        "lease",
        "renew",
        "append_events",
        "succeed",
        "fail",
        "mark_cancelled",
        "request_cancel",
    ):
        assert counts[name] > NUM_HISTORIES // 4, (name, counts)
    for name in ("killed before_commit", "killed after_commit", "restart", "refused", "release_lane", "expire"):
        assert counts[name] > NUM_HISTORIES // 4, (name, counts)


def test_histories_on_a_file_that_is_opened_again(tmp_path: Path) -> None:
    for seed in range(1000, 1006):
        play(seed, f"sqlite:///{tmp_path}/{seed}.db", num_steps=60)


def test_a_history_is_the_same_each_time(memory: Database) -> None:
    first = History(7, database=memory)
    counts = first.run()
    second = History(7, database=memory)
    assert second.run() == counts
    assert first.jobs == second.jobs


@pytest.mark.skipif("TRUNKLINE_SIMULATION_SEED" not in os.environ, reason="no seed to replay")
def test_replay() -> None:
    play(int(os.environ["TRUNKLINE_SIMULATION_SEED"]))


# --- the simulation finds what is planted -----------------------------------------------------------------------------


def check_state_only(row: leases.JobRow, _fence: int) -> None:
    if row.state != JobState.RUNNING.value:
        raise leases.StaleLeaseError("not running")


def check_fence_only(row: leases.JobRow, fence: int) -> None:
    if row.fence != fence:
        raise leases.StaleLeaseError("another fence")


def take_back_and_keep_the_fence(connection: sa.Connection, row: leases.JobRow, **values: Any) -> None:
    TAKE_BACK(connection, row, **values)
    leases.update(connection, row, fence=row.fence)


def take_back_without_end(connection: sa.Connection, row: leases.JobRow, **values: Any) -> None:
    TAKE_BACK(connection, row, **{**values, "max_restarts": 1000})


def publish_whatever(jobs: Jobs, connection: sa.Connection, row: Any, fence: int, model: Any, now: float) -> Any:
    if row.cancel_requested:
        published = jobs._models.publish(connection, model, tenant=row.tenant, name="head", job_id=row.id, now=now)
        leases.end(connection, row, JobState.SUCCEEDED, now=now, model=published.reference)
        return published
    return PUBLISH(jobs, connection, row, fence, model, now)


def skip_a_version(models: Models, connection: sa.Connection, model: Any, **values: Any) -> Any:
    published = ADD_VERSION(models, connection, model, **values)
    table = schema.models
    connection.execute(table.update().where(table.c.job_id == values["job_id"]).values(version=published.version + 1))
    return published


def digest_of_the_first_input(row_ids: Any, names: Any, indices: Any, targets: Any, _more: Any, **rest: Any) -> str:
    return DIGEST(row_ids, names, indices, targets, **rest)


def forget_the_last_input(sources: Any) -> str:
    return SOURCES(sources[:-1])


TAKE_BACK, PUBLISH, ADD_VERSION = leases.take_back, Jobs._publish, Models.publish
DIGEST, SOURCES = datasets.dataset_digest, serial.sources_to_text


@pytest.mark.parametrize(
    ("target", "name", "bug"),
    [
        (leases, "check_fence", check_state_only),
        (leases, "check_fence", check_fence_only),
        (leases, "check_fence", lambda *_: None),
        (leases, "take_back", take_back_and_keep_the_fence),
        (leases, "take_back", take_back_without_end),
        (idempotency, "remember", lambda *_, **__: None),
        (Jobs, "_publish", publish_whatever),
        (Jobs, "_release", lambda *_: []),
        (Models, "publish", skip_a_version),
        (datasets, "dataset_digest", digest_of_the_first_input),
        (serial, "sources_to_text", forget_the_last_input),
    ],
)
def test_a_planted_bug_is_found(
    monkeypatch: pytest.MonkeyPatch, memory: Database, target: object, name: str, bug: Callable[..., Any]
) -> None:
    monkeypatch.setattr(target, name, bug)
    with pytest.raises(AssertionError, match=r"seed \d+ fails"):
        for seed in range(40):
            play(seed, database=memory)
