"""Training jobs: submit, look, cancel, watch."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.v1 import error_pb2, training_pb2_grpc
from trunkline_wire.v1 import training_pb2 as pb

from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.boundary import current_call
from trunkline_worker.serving.resolve import resolve
from trunkline_worker.serving.servicers.records import event_to_proto, job_to_proto, spec_from_proto
from trunkline_worker.store.records import DatasetRecord
from trunkline_worker.training.spec import check_spec

WATCH_INTERVAL_S = 10.0
"""How long one question for new events waits, in seconds, before it is asked again."""


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """See ``TrainingService`` in training.proto."""

    def __init__(self, backends: Backends) -> None:
        """Keep what the servicer stands on."""
        self._backends = backends

    async def SubmitJob(self, request: pb.SubmitJobRequest, context: grpc.aio.ServicerContext) -> pb.SubmitJobResponse:
        """Check the job as far as it can be known now, and queue it."""
        call = current_call()
        if not request.idempotency_key:
            raise WireError(ErrorCode.INVALID_ARGUMENT, "SubmitJob needs an idempotency_key")
        spec = spec_from_proto(request.spec)
        check_spec(spec)
        dataset: DatasetRecord = await self._backends.metadata.call(
            "datasets.get", call.tenant, spec.dataset, timeout_s=call.remaining_s()
        )
        spec = await resolve(spec, dataset, self._backends)
        job = await self._backends.metadata.call(
            "jobs.submit", call.tenant, spec, request.idempotency_key, timeout_s=call.remaining_s()
        )
        return pb.SubmitJobResponse(job=job_to_proto(job))

    async def GetJob(self, request: pb.GetJobRequest, context: grpc.aio.ServicerContext) -> pb.GetJobResponse:
        """Return a job as it stands."""
        call = current_call()
        job = await self._backends.metadata.call("jobs.get", call.tenant, request.id, timeout_s=call.remaining_s())
        return pb.GetJobResponse(job=job_to_proto(job))

    async def ListJobs(self, request: pb.ListJobsRequest, context: grpc.aio.ServicerContext) -> pb.ListJobsResponse:
        """Return the caller's jobs."""
        call = current_call()
        jobs = await self._backends.metadata.call("jobs.list", call.tenant, timeout_s=call.remaining_s())
        return pb.ListJobsResponse(jobs=[job_to_proto(job) for job in jobs])

    async def CancelJob(self, request: pb.CancelJobRequest, context: grpc.aio.ServicerContext) -> pb.CancelJobResponse:
        """End a queued job, or ask a running one to stop."""
        call = current_call()
        job = await self._backends.metadata.call(
            "jobs.request_cancel", call.tenant, request.id, request.idempotency_key, timeout_s=call.remaining_s()
        )
        return pb.CancelJobResponse(job=job_to_proto(job))

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchJobResponse]:
        """Send a job's events as they come, then the job as it ended, then the end message."""
        call = current_call()
        metadata = self._backends.metadata
        after, count = request.after_seq, 0
        while True:
            # The state is read before the events: a job that has ended adds none, so nothing is missed.
            job = await metadata.call("jobs.get", call.tenant, request.id, timeout_s=call.remaining_s())
            wait_s = 0.0 if job.state.has_ended else WATCH_INTERVAL_S
            events = await metadata.wait_for_events(call.tenant, request.id, after, wait_s)
            for event in events:
                count += 1
                yield pb.WatchJobResponse(seq=count, event=event_to_proto(event))
                after = event.seq
            if job.state.has_ended and not events:
                yield pb.WatchJobResponse(seq=count + 1, job=job_to_proto(job))
                yield pb.WatchJobResponse(seq=count + 2, end=error_pb2.EndOfStream(num_messages=count + 1))
                return
