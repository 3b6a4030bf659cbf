"""The real gateway, servicers and store, without Ray: over the fake backbone, with a lane on a thread."""

import asyncio
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import fake_backbone
import fake_fusion
import numpy as np
from trunkline_wire import quantise
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.rows import content_digest
from trunkline_wire.specs import FLOAT32, CodecUse
from trunkline_worker.engine.api import EngineStats, Extraction, Prediction, StemFile
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.budget import ByteBudget
from trunkline_worker.serving.gateway import GatewayServer, Listener
from trunkline_worker.store import chunks
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.database import Database
from trunkline_worker.store.metadata import MetadataStore
from trunkline_worker.store.records import Candidate, DatasetSource, Event, ModelInput, ModelRecord

TOKEN = "the-token-of-the-tests-0123456789"


class _Metadata:
    """The store behind one thread, as in the controller."""

    def __init__(self, store):
        self.store = store
        self.executor = ThreadPoolExecutor(1)

    async def call(self, name, *args, timeout_s=None):
        area, _, method = name.partition(".")
        function = getattr(getattr(self.store, area), method)
        return await asyncio.get_running_loop().run_in_executor(self.executor, function, *args)

    async def wait_for_events(self, tenant, job_id, after_seq, timeout_s):
        end = asyncio.get_running_loop().time() + timeout_s
        while True:
            events = await self.call("jobs.events", tenant, job_id, after_seq, 100)
            if events or asyncio.get_running_loop().time() >= end:
                return events
            await asyncio.sleep(0.01)


class FakeEngine:
    """A fake backbone as an engine. ``heads`` are kept by the lane, by digest."""

    def __init__(self, name, blobs, heads):
        self.name, self.blobs, self.heads = name, blobs, heads

    async def describe(self, input_size=0):
        return fake_backbone.spec(input_size, self.name)

    async def stem(self, cut, input_size=0, precision=FLOAT32):
        made = fake_backbone.stem(cut, input_size, precision, self.name)
        digest = hashlib.sha256(made.data).hexdigest()
        self.blobs.put(f"stems/{digest}.onnx", made.data)
        return StemFile(
            made.space,
            fake_backbone.spec(input_size, self.name).preprocessing,
            made.cut.feature_shape,
            f"stems/{digest}.onnx",
            len(made.data),
            digest,
            precision,
            made.embedding_error,
        )

    async def cut_cost(self, cut, input_size=0):
        return fake_backbone.cost(cut, input_size, self.name)

    async def tune(self, cut="", input_size=0, again=False):
        return fake_backbone.tuning(cut, input_size, again, self.name)

    async def predict(self, space, rows, model, *, more_BE=None, outliers=False, timeout_s=None, caller="", wait=False):
        if space.is_local:
            fake_fusion.check_local_use(model.space, model.codec, space, rows)
            use = CodecUse(quantise.codec_of(rows), 0.0, model.codec, 0.0)
        else:
            fake_fusion.check_own_use(model.space, model.codec, space, rows)
            use = fake_backbone.check_use(space, rows, model.codec, model.codec_error)
        columns_BD, errors = fake_fusion.Reader(space, model.slices).columns(rows)
        if more_BE is not None:
            columns_BD = np.concatenate([columns_BD, more_BE], axis=1)
        outputs = np.array(self.heads[model.head_sha256](columns_BD), np.float32)
        outputs[list(errors)] = np.nan
        found = None
        if outliers:
            found = self.heads[model.outliers_sha256](columns_BD)
            found[list(errors)] = np.nan
        return Prediction(outputs, errors, codec_use=use, outliers_B2=found)

    async def extract(self, space, rows, slices=(), *, timeout_s=None, caller="", wait=False):
        embedding, found, errors = fake_backbone.embed(space, rows, slices)
        use = fake_backbone.use(space, fake_backbone.label(space, rows))
        return Extraction(embedding, found, errors, codec_use=use)

    async def stats(self):
        return EngineStats(0, 0, 0, 0)


class _Lane:
    """Leases jobs and trains them, until it is told to stop."""

    def __init__(self, metadata, blobs, heads):
        self._metadata, self._blobs, self._heads = metadata, blobs, heads
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self):
        self._stop.set()
        self._thread.join(60)

    def _do(self, method, *args):
        """Use the store on its own thread, like everyone."""
        return self._metadata.executor.submit(getattr(self._metadata.store.jobs, method), *args).result(10)

    def _run(self):
        while not self._stop.wait(0.01):
            lease = self._do("lease", "lane", 60.0)
            if lease is not None:
                self._train(lease.job, lease.fence)

    def _train(self, job, fence):
        try:
            if self._do("renew", job.id, fence, 60.0):
                self._do("mark_cancelled", job.id, fence)
                return
            self._do("append_events", job.id, fence, [Event("fit", 1.0, {"loss": 0.5})])
            self._do("succeed", job.id, fence, self._fit(job))
        except WireError as error:
            self._do("fail", job.id, fence, error.code, error.message)

    def _rows(self, tenant, ids):
        located = self._metadata.executor.submit(self._metadata.store.rows.locate, tenant, ids).result(10)
        return chunks.read_rows(self._blobs, located)

    def _fit(self, job):
        spec = job.spec
        content = self._metadata.executor.submit(self._metadata.store.datasets.rows, job.tenant, spec.dataset).result(
            10
        )
        record = content.record
        sources = [DatasetSource(record.space, record.codec), *record.more_inputs]
        inputs = fake_fusion.readers(
            [one.space for one in sources],
            spec.backbone,
            spec.input_size,
            [(one.backbone, one.input_size) for one in spec.more_backbones],
            spec.embedding,
            () if spec.head.kind == "conv" else spec.slices,
            spec.head.tap,
        )
        ids = [content.row_ids, *content.more_row_ids]
        stored = {one.space.source: self._rows(job.tenant, rows) for one, rows in zip(sources, ids, strict=True)}
        codec_of = {one.space.source: one.codec for one in sources}
        every = {one.space.source: stored.get(one.space.source, stored.get("")) for one in inputs}
        columns_BD, errors = fake_fusion.side_by_side(inputs, every)
        if errors:
            raise WireError(ErrorCode.CORRUPT_IMAGE, f"{len(errors)} images cannot be decoded")
        head, task, metrics = fake_backbone.fit(columns_BD, content.class_indices, content.targets, record.class_names)
        digest = hashlib.sha256(content_digest(columns_BD) + spec.model.encode()).hexdigest()
        self._heads[digest] = head
        outliers = "" if spec.head.kind == "conv" else f"{digest}/outliers"
        self._heads[outliers] = fake_backbone.fit_outliers(columns_BD)
        described = []
        for one in inputs:
            codec = codec_of.get(one.space.source, codec_of.get(""))
            width = one.columns(every[one.space.source])[0].shape[1]
            described.append(
                ModelInput(one.space, one.embedding_fingerprint, one.slices, width, codec, one.codec_error(codec))
            )
        first, *more = described
        return ModelRecord(
            tenant=job.tenant,
            name=spec.model,
            version=0,
            task=task,
            class_names=record.class_names,
            num_outputs=record.num_targets or len(record.class_names),
            space=first.space,
            embedding_fingerprint=first.embedding_fingerprint,
            slices=first.slices,
            metrics=metrics,
            dataset=f"{record.name}@{record.version}",
            dataset_digest=record.digest,
            head_sha256=digest,
            versions={"numpy": np.__version__},
            job_id=job.id,
            create_time=0.0,
            codec=first.codec,
            codec_error=first.codec_error,
            candidates=tuple(
                Candidate(names, width, score, None)
                for names, width, score in fake_backbone.candidates(spec.embedding, 0.9)
            ),
            more_inputs=tuple(more),
            head=spec.head,
            outliers_sha256=outliers,
        )


class Gateway:
    """The server on an event loop of its own. A context manager."""

    def __init__(self, folder, make_engine=FakeEngine):
        """Keep the folder of its state, and what makes an engine from name, storage and heads."""
        self._folder = folder
        self._make_engine = make_engine
        self.token = TOKEN
        self.budget = ByteBudget()

    def __enter__(self):
        """Start."""
        tokens = self._folder / "tokens"
        tokens.write_text(f"{TOKEN}\n")
        tokens.chmod(0o600)
        blobs = BlobStore(f"file://{self._folder}/data")
        self._database = Database(f"sqlite:///{self._folder}/metadata.sqlite")
        self._metadata = _Metadata(MetadataStore(self._database))
        heads = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def start():
            self.engines = {name: self._make_engine(name, blobs, heads) for name in fake_backbone.NAMES}
            backends = Backends(self.engines, self._metadata, blobs, {"numpy": np.__version__})
            self._server = GatewayServer(Listener(port=0, token_file=str(tokens)), backends, budget=self.budget)
            return await self._server.start()

        self.address = f"127.0.0.1:{self.run(start())}"
        self._lane = _Lane(self._metadata, blobs, heads)
        return self

    def __exit__(self, *_):
        """Stop."""
        self._lane.close()
        self.run(self._server.stop(1.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()
        self._metadata.executor.shutdown()
        self._database.close()

    def run(self, coroutine):
        """Run on the server's event loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)
