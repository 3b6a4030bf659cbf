# ruff: noqa: N802
"""A small, honest cluster in this process: the contract's services in memory, and faults on demand.

Jobs train for real, by nearest class mean or least squares. The one contract suite runs against this and against the
real thing, so that it cannot drift.
"""

import dataclasses
import functools
import hashlib
import inspect
import threading
import time
import uuid
from collections import Counter
from concurrent import futures
from dataclasses import dataclass, field

import fake_backbone
import fake_fusion
import grpc
import numpy as np
from trunkline_wire import WIRE_VERSION, codecs, messages, quantise
from trunkline_wire.errors import (
    REQUEST_ID_METADATA,
    RETRY_DELAY_METADATA,
    STATUS_BY_CODE,
    ErrorCode,
    WireError,
    format_details,
)
from trunkline_wire.limits import (
    MAX_BATCH_ROWS,
    MAX_CONCURRENT_STREAMS,
    MAX_DATASET_ROWS,
    MAX_FIND_ROWS,
    MAX_MESSAGE_BYTES,
)
from trunkline_wire.names import check_name, parse_reference
from trunkline_wire.rows import ROW_ID_BYTES, dataset_digest, number_groups
from trunkline_wire.specs import FLOAT32, IMAGES, CodecUse, CutSpec, Endpoints, FeatureSpace
from trunkline_wire.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    error_pb2,
    inference_pb2,
    inference_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

TOKEN = "the-token-of-the-tests-0123456789"
OTHER_TOKEN = "the-token-of-another-tenant-0123"
TENANTS = {f"Bearer {TOKEN}": "default", f"Bearer {OTHER_TOKEN}": "other"}
ENDED = (training_pb2.JOB_STATE_SUCCEEDED, training_pb2.JOB_STATE_FAILED, training_pb2.JOB_STATE_CANCELLED)


@dataclass
class Faults:
    """What goes wrong, and how often. Counters count down."""

    drop_upload_after: list = field(default_factory=list)  # acknowledged chunks before each break
    drop_predict_after: list = field(default_factory=list)
    drop_watch_after: list = field(default_factory=list)
    lose_answer: Counter = field(default_factory=Counter)  # method -> how often the answer is lost after the effect
    overload_calls: Counter = field(default_factory=Counter)  # method -> refusals
    overload_batches: int = 0
    batch_error: WireError | None = None
    damage_chunks: int = 0
    damage_stems: int = 0
    cut_stems: int = 0
    wrong_seq: bool = False
    storage_full: bool = False
    raise_internally: bool = False
    job_error: WireError | None = None
    hold_jobs: threading.Event | None = None
    watched: threading.Event = field(default_factory=threading.Event)
    wire_version: int = WIRE_VERSION
    clock_offset_s: float = 0.0
    storage_shared: bool = True
    delay: threading.Event | None = None  # unary calls wait for it
    # It knows float32 and float16, and nothing of quantised stems, of what a cut costs, or of several inputs and
    # classes of a row.
    is_old: bool = False
    stem_data: bytes | None = None  # sent in place of the stem's file


class _Dropped(Exception):
    """The connection breaks here: not one of our errors."""


class _NoSuchMethod(Exception):
    """A cluster of an earlier version has no such method."""


def _boundary(method):
    """Check the token, count the call, and let nothing out but public errors."""
    name = method.__name__

    def enter(worker, context):
        metadata = dict(context.invocation_metadata())
        request_id = metadata.get(REQUEST_ID_METADATA, "none")
        context.request_id = request_id
        worker.request_ids.append(request_id)
        worker.peers.append(context.peer())
        worker.calls[name] += 1
        tenant = worker.tenant_of(metadata)
        if tenant is None:
            raise WireError(ErrorCode.UNAUTHENTICATED, "no token, or one that is not known here")
        if worker.faults.overload_calls[name] > 0:
            worker.faults.overload_calls[name] -= 1
            raise WireError(ErrorCode.OVERLOADED, "the queues are full", retry_delay_s=0.05)
        if worker.faults.raise_internally:
            raise RuntimeError("/secret/path in a traceback")
        context.tenant = tenant

    def leave(context, error):
        if isinstance(error, _Dropped):
            context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")
        if isinstance(error, _NoSuchMethod):
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        if not isinstance(error, WireError):
            error = WireError(ErrorCode.INTERNAL, "something went wrong in the cluster")
        if error.retry_delay_s:
            context.set_trailing_metadata(((RETRY_DELAY_METADATA, str(int(error.retry_delay_s * 1000))),))
        context.abort(getattr(grpc.StatusCode, STATUS_BY_CODE[error.code]), format_details(error, context.request_id))

    @functools.wraps(method)
    def unary(self, request, context):
        try:
            enter(self.worker, context)
            if self.worker.faults.delay is not None:
                self.worker.faults.delay.wait(30)
            answer = method(self, request, context)
            if self.worker.faults.lose_answer[name] > 0:
                self.worker.faults.lose_answer[name] -= 1
                raise _Dropped
            return answer
        except Exception as error:
            leave(context, error)

    @functools.wraps(method)
    def stream(self, request, context):
        try:
            enter(self.worker, context)
            yield from method(self, request, context)
        except Exception as error:
            leave(context, error)

    return stream if inspect.isgeneratorfunction(method) else unary


def _row(rows, at):
    """Return one row, so that it can be kept on its own."""
    return rows.take([at]) if isinstance(rows, quantise.PackedRows) else rows[at]


def _more_rows(message, first_rows):
    """Return space and rows of one more input."""
    space = messages.space_from_proto(message.space)
    if message.HasField("features"):
        return space, codecs.decode(message.features)
    if not isinstance(first_rows, list) or not space.is_input:
        raise WireError(ErrorCode.INVALID_ARGUMENT, f"no features for the input {space.source!r}")
    return space, first_rows


def _readers(model):
    """Return the inputs of a model."""
    return [
        fake_fusion.Reader(messages.space_from_proto(one.space), tuple(one.slices))
        for one in (model, *model.more_inputs)
    ]


def _check_use(reader, space, rows, trained):
    """Return how rows were sent, checked against how those were that a model or one of its inputs was trained on."""
    if reader.space.is_local:
        fake_fusion.check_local_use(reader.space, trained.codec, space, rows)
        return CodecUse(trained.codec, 0.0, trained.codec, 0.0)
    fake_fusion.check_own_use(reader.space, trained.codec, space, rows)
    return fake_backbone.check_use(space, rows, trained.codec, trained.codec_error)


def _known_to_old(spec):
    """Return what an old cluster reads of a job: the rest it takes no notice of."""
    known = training_pb2.JobSpec()
    known.CopyFrom(spec)
    kinds = (training_pb2.HEAD_KIND_UNSPECIFIED, training_pb2.HEAD_KIND_LINEAR, training_pb2.HEAD_KIND_MLP)
    if known.head.kind not in kinds:
        raise WireError(ErrorCode.UNSUPPORTED, f"head kind {known.head.kind} is not known here")
    for name in ("activation", "batch_norm", "channels", "tap", "fuse", "fuse_width"):
        known.head.ClearField(name)
    for name in known.fit.DESCRIPTOR.fields_by_name:
        if known.fit.DESCRIPTOR.fields_by_name[name].number > 8:
            known.fit.ClearField(name)
    known.ClearField("more_backbones")
    return known


def _check_stated(timeout_s):
    if timeout_s < 0:
        raise WireError(ErrorCode.DEADLINE_EXCEEDED, "the deadline had passed when the call was sent")


def _numbered(requests, kind):
    """Yield the messages of a stream, checked as the gateway does."""
    last, count = -1, 0
    for request in requests:
        if request.WhichOneof("kind") == "end":
            if request.end.num_messages != count:
                raise WireError(ErrorCode.INVALID_ARGUMENT, f"{request.end.num_messages} announced, {count} arrived")
            return
        if request.WhichOneof("kind") != kind or request.seq <= last:
            raise WireError(ErrorCode.INVALID_ARGUMENT, f"seq {request.seq} after {last}: numbers must grow")
        last, count = request.seq, count + 1
        yield request
    raise WireError(ErrorCode.INVALID_ARGUMENT, "the stream ended without its end message")


class _Catalog(catalog_pb2_grpc.CatalogServiceServicer):
    def __init__(self, worker):
        self.worker = worker

    @_boundary
    def GetServerInfo(self, request, context):
        return catalog_pb2.GetServerInfoResponse(
            version="0.0-fake",
            wire_version=self.worker.faults.wire_version,
            versions={"numpy": np.__version__},
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_batch_rows=MAX_BATCH_ROWS,
            time_s=time.time() + self.worker.faults.clock_offset_s,
            tenant=context.tenant,
            storage_shared=self.worker.faults.storage_shared,
            storage_note="in memory",
            codecs=() if self.worker.faults.is_old else (*quantise.CODECS, quantise.IMAGES),
        )

    @_boundary
    def ListBackbones(self, request, context):
        found = [messages.backbone_to_proto(self._spec(0, name)) for name in fake_backbone.NAMES]
        return catalog_pb2.ListBackbonesResponse(backbones=found)

    def _spec(self, input_size, name):
        spec = fake_backbone.spec(input_size, name or fake_backbone.NAME)
        if not self.worker.faults.is_old:
            return spec
        return dataclasses.replace(
            spec, macs=0, cuts=tuple(CutSpec(c.name, c.feature_shape, c.fingerprint, c.slices) for c in spec.cuts)
        )

    @_boundary
    def DescribeBackbone(self, request, context):
        spec = self._spec(request.input_size, request.backbone)
        return catalog_pb2.DescribeBackboneResponse(backbone=messages.backbone_to_proto(spec))

    @_boundary
    def DescribeCut(self, request, context):
        if self.worker.faults.is_old:
            raise _NoSuchMethod
        cost = fake_backbone.cost(request.cut, request.input_size, request.backbone)
        return catalog_pb2.DescribeCutResponse(cost=messages.cut_cost_to_proto(cost))

    @_boundary
    def TuneBackbone(self, request, context):
        if self.worker.faults.is_old:
            raise _NoSuchMethod
        tuning = fake_backbone.tuning(request.cut, request.input_size, request.again, request.backbone)
        return messages.tuning_to_proto(tuning)

    @_boundary
    def GetEndpoints(self, request, context):
        if self.worker.faults.is_old:
            raise _NoSuchMethod
        return messages.endpoints_to_proto(self.worker.endpoints(request.backbone))

    @_boundary
    def FetchStem(self, request, context):
        spec = fake_backbone.spec(request.input_size, request.backbone)
        faults = self.worker.faults
        precision = FLOAT32 if faults.is_old else request.precision or FLOAT32
        stem = fake_backbone.stem(request.cut, request.input_size, precision, request.backbone)
        data = stem.data if faults.stem_data is None else faults.stem_data
        header = catalog_pb2.StemHeader(
            space=messages.space_to_proto(stem.space),
            preprocessing=messages.preprocessing_to_proto(spec.preprocessing),
            feature_shape=stem.cut.feature_shape,
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            precision="" if faults.is_old else precision,
            embedding_error=stem.embedding_error,
        )
        if faults.damage_stems > 0 and not faults.cut_stems:
            faults.damage_stems -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        pieces = [data[start : start + 100] for start in range(0, len(data), 100)]
        yield catalog_pb2.FetchStemResponse(seq=0, header=header)
        for seq, piece in enumerate(pieces, 1):
            if faults.cut_stems > 0 and seq == len(pieces):
                faults.cut_stems -= 1
                return
            yield catalog_pb2.FetchStemResponse(seq=seq, chunk=piece)
        end = error_pb2.EndOfStream(num_messages=len(pieces) + 1)
        yield catalog_pb2.FetchStemResponse(seq=len(pieces) + 1, end=end)


class _Datasets(dataset_pb2_grpc.DatasetServiceServicer):
    def __init__(self, worker):
        self.worker = worker

    @_boundary
    def FindMissingRows(self, request, context):
        if not 0 < len(request.row_ids) <= MAX_FIND_ROWS:
            raise WireError(ErrorCode.INVALID_ARGUMENT, f"{len(request.row_ids)} row ids")
        known = self.worker.rows[context.tenant]
        return dataset_pb2.FindMissingRowsResponse(
            missing=[index for index, one in enumerate(request.row_ids) if one not in known]
        )

    @_boundary
    def UploadRows(self, requests, context):
        faults, count = self.worker.faults, 0
        for request in _numbered(requests, "chunk"):
            if faults.drop_upload_after and count >= faults.drop_upload_after[0]:
                faults.drop_upload_after.pop(0)
                raise _Dropped
            count += 1
            try:
                added = self.worker.store(context.tenant, request.chunk)
                ack = dataset_pb2.ChunkAck(num_new_rows=added)
                seq = request.seq + 1000 if faults.wrong_seq else request.seq
                yield dataset_pb2.UploadRowsResponse(seq=seq, ack=ack)
            except WireError as error:
                message = messages.error_to_proto(error, context.request_id)
                yield dataset_pb2.UploadRowsResponse(seq=request.seq, error=message)
        yield dataset_pb2.UploadRowsResponse(seq=count, end=error_pb2.EndOfStream(num_messages=count))

    @_boundary
    def CommitDataset(self, request, context):
        if not request.idempotency_key:
            raise WireError(ErrorCode.INVALID_ARGUMENT, "an idempotency key is needed")
        with self.worker.lock:
            done = self.worker.answers.get((context.tenant, request.idempotency_key))
            if done is None:
                done = self.worker.commit(context.tenant, request)
                self.worker.answers[context.tenant, request.idempotency_key] = done
        return dataset_pb2.CommitDatasetResponse(dataset=done)

    @_boundary
    def GetDataset(self, request, context):
        message, _ = self.worker.find("dataset", context.tenant, request.dataset)
        return dataset_pb2.GetDatasetResponse(dataset=message)

    @_boundary
    def ListDatasets(self, request, context):
        found = [message for message, _ in self.worker.things("dataset", context.tenant)]
        return dataset_pb2.ListDatasetsResponse(datasets=found)


class _Inference(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, worker):
        self.worker = worker

    def _row_errors(self, errors, context):
        return [
            error_pb2.RowError(row=row, error=messages.error_to_proto(error, context.request_id))
            for row, error in errors.items()
        ]

    def _tensor(self, matrix):
        return codecs.encode_array(matrix.astype(np.float32))

    def _received(self, *tensors):
        self.worker.received_bytes += sum(codecs.encoded_size(one) for one in tensors)

    def _predict(self, request, context):
        model, (head, outliers) = self.worker.find("model", context.tenant, request.model)
        asked = request.outlier_scores and not self.worker.faults.is_old
        if asked and not model.has_outlier_scores:
            raise WireError(ErrorCode.UNSUPPORTED, f"{model.name} has no outlier scores; train it again")
        _check_stated(request.timeout_s)
        rows, space = codecs.decode(request.features), messages.space_from_proto(request.space)
        more = [_more_rows(one, rows) for one in request.more_inputs]
        self._received(request.features, *(one.features for one in request.more_inputs))
        first, *others = _readers(model)
        needed = [(one.space, given.codec, given.width) for one, given in zip(others, model.more_inputs, strict=True)]
        matched = fake_fusion.matched(needed, more)
        use = _check_use(first, space, rows, model)
        for reader, (own, other_rows), given in zip(others, matched, model.more_inputs, strict=True):
            _check_use(reader, own, other_rows, given)
        spaces = [space, *(own for own, _ in matched)]
        inputs = [fake_fusion.at(one, own) for one, own in zip([first, *others], spaces, strict=True)]
        every = {one.source: found for one, found in zip(spaces, [rows, *(x for _, x in matched)], strict=True)}
        columns, errors = fake_fusion.side_by_side(inputs, every)
        self.worker.trunk_rows += len(rows)
        outputs = np.array(head(columns))
        found = outliers(columns) if asked else np.zeros((0, 2))
        labels = []
        if model.task == registry_pb2.TASK_CLASSIFICATION:
            labels = [model.class_names[k] for k in np.nan_to_num(outputs).argmax(axis=1)]
        for row in errors:
            outputs[row] = np.nan
            if asked:
                found[row] = np.nan
            if labels:
                labels[row] = ""
        return inference_pb2.PredictResponse(
            model=f"{model.name}@{model.version}",
            outputs=self._tensor(outputs),
            labels=labels,
            row_errors=self._row_errors(errors, context),
            timings=inference_pb2.trunkline__wire_dot_v1_dot_tensor__pb2.Timings(trunk_s=0.001, total_s=0.002),
            codec_use=messages.codec_use_to_proto(use),
            outlier_distances=found[:, 0].tolist(),
            outlier_scores=found[:, 1].tolist(),
        )

    def _extract(self, request, context):
        _check_stated(request.timeout_s)
        rows, space = codecs.decode(request.features), messages.space_from_proto(request.space)
        self._received(request.features)
        self.worker.trunk_rows += len(rows)
        embedding, found, errors = fake_backbone.embed(space, rows, request.slices)
        use = fake_backbone.use(space, fake_backbone.label(space, rows))
        return inference_pb2.ExtractResponse(
            embedding=self._tensor(embedding),
            slices=messages.slices_to_proto(found),
            row_errors=self._row_errors(errors, context),
            codec_use=messages.codec_use_to_proto(use),
        )

    @_boundary
    def Predict(self, request, context):
        return self._predict(request, context)

    @_boundary
    def Extract(self, request, context):
        return self._extract(request, context)

    def _stream(self, requests, context, kind, answer, response):
        faults, count = self.worker.faults, 0
        for request in _numbered(requests, kind):
            self.worker.before_batch(count)
            if faults.drop_predict_after and count >= faults.drop_predict_after[0]:
                faults.drop_predict_after.pop(0)
                raise _Dropped
            count += 1
            try:
                if faults.overload_batches > 0:
                    faults.overload_batches -= 1
                    raise WireError(ErrorCode.OVERLOADED, "the queues are full", retry_delay_s=0.02)
                if faults.batch_error is not None and count == 2:
                    raise faults.batch_error
                seq = request.seq + 1000 if faults.wrong_seq else request.seq
                yield response(seq=seq, result=answer(getattr(request, kind), context))
            except WireError as error:
                yield response(seq=request.seq, error=messages.error_to_proto(error, context.request_id))
        yield response(seq=count, end=error_pb2.EndOfStream(num_messages=count))

    @_boundary
    def StreamPredict(self, requests, context):
        yield from self._stream(requests, context, "predict", self._predict, inference_pb2.StreamPredictResponse)

    @_boundary
    def StreamExtract(self, requests, context):
        yield from self._stream(requests, context, "extract", self._extract, inference_pb2.StreamExtractResponse)


class _Training(training_pb2_grpc.TrainingServiceServicer):
    def __init__(self, worker):
        self.worker = worker

    @_boundary
    def SubmitJob(self, request, context):
        if not request.idempotency_key:
            raise WireError(ErrorCode.INVALID_ARGUMENT, "an idempotency key is needed")
        with self.worker.lock:
            key = (context.tenant, request.idempotency_key)
            if key not in self.worker.answers:
                self.worker.answers[key] = self.worker.submit(context.tenant, request.spec)
            return training_pb2.SubmitJobResponse(job=self.worker.answers[key].message)

    @_boundary
    def GetJob(self, request, context):
        return training_pb2.GetJobResponse(job=self.worker.job(context.tenant, request.id).message)

    @_boundary
    def ListJobs(self, request, context):
        jobs = [job.message for (tenant, _), job in self.worker.jobs.items() if tenant == context.tenant]
        return training_pb2.ListJobsResponse(jobs=jobs)

    @_boundary
    def CancelJob(self, request, context):
        job = self.worker.job(context.tenant, request.id)
        with job.changed:
            if request.idempotency_key and request.idempotency_key in job.cancel_keys:
                return training_pb2.CancelJobResponse(job=job.message)
            if job.message.state in ENDED:
                raise WireError(ErrorCode.JOB_STATE, f"job {request.id} has ended")
            job.cancel_keys.add(request.idempotency_key)
            job.cancelled.set()
            return training_pb2.CancelJobResponse(job=job.message)

    @_boundary
    def WatchJob(self, request, context):
        job = self.worker.job(context.tenant, request.id)
        faults, after, count = self.worker.faults, request.after_seq, 0
        faults.watched.set()
        while True:
            with job.changed:
                while len(job.events) <= after and job.message.state not in ENDED:
                    job.changed.wait(30)
                fresh, ended = job.events[after:], job.message.state in ENDED
            for event in fresh:
                if faults.drop_watch_after and count >= faults.drop_watch_after[0]:
                    faults.drop_watch_after.pop(0)
                    raise _Dropped
                count, after = count + 1, event.seq
                yield training_pb2.WatchJobResponse(seq=count, event=event)
            if ended and not fresh:
                yield training_pb2.WatchJobResponse(seq=count + 1, job=job.message)
                end = error_pb2.EndOfStream(num_messages=count + 1)
                yield training_pb2.WatchJobResponse(seq=count + 2, end=end)
                return


class _Registry(registry_pb2_grpc.RegistryServiceServicer):
    def __init__(self, worker):
        self.worker = worker

    @_boundary
    def GetModel(self, request, context):
        return registry_pb2.GetModelResponse(model=self.worker.find("model", context.tenant, request.model)[0])

    @_boundary
    def ListModels(self, request, context):
        found = [_without_candidates(message) for message, _ in self.worker.things("model", context.tenant)]
        return registry_pb2.ListModelsResponse(models=found)


def _without_candidates(message):
    other = registry_pb2.Model()
    other.CopyFrom(message)
    del other.candidates[:]
    return other


class _Job:
    def __init__(self, message):
        self.message = message
        self.events = []
        self.changed = threading.Condition()
        self.cancelled = threading.Event()
        self.cancel_keys = set()

    def add(self, phase, progress=0.0, metrics=(), message=""):
        with self.changed:
            event = training_pb2.JobEvent(
                seq=len(self.events) + 1, phase=phase, progress=progress, metrics=dict(metrics), message=message
            )
            event.time.GetCurrentTime()
            self.events.append(event)
            self.changed.notify_all()

    def end(self, state, model="", error=None):
        self.add("end", 1.0)
        with self.changed:
            self.message.state = state
            self.message.model = model
            self.message.end_time.GetCurrentTime()
            if error is not None:
                self.message.error.CopyFrom(messages.error_to_proto(error, "job"))
            self.changed.notify_all()


class FakeWorker:
    """The server. ``address`` once it is started; a context manager."""

    def __init__(self, *, port=0, tls=None, health=True):
        """Prepare.

        Args:
            port: 0 takes a free one.
            tls: (key, certificate) in PEM, or None.
            health: Whether ``grpc.health.v1`` is served.
        """
        self.faults = Faults()
        self.calls = Counter()
        self.request_ids = []
        self.peers = []
        self.rows = {tenant: {} for tenant in TENANTS.values()}
        self.answers = {}
        self.jobs = {}
        self.kept = {}
        self.trunk_rows = 0
        self.received_chunks = 0
        self.received_bytes = 0
        self.lock = threading.RLock()
        self.interceptors = ()
        self._port, self._tls, self._health = port, tls, health
        self._threads = []

    def __enter__(self):
        """Start."""
        self._server = grpc.server(
            futures.ThreadPoolExecutor(16),
            options=[
                ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
            ],
            interceptors=self.interceptors,
        )
        self.add_services(self._server)
        if self._health:
            from grpc_health.v1 import health, health_pb2_grpc

            health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), self._server)
        where = f"127.0.0.1:{self._port}"
        if self._tls:
            credentials = grpc.ssl_server_credentials([self._tls])
            self._port = self._server.add_secure_port(where, credentials)
        else:
            self._port = self._server.add_insecure_port(where)
        self._server.start()
        self.address, self.token, self.ca_file = f"127.0.0.1:{self._port}", TOKEN, ""
        return self

    def __exit__(self, *_):
        """Stop."""
        for event in (self.faults.hold_jobs, self.faults.delay):
            if event is not None:
                event.set()
        for thread in self._threads:
            thread.join(60)
        self._server.stop(0).wait(60)

    def add_services(self, server):
        """Add what it answers to its server."""
        catalog_pb2_grpc.add_CatalogServiceServicer_to_server(_Catalog(self), server)
        dataset_pb2_grpc.add_DatasetServiceServicer_to_server(_Datasets(self), server)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Inference(self), server)
        training_pb2_grpc.add_TrainingServiceServicer_to_server(_Training(self), server)
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(_Registry(self), server)

    def tenant_of(self, metadata):
        """Return whose call this is, or None."""
        return TENANTS.get(metadata.get("authorization", ""))

    def before_batch(self, number):
        """Do something before a batch of a stream is answered."""

    def endpoints(self, backbone):
        """Return where replicas listen themselves: nowhere."""
        return Endpoints()

    def things(self, kind, tenant):
        """Return every version of every dataset or model of a tenant."""
        return [thing for (k, t, _), versions in self.kept.items() if (k, t) == (kind, tenant) for thing in versions]

    def find(self, kind, tenant, text):
        """Return a dataset or model, or raise NOT_FOUND."""
        reference = parse_reference(text, kind)
        versions = self.kept.get((kind, tenant, reference.name), [])
        number = reference.version or len(versions)
        if not 1 <= number <= len(versions):
            raise WireError(ErrorCode.NOT_FOUND, f"there is no {kind} {text!r}")
        return versions[number - 1]

    def keep(self, kind, tenant, message, content):
        """Keep a new version."""
        versions = self.kept.setdefault((kind, tenant, message.name), [])
        message.version = len(versions) + 1
        message.create_time.GetCurrentTime()
        versions.append((message, content))
        return message

    def store(self, tenant, chunk):
        """Store the rows of a chunk. Returns how many were new."""
        self.received_chunks += 1
        if self.faults.storage_full:
            raise WireError(ErrorCode.STORAGE_FULL, "the disk is full")
        self.received_bytes += codecs.encoded_size(chunk.rows)
        digest = hashlib.sha256(chunk.rows.data + chunk.rows.affine.scale + chunk.rows.affine.offset)
        for one in chunk.rows.encoded:
            digest.update(one)
        if self.faults.damage_chunks > 0:
            self.faults.damage_chunks -= 1
            digest.update(b"bit flip")
        if digest.digest() != chunk.sha256:
            raise WireError(ErrorCode.CORRUPT_DATA, "the chunk's bytes do not match its sha256")
        rows = codecs.decode(chunk.rows)
        if len(rows) != len(chunk.row_ids) or any(len(one) != ROW_ID_BYTES for one in chunk.row_ids):
            raise WireError(ErrorCode.SHAPE_MISMATCH, f"{len(chunk.row_ids)} row ids for {len(rows)} rows")
        space = messages.space_from_proto(chunk.space)
        if self.faults.is_old:
            space = FeatureSpace(space.backbone, space.cut, space.input_size, space.fingerprint)
        label = quantise.codec_of(rows)
        if space.backbone:
            label = fake_backbone.label(space, rows)
            cut = fake_backbone.spec(space.input_size, space.backbone).cut(space.cut)
            if rows.shape[1:] != cut.feature_shape:
                raise WireError(ErrorCode.SHAPE_MISMATCH, f"rows of {rows.shape[1:]}; {cut.feature_shape} is needed")
        elif space.is_local:
            fake_fusion.check_local(space, rows)
        elif space != IMAGES:
            raise WireError(
                ErrorCode.INVALID_ARGUMENT, "rows without a backbone must be encoded images at the cut 'input'"
            )
        known = self.rows[tenant]
        new = [(one, (label, _row(rows, at))) for at, one in enumerate(chunk.row_ids) if one not in known]
        known.update(new)
        return len(new)

    def commit(self, tenant, request):
        """Make a dataset."""
        check_name(request.name, "dataset")
        inputs = [(request.space, list(request.row_ids))]
        if not self.faults.is_old:
            inputs += [(one.space, list(one.row_ids)) for one in request.more_inputs]
        sources = [messages.space_from_proto(space).source for space, _ in inputs]
        if len(set(sources)) < len(sources):
            raise WireError(ErrorCode.INVALID_ARGUMENT, f"two inputs of one source: {sources}")
        num_rows = len(inputs[0][1])
        labels = [self._codec_of_rows(tenant, ids, num_rows) for _, ids in inputs]
        names, indices, targets = self._labels(request, num_rows)
        (space, ids), *more = inputs
        # An old cluster takes no notice of fields that it does not know.
        views = 1 if self.faults.is_old else request.views or 1
        is_grouped = bool(request.groups) and not self.faults.is_old
        groups = number_groups(np.array(request.groups)) if is_grouped else None
        if len(request.groups) not in (0, num_rows) or num_rows % views:
            raise WireError(ErrorCode.INVALID_ARGUMENT, "groups or views do not fit the rows")
        more_ids = [others for _, others in more]
        digest = dataset_digest(ids, names, indices, targets, more_ids, groups=groups, views=views)
        for message, _ in self.kept.get(("dataset", tenant, request.name), [])[-1:]:
            if message.digest == digest:
                return message
        message = dataset_pb2.Dataset(
            name=request.name,
            num_rows=num_rows,
            digest=digest,
            space=space,
            class_names=names,
            num_targets=0 if targets is None else targets.shape[1],
            codec=labels[0],
            more_inputs=[
                dataset_pb2.DatasetSource(space=one, codec=label)
                for (one, _), label in zip(more, labels[1:], strict=True)
            ],
            num_groups=0 if groups is None else int(groups.max()) + 1,
            views=0 if self.faults.is_old else views,
        )
        return self.keep("dataset", tenant, message, ([one for _, one in inputs], np.array(indices), targets))

    def _codec_of_rows(self, tenant, ids, num_rows):
        known = self.rows[tenant]
        if not 0 < len(ids) <= MAX_DATASET_ROWS:
            raise WireError(ErrorCode.EMPTY_BATCH, "no row is named")
        if len(ids) != num_rows:
            raise WireError(ErrorCode.SHAPE_MISMATCH, f"{len(ids)} rows beside {num_rows}")
        missing = sum(one not in known for one in ids)
        if missing:
            raise WireError(ErrorCode.NOT_FOUND, f"{missing} of {len(ids)} rows are not there")
        labels = {known[one][0] for one in ids}
        if len(labels) > 1:
            raise WireError(ErrorCode.INCOMPATIBLE, f"rows of one dataset have one codec; got {sorted(labels)}")
        return labels.pop()

    def _labels(self, request, num_rows):
        kind = request.WhichOneof("labels")
        if kind == "targets" or (kind == "multi_labels" and not self.faults.is_old):
            message = getattr(request, kind)
            targets = codecs.decode(message.values, max_rows=MAX_DATASET_ROWS).astype(np.float32)
            names = list(message.names) if kind == "multi_labels" else []
            if len(targets) != num_rows or (names and targets.shape[1] != len(names)):
                raise WireError(ErrorCode.BAD_LABELS, f"labels of {targets.shape} for {num_rows} rows")
            return names, [], targets
        names, indices = list(request.classes.names), list(request.classes.indices)
        if len(indices) != num_rows or len(set(indices)) < 2:
            raise WireError(ErrorCode.BAD_LABELS, f"{len(indices)} labels for {num_rows} rows, of two classes at least")
        return names, indices, None

    def job(self, tenant, job_id):
        """Return a job, or raise NOT_FOUND."""
        found = self.jobs.get((tenant, job_id))
        if found is None:
            raise WireError(ErrorCode.NOT_FOUND, f"there is no job {job_id[:80]!r}")
        return found

    def submit(self, tenant, spec):
        """Check a job and start it."""
        check_name(spec.model, "model")
        dataset, content = self.find("dataset", tenant, spec.dataset)
        if self.faults.is_old:
            spec = _known_to_old(spec)
        fake_fusion.check_job(
            messages.space_from_proto(dataset.space),
            spec.backbone,
            spec.input_size,
            bool(spec.more_backbones),
            spec.head.kind == training_pb2.HEAD_KIND_CONV,
        )
        if spec.head.kind == training_pb2.HEAD_KIND_CONV and not spec.head.tap:
            spec.head.tap = fake_backbone.CUT
        for reader in self._inputs(spec, dataset):
            if not reader.space.is_local and not reader.slices[0].endswith(".map"):
                fake_backbone.columns(reader.slices)
        job = _Job(training_pb2.Job(id=uuid.uuid4().hex, state=training_pb2.JOB_STATE_QUEUED, spec=spec))
        job.message.create_time.GetCurrentTime()
        self.jobs[tenant, job.message.id] = job
        job.add("queued")
        thread = threading.Thread(target=self._train, args=(tenant, job, dataset, content), daemon=True)
        self._threads.append(thread)
        thread.start()
        return job

    def _train(self, tenant, job, dataset, content):
        with job.changed:
            job.message.state = training_pb2.JOB_STATE_RUNNING
            job.message.start_time.GetCurrentTime()
        job.add("embed", 0.5)
        if self.faults.hold_jobs is not None:
            while not self.faults.hold_jobs.wait(0.01) and not job.cancelled.is_set():
                pass
        try:
            if job.cancelled.is_set():
                job.end(training_pb2.JOB_STATE_CANCELLED)
                return
            if self.faults.job_error is not None:
                raise self.faults.job_error
            model, head = self._fit(tenant, job, dataset, content)
            self.keep("model", tenant, model, head)
            job.end(training_pb2.JOB_STATE_SUCCEEDED, f"{model.name}@{model.version}")
        except WireError as error:
            job.end(training_pb2.JOB_STATE_FAILED, error=error)

    def _inputs(self, spec, dataset):
        spaces = [messages.space_from_proto(one.space) for one in (dataset, *dataset.more_inputs)]
        mode = "pooled" if spec.embedding == training_pb2.EMBEDDING_MODE_POOLED else "auto"
        others = [(one.backbone, one.input_size) for one in spec.more_backbones]
        tap = spec.head.tap if spec.head.kind == training_pb2.HEAD_KIND_CONV else ""
        return fake_fusion.readers(spaces, spec.backbone, spec.input_size, others, mode, spec.slices, tap)

    def _rows_of(self, tenant, ids):
        rows = [self.rows[tenant][one][1] for one in ids]
        if isinstance(rows[0], quantise.PackedRows):
            return quantise.concatenate(rows)
        return np.stack(rows) if isinstance(rows[0], np.ndarray) else rows

    def _fit(self, tenant, job, dataset, content):
        ids, indices, targets = content
        spec = job.message.spec
        inputs = self._inputs(spec, dataset)
        sources = [messages.space_from_proto(one.space).source for one in (dataset, *dataset.more_inputs)]
        stored = {source: self._rows_of(tenant, one) for source, one in zip(sources, ids, strict=True)}
        codec_of = {source: one.codec for source, one in zip(sources, (dataset, *dataset.more_inputs), strict=True)}
        # Images, which no source names, are read by every backbone that has no features of its own.
        every = {one.space.source: stored.get(one.space.source, stored.get("")) for one in inputs}
        columns, errors = fake_fusion.side_by_side(inputs, every)
        if errors:
            raise WireError(ErrorCode.CORRUPT_IMAGE, f"{len(errors)} images cannot be decoded")
        job.add("fit", 1.0, {"loss": 0.5})
        head, task, metrics = fake_backbone.fit(columns, indices, targets, dataset.class_names)
        mode = "auto" if spec.embedding == training_pb2.EMBEDDING_MODE_AUTO else ""
        described = []
        for one in inputs:
            codec = codec_of.get(one.space.source, codec_of.get(""))
            described.append(
                registry_pb2.ModelInput(
                    space=messages.space_to_proto(one.space),
                    embedding_fingerprint=one.embedding_fingerprint,
                    slices=one.slices,
                    width=one.columns(every[one.space.source])[0].shape[1],
                    codec=codec,
                    codec_error=one.codec_error(codec),
                )
            )
        first, *more = described
        model = registry_pb2.Model(
            name=spec.model,
            task=getattr(registry_pb2, f"TASK_{task.upper()}"),
            class_names=dataset.class_names,
            num_outputs=len(dataset.class_names) if targets is None else targets.shape[1],
            space=first.space,
            embedding_fingerprint=first.embedding_fingerprint,
            slices=first.slices,
            metrics=metrics,
            dataset=f"{dataset.name}@{dataset.version}",
            dataset_digest=dataset.digest,
            head_sha256="0" * 64,
            versions={"numpy": np.__version__},
            job_id=job.message.id,
            codec=first.codec,
            codec_error=first.codec_error,
            candidates=[
                registry_pb2.Candidate(slices=s, width=w, score=score)
                for s, w, score in fake_backbone.candidates(mode, 0.9)
            ],
            more_inputs=more,
            head=spec.head,
            has_outlier_scores=not self.faults.is_old and spec.head.kind != training_pb2.HEAD_KIND_CONV,
        )
        return model, (head, fake_backbone.fit_outliers(columns))
