"""A process is killed, for real, at every failpoint of the store; what it left behind must be whole, and go on.

One helper process imports everything once and forks a child per failpoint. A child tells what was acknowledged to it
through a file, runs until ``os._exit`` ends it, and a second child goes on from there with the same keys.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline_wire.errors import ErrorCode
from trunkline_wire.heads import HeadConfig
from trunkline_wire.specs import FeatureSpace, local_space
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.bottlenecks import bottleneck_path
from trunkline_worker.store.chunks import chunk_path, read_rows, write_chunk
from trunkline_worker.store.clock import ManualClock
from trunkline_worker.store.database import Database
from trunkline_worker.store.failpoints import EXIT_STATUS, Failpoints
from trunkline_worker.store.metadata import MetadataStore
from trunkline_worker.store.records import Candidate, Event, JobSpec, JobState, ModelInput, ModelRecord

SPACE = FeatureSpace("net", "blocks.2", 96, "f" * 64)
NUM_ROWS = 6
ROW_IDS = [hashlib.sha256(bytes([number])).digest() for number in range(NUM_ROWS)]
LOCAL = local_space("sensor", "5" * 64)
LOCAL_IDS = [hashlib.sha256(bytes([5, number])).digest() for number in range(NUM_ROWS)]
BOTTLENECK = b"encoder and decoder"
BOTTLENECK_SHA256 = hashlib.sha256(BOTTLENECK).hexdigest()
FEATURES = np.arange(NUM_ROWS * 3, dtype=np.float32).reshape(NUM_ROWS, 3)
EMBEDDING_KEY = "e" * 64
TENANT, LANE = "t", "lane"
SUCCEED, FAIL, CANCEL_RUNNING, CANCEL_QUEUED, DIE_ONCE, LOSE_LANE_ONCE = range(6)
"""What happens to a job, by its seed."""

FINAL_STATES = {
    SUCCEED: JobState.SUCCEEDED,
    FAIL: JobState.FAILED,
    CANCEL_RUNNING: JobState.CANCELLED,
    CANCEL_QUEUED: JobState.CANCELLED,
    DIE_ONCE: JobState.SUCCEEDED,
    LOSE_LANE_ONCE: JobState.SUCCEEDED,
}
MODEL = ModelRecord(
    "",
    "",
    0,
    "classification",
    ("a", "b"),
    2,
    SPACE,
    "e" * 64,
    (),
    {},
    "digits@1",
    "d" * 64,
    "",
    {},
    "",
    0.0,
    codec="float32",
    candidates=(Candidate(("pooled",), 3, -0.5, 0.75),),
    more_inputs=(ModelInput(LOCAL, "", ("sensor",), 3, "float32"),),
    head=HeadConfig("mlp", (8,), fuse="add"),
)


class Work:
    """Everything the store does, from an upload to the last job's end. Run again, it goes on where it was."""

    def __init__(self, directory: Path, failpoints: Failpoints, incarnation: int) -> None:
        self.directory = directory
        self.clock = ManualClock(1_800_000_000.0 + 1000.0 * incarnation)
        self.blobs = BlobStore(f"file://{directory}/blobs", failpoints=failpoints)
        self.database = Database(f"sqlite:///{directory}/meta.db")
        self.store = MetadataStore(self.database, clock=self.clock, failpoints=failpoints)

    def acknowledge(self, kind: str, value: str) -> None:
        with open(self.directory / "acknowledged", "a") as file:
            file.write(json.dumps([kind, value]) + "\n")

    def run(self) -> None:
        rows, store = self.store.rows, self.store
        for start in range(0, NUM_ROWS, 3):
            ids = ROW_IDS[start : start + 3]
            if rows.missing(TENANT, ids):
                chunk = write_chunk(self.blobs, FEATURES[start : start + 3])
                assert rows.add_chunk(TENANT, chunk, SPACE, "float32", ids) == 3
                self.acknowledge("rows", chunk)
        if rows.missing(TENANT, LOCAL_IDS):
            rows.add_chunk(TENANT, write_chunk(self.blobs, -FEATURES), LOCAL, "float32", LOCAL_IDS)
        self.blobs.put(bottleneck_path(BOTTLENECK_SHA256), BOTTLENECK)
        store.bottlenecks.add(TENANT, BOTTLENECK_SHA256)
        self.acknowledge("bottleneck", BOTTLENECK_SHA256)
        data = store.datasets.commit(
            TENANT, "digits", SPACE, ROW_IDS, ["a", "b"], [0, 1] * 3, None, "data", [(LOCAL, LOCAL_IDS)]
        )
        self.acknowledge("dataset", data.reference)
        if store.embeddings.missing(TENANT, EMBEDDING_KEY, ROW_IDS):
            chunk = write_chunk(self.blobs, 2 * FEATURES)
            store.embeddings.add_chunk(TENANT, EMBEDDING_KEY, chunk, ROW_IDS)
        for seed in FINAL_STATES:
            spec = JobSpec(model=f"head{seed}", dataset="digits", backbone="net", input_size=96, seed=seed)
            job = store.jobs.submit(TENANT, spec, f"job{seed}")
            self.acknowledge("job", job.id)
            if seed == CANCEL_QUEUED:
                store.jobs.request_cancel(TENANT, job.id, "cancel")
                self.acknowledge("cancelled", job.id)
        store.jobs.release_lane(LANE)
        self.lane()

    def lane(self) -> None:
        jobs = self.store.jobs
        while (lease := jobs.lease(LANE, 10.0)) is not None:
            job, fence = lease.job, lease.fence
            jobs.append_events(job.id, fence, [Event("fit")], batch=1)
            jobs.renew(job.id, fence, 10.0)
            if job.spec.seed == FAIL:
                jobs.fail(job.id, fence, ErrorCode.WORKER_OOM, "too big")
                self.acknowledge("failed", job.id)
            elif job.spec.seed == CANCEL_RUNNING:
                jobs.request_cancel(TENANT, job.id, f"cancel {job.id}")
                jobs.mark_cancelled(job.id, fence)
            elif job.spec.seed == DIE_ONCE and not job.num_restarts:
                self.clock.advance(11)
                assert jobs.expire() == [job.id]
            elif job.spec.seed == LOSE_LANE_ONCE and not job.num_restarts:
                assert jobs.release_lane(LANE) == [job.id]
            else:
                head = f"head of {job.spec.seed}".encode()
                sha256 = hashlib.sha256(head).hexdigest()
                self.blobs.put(f"heads/{sha256}", head)
                model = jobs.succeed(job.id, fence, ModelRecord(**{**vars(MODEL), "head_sha256": sha256}))
                self.acknowledge("model", model.reference)

    def acknowledged(self) -> list[tuple[str, str]]:
        path = self.directory / "acknowledged"
        return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    def check_whole(self) -> None:
        """What must hold at any moment: what is named is there, and what was acknowledged is not lost."""
        store = self.store
        present = [one for index, one in enumerate(ROW_IDS) if index not in store.rows.missing(TENANT, ROW_IDS)]
        if present:
            rows = read_rows(self.blobs, store.rows.locate(TENANT, present))
            assert np.array_equal(rows, FEATURES[[ROW_IDS.index(one) for one in present]])
        for record in store.datasets.list(TENANT):
            content = store.datasets.rows(TENANT, record.reference)
            store.rows.locate(TENANT, content.row_ids)
            assert record.codec == "float32"
            (local_ids,) = content.more_row_ids
            assert np.array_equal(read_rows(self.blobs, store.rows.locate(TENANT, local_ids)), -FEATURES)
        if len(store.embeddings.missing(TENANT, EMBEDDING_KEY, ROW_IDS)) < NUM_ROWS:
            where = store.embeddings.locate(TENANT, EMBEDDING_KEY, ROW_IDS)
            assert np.array_equal(read_rows(self.blobs, where), 2 * FEATURES)
        for model in store.models.list(TENANT):
            self.blobs.get_checked(f"heads/{model.head_sha256}", model.head_sha256)
            assert store.jobs.get(TENANT, model.job_id).model == model.reference
            whole = store.models.get(TENANT, model.reference)
            for name in ("codec", "candidates", "more_inputs", "head"):
                assert getattr(whole, name) == getattr(MODEL, name)
        for job in store.jobs.list(TENANT):
            events = store.jobs.events(TENANT, job.id)
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            assert [event.phase for event in events].count("end") == job.state.has_ended
            assert bool(job.model) == (job.state is JobState.SUCCEEDED)
        for kind, value in self.acknowledged():
            if kind == "rows":
                assert self.blobs.exists(chunk_path(value))
            elif kind == "bottleneck":
                store.bottlenecks.check(TENANT, value)
                self.blobs.get_checked(bottleneck_path(value), value)
            elif kind == "dataset":
                store.datasets.get(TENANT, value)
            elif kind == "model":
                store.models.get(TENANT, value)
            else:
                state = store.jobs.get(TENANT, value).state
                expected = {"failed": JobState.FAILED, "cancelled": JobState.CANCELLED}.get(kind, state)
                assert state is expected

    def check_finished(self) -> None:
        """What must hold once all has run, however often it was killed."""
        self.check_whole()
        store = self.store
        assert store.rows.missing(TENANT, ROW_IDS) == []
        assert [record.reference for record in store.datasets.list(TENANT)] == ["digits@1"]
        states = {job.spec.seed: job.state for job in store.jobs.list(TENANT)}
        assert states == FINAL_STATES
        assert len(store.jobs.list(TENANT)) == len(FINAL_STATES)
        succeeded = sorted(seed for seed, state in FINAL_STATES.items() if state is JobState.SUCCEEDED)
        assert [model.reference for model in store.models.list(TENANT)] == [f"head{seed}@1" for seed in succeeded]


def every_failpoint(directory: Path) -> list[str]:
    """Return the names that one undisturbed run passes, in order."""
    failpoints = Failpoints()
    seen = failpoints.record()
    work = Work(directory, failpoints, 0)
    work.run()
    work.check_finished()
    work.database.close()
    return list(dict.fromkeys(seen))


def in_a_child(action: Any) -> int:
    """Run ``action`` in a forked child and return its exit status."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_and_go_on(directory: Path, name: str, skip: int) -> None:
    """Kill at the failpoint, look at what is left, and go on to the end."""
    directory.mkdir()
    status = in_a_child(lambda: Work(directory, Failpoints.from_text(f"{name}=exit:{skip}"), 0).run())
    if status == 0 and skip:
        return  # it is not passed that often
    assert status == EXIT_STATUS, f"{name}: exit status {status}"

    def go_on() -> None:
        work = Work(directory, Failpoints(), 1)
        work.check_whole()
        work.run()
        work.check_finished()

    assert in_a_child(go_on) == 0, name


def main(directory: Path) -> None:
    """What the helper process does."""
    (directory / "undisturbed").mkdir()
    names: list[str] = []
    # In a child as well: a process that has had a database open must not fork.
    report = directory / "names.json"
    status = in_a_child(lambda: report.write_text(json.dumps(every_failpoint(directory / "undisturbed"))))
    assert status == 0
    names = json.loads(report.read_text())
    for name in names:
        for skip in (0, 2):
            kill_and_go_on(directory / f"{name}.{skip}", name, skip)
    print(json.dumps(names))


def test_death_at_every_failpoint_leaves_a_store_that_goes_on(tmp_path: Path) -> None:
    # In memory where there is such a place: a killed process loses nothing that the system already has.
    shared_memory = Path("/dev/shm")
    place = shared_memory if os.access(shared_memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as directory:
        done = subprocess.run(
            [sys.executable, __file__, directory], capture_output=True, text=True, check=False, timeout=240
        )
    assert done.returncode == 0, done.stderr
    names = set(json.loads(done.stdout))
    mutations = {
        "rows.add_chunk",
        "embeddings.add_chunk",
        "bottlenecks.add",
        "datasets.commit",
        "jobs.submit",
        "jobs.request_cancel",
        "jobs.lease",
        "jobs.renew",
        "jobs.append_events",
        "jobs.succeed",
        "jobs.fail",
        "jobs.mark_cancelled",
        "jobs.expire",
        "jobs.release_lane",
    }
    expected = {f"store.{one}.{side}_commit" for one in mutations for side in ("before", "after")}
    expected |= {f"store.blob.{one}" for one in ("before_write", "written", "synced", "renamed", "durable")}
    assert names == expected


def test_it_finds_an_index_that_is_written_before_its_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above, shown the wrong order of writes."""
    work = Work(tmp_path, Failpoints(), 0)
    work.store.rows.add_chunk(TENANT, "a" * 64, SPACE, "float32", ROW_IDS[:3])
    with pytest.raises(Exception, match="holds nothing"):
        work.check_whole()
    work.database.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
