"""The transitions of a job that is held, or was: fences, being taken back, the end. Inside the caller's transaction.

    QUEUED --lease--> RUNNING --succeed, fail, mark_cancelled--> SUCCEEDED, FAILED, CANCELLED
      ^                  |
      +---taken back-----+        (CANCELLED if a cancel was asked for, FAILED after too many restarts)

Every change of holder, taking back included, raises the job's fence. So one comparison tells whoever held it before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from trunkline_wire.errors import ErrorCode, WireError

from trunkline_worker.store import schema, serial
from trunkline_worker.store.records import Event, JobRecord, JobState

STORE_PHASES = frozenset({"queued", "restart", "end"})
"""Phases of events that the store itself writes, each with the transition it tells of."""

_PHASE = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_MAX_MESSAGE_LENGTH = 2000
_jobs = schema.jobs
_events = schema.job_events

JobRow = sa.Row[tuple[object, ...]]


class StaleLeaseError(WireError):
    """The job is no longer the caller's: it was taken back, leased to another, or has ended. Drop the work."""

    def __init__(self, message: str) -> None:
        """Keep the public message."""
        super().__init__(ErrorCode.JOB_STATE, message)

    def __reduce__(self) -> tuple[object, ...]:
        """Stay this class on a trip between processes."""
        return StaleLeaseError, (self.message,)


def find_by_id(connection: sa.Connection, job_id: str) -> JobRow:
    """Return a job's row, whosever it is: for lanes.

    Raises:
        WireError: NOT_FOUND.
    """
    row = connection.execute(sa.select(_jobs).where(_jobs.c.id == job_id)).one_or_none()
    if row is None:
        raise _unknown(job_id)
    return row


def find(connection: sa.Connection, tenant: str, job_id: str) -> JobRow:
    """Return a tenant's job.

    Raises:
        WireError: NOT_FOUND, another tenant's job included.
    """
    row = connection.execute(sa.select(_jobs).where(_jobs.c.tenant == tenant, _jobs.c.id == job_id)).one_or_none()
    if row is None:
        raise _unknown(job_id)
    return row


def check_fence(row: JobRow, fence: int) -> None:
    """Check that the job is running and that ``fence`` is its newest.

    Raises:
        StaleLeaseError: Otherwise.
    """
    state = JobState(row.state)
    if state is not JobState.RUNNING or row.fence != fence:
        raise StaleLeaseError(
            f"job {row.id} is {state.name} and its fence is {row.fence}; a lease with fence {fence} changes nothing"
        )


def update(connection: sa.Connection, row: JobRow, **values: object) -> None:
    """Change columns of one job."""
    connection.execute(_jobs.update().where(_jobs.c.tenant == row.tenant, _jobs.c.id == row.id).values(**values))


def end(
    connection: sa.Connection,
    row: JobRow,
    state: JobState,
    *,
    now: float,
    error_code: str = "",
    error_message: str = "",
    model: str = "",
    metrics: Mapping[str, float] | None = None,
) -> None:
    """End a job that has not ended, with its ``end`` event."""
    error_message = serial.public_text(error_message, _MAX_MESSAGE_LENGTH)
    message = {
        JobState.SUCCEEDED: f"published {model}",
        JobState.FAILED: f"failed: [{error_code}] {error_message}",
        JobState.CANCELLED: "cancelled",
    }[state]
    update(
        connection,
        row,
        state=state.value,
        end_time=now,
        error_code=error_code,
        error_message=error_message,
        model=model,
        lane="",
        lease_deadline=0.0,
    )
    add_events(connection, row, [Event("end", 1.0, metrics or {}, message, now)], now)


def take_back(connection: sa.Connection, row: JobRow, *, reason: str, max_restarts: int, now: float) -> None:
    """Take a running job from its holder: back to its place in the queue, or to its end."""
    update(connection, row, fence=row.fence + 1, lane="", lease_deadline=0.0)
    if row.cancel_requested:
        end(connection, row, JobState.CANCELLED, now=now)
        return
    if row.num_restarts >= max_restarts:
        message = f"given up after {max_restarts} restarts: every worker that ran the job died or stopped answering"
        end(connection, row, JobState.FAILED, now=now, error_code=ErrorCode.INTERNAL.name, error_message=message)
        return
    update(connection, row, state=JobState.QUEUED.value, num_restarts=row.num_restarts + 1)
    add_events(connection, row, [Event("restart", 0.0, {}, reason, now)], now)


def check_events(events: Sequence[Event]) -> None:
    """Check events that a lane reports.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    for event in events:
        if event.phase in STORE_PHASES or not _PHASE.fullmatch(event.phase):
            raise WireError(
                ErrorCode.INVALID_ARGUMENT,
                f"{event.phase[:40]!r} is not a phase that a worker reports; expected 'embed', 'select', 'fit' ...",
            )
        if not 0.0 <= event.progress <= 1.0:
            raise WireError(ErrorCode.INVALID_ARGUMENT, f"progress {event.progress} is outside 0 to 1")
        if not math.isfinite(event.time):
            raise WireError(ErrorCode.INVALID_ARGUMENT, f"an event's time is {event.time}")


def add_events(connection: sa.Connection, row: JobRow, events: Sequence[Event], now: float) -> None:
    """Append events, counted on from the job's last."""
    last = connection.execute(
        sa.select(_jobs.c.last_seq).where(_jobs.c.tenant == row.tenant, _jobs.c.id == row.id)
    ).scalar_one()
    connection.execute(
        _events.insert(),
        [
            {
                "tenant": row.tenant,
                "job_id": row.id,
                "seq": last + offset,
                "time": event.time or now,
                "phase": event.phase,
                "progress": event.progress,
                "metrics": serial.dumps(dict(event.metrics)),
                "message": serial.public_text(event.message, _MAX_MESSAGE_LENGTH),
            }
            for offset, event in enumerate(events, start=1)
        ],
    )
    update(connection, row, last_seq=last + len(events))


def read_events(connection: sa.Connection, row: JobRow, after_seq: int, limit: int) -> list[Event]:
    """Return events after ``after_seq``, oldest first."""
    query = (
        sa.select(_events)
        .where(_events.c.tenant == row.tenant, _events.c.job_id == row.id, _events.c.seq > after_seq)
        .order_by(_events.c.seq)
        .limit(limit)
    )
    return [
        Event(one.phase, one.progress, serial.loads(one.metrics), one.message, one.time, one.seq)
        for one in connection.execute(query)
    ]


def record(row: JobRow) -> JobRecord:
    """Return a row as a record."""
    return JobRecord(
        id=row.id,
        tenant=row.tenant,
        state=JobState(row.state),
        spec=serial.spec_from_text(row.spec),
        create_time=row.create_time,
        start_time=row.start_time,
        end_time=row.end_time,
        num_restarts=row.num_restarts,
        cancel_requested=row.cancel_requested,
        error_code=row.error_code,
        error_message=row.error_message,
        model=row.model,
    )


def _unknown(job_id: str) -> WireError:
    return WireError(ErrorCode.NOT_FOUND, f"there is no job {job_id[:64]!r}; `trunkline jobs` lists those there")
