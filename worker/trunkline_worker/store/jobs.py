"""The queue of training jobs, and the leases by which lanes work on them.

Times come from the clock passed in, seconds since the epoch. A clock that is set forward lets leases end early: a job
is then done twice, and the fence sees to it that only one result counts.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from dataclasses import replace

import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.names import check_backbone_name, check_name

from trunkline_worker.store import idempotency, leases, schema, serial
from trunkline_worker.store.context import StoreContext
from trunkline_worker.store.datasets import Datasets
from trunkline_worker.store.leases import StaleLeaseError
from trunkline_worker.store.models import Models
from trunkline_worker.store.records import HEAD_JOB, Event, JobRecord, JobSpec, JobState, Lease, ModelRecord

__all__ = ["Jobs", "MAX_RESTARTS", "StaleLeaseError"]

MAX_RESTARTS = 5
"""How often a job is taken back from a dead worker before it counts as the one that kills them."""

_SUBMIT = "jobs.submit"
_CANCEL = "jobs.request_cancel"
_table = schema.jobs


class Jobs:
    """Training jobs by tenant and id."""

    def __init__(
        self, context: StoreContext, datasets: Datasets, models: Models, *, max_restarts: int = MAX_RESTARTS
    ) -> None:
        """Use the context of the whole store, its datasets and its models."""
        self._context = context
        self._datasets = datasets
        self._models = models
        self._max_restarts = max_restarts

    # What users ask for.

    def submit(self, tenant: str, spec: JobSpec, idempotency_key: str) -> JobRecord:
        """Queue a job. Its dataset becomes the version that the reference means now.

        Raises:
            WireError: INVALID_ARGUMENT (names, key), NOT_FOUND for the dataset, BAD_LABELS where it holds one class
                only, where a row may be of several and none is of any, or where all rows of a class are in one group
                and groups are held out; ALREADY_EXISTS where the key was used for another job.
        """
        check_name(spec.model, "model")
        for backbone in (spec.backbone, *(one.backbone for one in spec.more_backbones)):
            if backbone:
                check_backbone_name(backbone)
        content = idempotency.content_sha256(serial.spec_to_text(spec))
        now = self._context.clock.now()
        with self._context.mutation("jobs.submit") as connection:
            earlier = idempotency.recall(connection, tenant, _SUBMIT, idempotency_key, content)
            if earlier is not None:
                return leases.record(leases.find(connection, tenant, earlier))
            dataset = self._datasets.find(connection, tenant, spec.dataset)
            self._datasets.check_trainable(connection, dataset, hold_out=spec.validation_fraction > 0)
            job_id = self._context.new_id()
            last_number = connection.execute(sa.select(sa.func.max(_table.c.number))).scalar()
            connection.execute(
                _table.insert().values(
                    tenant=tenant,
                    id=job_id,
                    number=(last_number or 0) + 1,
                    state=JobState.QUEUED.value,
                    spec=serial.spec_to_text(replace(spec, dataset=dataset.reference)),
                    create_time=now,
                    start_time=0.0,
                    end_time=0.0,
                    num_restarts=0,
                    cancel_requested=False,
                    error_code="",
                    error_message="",
                    model="",
                    fence=0,
                    lane="",
                    lease_deadline=0.0,
                    event_batch=0,
                    last_seq=0,
                    kind=spec.kind,
                )
            )
            row = leases.find(connection, tenant, job_id)
            leases.add_events(connection, row, [Event("queued", time=now)], now)
            idempotency.remember(connection, tenant, _SUBMIT, idempotency_key, content, result=job_id, now=now)
        return leases.record(row)

    def get(self, tenant: str, job_id: str) -> JobRecord:
        """Return a job as it stands.

        Raises:
            WireError: NOT_FOUND.
        """
        with self._context.database.read() as connection:
            return leases.record(leases.find(connection, tenant, job_id))

    def list(self, tenant: str) -> list[JobRecord]:
        """Return every job, the newest first."""
        query = sa.select(_table).where(_table.c.tenant == tenant).order_by(_table.c.number.desc())
        with self._context.database.read() as connection:
            return [leases.record(row) for row in connection.execute(query)]

    def events(self, tenant: str, job_id: str, after_seq: int = 0, limit: int = 1000) -> builtins.list[Event]:
        """Return events after ``after_seq``, oldest first.

        Raises:
            WireError: NOT_FOUND.
        """
        with self._context.database.read() as connection:
            return leases.read_events(connection, leases.find(connection, tenant, job_id), after_seq, limit)

    def request_cancel(self, tenant: str, job_id: str, idempotency_key: str = "") -> JobRecord:
        """Ask for a job's end. A queued job ends at once; a running one when its worker next renews.

        Once this has returned, the job publishes no model: ``succeed`` is refused.

        Args:
            tenant: Whose job it is.
            job_id: The job.
            idempotency_key: With one, a retry after a lost reply gets the job as it stands now. Without, it finds a job
                that has ended.

        Raises:
            WireError: NOT_FOUND; JOB_STATE for a job that has ended.
        """
        now = self._context.clock.now()
        with self._context.mutation("jobs.request_cancel") as connection:
            row = leases.find(connection, tenant, job_id)
            content = idempotency.content_sha256(job_id)
            if idempotency_key and idempotency.recall(connection, tenant, _CANCEL, idempotency_key, content):
                return leases.record(row)
            state = JobState(row.state)
            if state.has_ended:
                raise WireError(ErrorCode.JOB_STATE, f"job {job_id} has ended: {state.name}")
            leases.update(connection, row, cancel_requested=True)
            if state is JobState.QUEUED:
                leases.end(connection, row, JobState.CANCELLED, now=now)
            if idempotency_key:
                idempotency.remember(connection, tenant, _CANCEL, idempotency_key, content, result=job_id, now=now)
            row = leases.find(connection, tenant, job_id)
        return leases.record(row)

    # What lanes do.

    def lease(self, lane: str, lease_s: float, kind: str = HEAD_JOB) -> Lease | None:
        """Give a lane the oldest queued job of a kind, for ``lease_s`` seconds; None if there is none.

        A lane works on one job at a time. One that asks while it still holds a job has died since, or never got the
        reply: that job is taken back first.

        Raises:
            WireError: INVALID_ARGUMENT for a lane without a name.
        """
        if not lane:
            raise WireError(ErrorCode.INVALID_ARGUMENT, "a lane needs a name")
        now = self._context.clock.now()
        with self._context.mutation("jobs.lease") as connection:
            self._release(connection, lane, now)
            query = sa.select(_table).where(_table.c.state == JobState.QUEUED.value, _table.c.kind == kind)
            query = query.order_by(_table.c.number).limit(1)
            row = connection.execute(query).one_or_none()
            if row is None:
                return None
            fence, deadline = row.fence + 1, now + lease_s
            leases.update(
                connection,
                row,
                state=JobState.RUNNING.value,
                fence=fence,
                lane=lane,
                lease_deadline=deadline,
                start_time=row.start_time or now,
                event_batch=0,
            )
            row = leases.find_by_id(connection, row.id)
        return Lease(leases.record(row), fence, deadline)

    def renew(self, job_id: str, fence: int, lease_s: float) -> bool:
        """Hold a job for another ``lease_s`` seconds from now, and return whether it should be cancelled.

        Raises:
            StaleLeaseError: The job is no longer the caller's.
        """
        deadline = self._context.clock.now() + lease_s
        with self._context.mutation("jobs.renew") as connection:
            row = leases.find_by_id(connection, job_id)
            leases.check_fence(row, fence)
            leases.update(connection, row, lease_deadline=deadline)
        return bool(row.cancel_requested)

    def append_events(self, job_id: str, fence: int, events: Sequence[Event], batch: int = 0) -> None:
        """Add what a worker reports.

        Args:
            job_id: The job.
            fence: The lease's.
            events: Their ``seq`` is assigned here. A ``time`` of 0 becomes now.
            batch: Counted from 1 within the lease: a batch sent again after a lost reply is added once. 0: not counted.

        Raises:
            StaleLeaseError: The job is no longer the caller's.
            WireError: INVALID_ARGUMENT for a phase that is the store's own to write, or a progress outside 0 to 1.
        """
        leases.check_events(events)
        if not events:
            return
        now = self._context.clock.now()
        with self._context.mutation("jobs.append_events") as connection:
            row = leases.find_by_id(connection, job_id)
            leases.check_fence(row, fence)
            if batch and batch <= row.event_batch:
                return
            leases.add_events(connection, row, events, now)
            if batch:
                leases.update(connection, row, event_batch=batch)

    def succeed(self, job_id: str, fence: int, model: ModelRecord) -> ModelRecord:
        """Publish a job's model as the next version of its name, and end the job: one transaction.

        The model's artefact must be durable in blob storage before. A retry returns the model that was published. Where
        a cancel was asked for, the job ends CANCELLED and nothing is published.

        Args:
            job_id: The job.
            fence: The lease's.
            model: What was trained. Tenant, name, version, job and time are the store's to fill in.

        Raises:
            StaleLeaseError: The job is no longer the caller's, or was cancelled.
        """
        now = self._context.clock.now()
        with self._context.mutation("jobs.succeed") as connection:
            row = leases.find_by_id(connection, job_id)
            published = self._publish(connection, row, fence, model, now)
        if published is None:
            raise StaleLeaseError(f"job {job_id} was cancelled; its model was not published")
        return published

    def fail(self, job_id: str, fence: int, code: ErrorCode, message: str) -> None:
        """End a job with the reason why it failed. Repeating it changes nothing.

        Raises:
            StaleLeaseError: The job is no longer the caller's.
        """
        now = self._context.clock.now()
        with self._context.mutation("jobs.fail") as connection:
            row = leases.find_by_id(connection, job_id)
            if row.state == JobState.FAILED.value and row.fence == fence:
                return
            leases.check_fence(row, fence)
            leases.end(connection, row, JobState.FAILED, now=now, error_code=code.name, error_message=message)

    def mark_cancelled(self, job_id: str, fence: int) -> None:
        """End a job that a cancel was asked for. Repeating it changes nothing.

        Raises:
            StaleLeaseError: The job is no longer the caller's.
            WireError: JOB_STATE where nobody asked for a cancel.
        """
        now = self._context.clock.now()
        with self._context.mutation("jobs.mark_cancelled") as connection:
            row = leases.find_by_id(connection, job_id)
            if row.state == JobState.CANCELLED.value and row.fence == fence:
                return
            leases.check_fence(row, fence)
            if not row.cancel_requested:
                raise WireError(ErrorCode.JOB_STATE, f"nobody asked to cancel job {job_id}")
            leases.end(connection, row, JobState.CANCELLED, now=now)

    # What the controller does.

    def has_queued(self, kind: str = HEAD_JOB) -> bool:
        """Return whether a job of a kind waits."""
        query = sa.select(_table.c.id).where(_table.c.state == JobState.QUEUED.value, _table.c.kind == kind).limit(1)
        with self._context.database.read() as connection:
            return connection.execute(query).first() is not None

    def expire(self) -> builtins.list[str]:
        """Take back every job whose lease has run out, and return their ids.

        A job goes back to its place in the queue; to CANCELLED if a cancel was asked for; to FAILED after
        ``max_restarts`` restarts.
        """
        now = self._context.clock.now()
        with self._context.mutation("jobs.expire") as connection:
            query = sa.select(_table).where(_table.c.state == JobState.RUNNING.value, _table.c.lease_deadline < now)
            rows = connection.execute(query.order_by(_table.c.number)).all()
            for row in rows:
                self._take_back(connection, row, f"lane {row.lane} stopped answering", now)
        return [row.id for row in rows]

    def release_lane(self, lane: str) -> builtins.list[str]:
        """Take back at once what an earlier incarnation of a lane held, and return the jobs' ids."""
        now = self._context.clock.now()
        with self._context.mutation("jobs.release_lane") as connection:
            released = self._release(connection, lane, now)
        return released

    def _publish(
        self, connection: sa.Connection, row: leases.JobRow, fence: int, model: ModelRecord, now: float
    ) -> ModelRecord | None:
        """Publish and end, or end as cancelled and return None."""
        if row.state == JobState.SUCCEEDED.value and row.fence == fence:
            earlier = self._models.of_job(connection, row.tenant, row.id)
            if earlier is not None and earlier.head_sha256 == model.head_sha256:
                return earlier
        leases.check_fence(row, fence)
        if row.cancel_requested:
            leases.end(connection, row, JobState.CANCELLED, now=now)
            return None
        spec = serial.spec_from_text(row.spec)
        published = self._models.publish(connection, model, tenant=row.tenant, name=spec.model, job_id=row.id, now=now)
        leases.end(connection, row, JobState.SUCCEEDED, now=now, model=published.reference, metrics=published.metrics)
        return published

    def _release(self, connection: sa.Connection, lane: str, now: float) -> builtins.list[str]:
        query = sa.select(_table).where(_table.c.state == JobState.RUNNING.value, _table.c.lane == lane)
        rows = connection.execute(query.order_by(_table.c.number)).all()
        for row in rows:
            self._take_back(connection, row, f"lane {lane} began anew", now)
        return [row.id for row in rows]

    def _take_back(self, connection: sa.Connection, row: leases.JobRow, reason: str, now: float) -> None:
        leases.take_back(connection, row, reason=reason, max_restarts=self._max_restarts, now=now)
