"""The real gateway, servicers and store, without Ray: over the fake backbone, with a lane on a thread."""

import asyncio
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import fake_backbone
import numpy as np
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.rows import content_digest
from trunkline_wire.specs import FLOAT32
from trunkline_worker.engine.api import EngineStats, Extraction, Prediction, StemFile
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.gateway import GatewayServer, Listener
from trunkline_worker.store import chunks
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.database import Database
from trunkline_worker.store.metadata import MetadataStore
from trunkline_worker.store.records import Candidate, Event, ModelRecord

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


class _Engine:
    """The fake backbone as an engine. ``heads`` are kept by the lane, by digest."""

    def __init__(self, blobs, heads):
        self.blobs, self.heads = blobs, heads

    async def describe(self, input_size=0):
        return fake_backbone.spec(input_size)

    async def stem(self, cut, input_size=0, precision=FLOAT32):
        made = fake_backbone.stem(cut, input_size, precision)
        digest = hashlib.sha256(made.data).hexdigest()
        self.blobs.put(f"stems/{digest}.onnx", made.data)
        return StemFile(
            made.space,
            fake_backbone.spec(input_size).preprocessing,
            made.cut.feature_shape,
            f"stems/{digest}.onnx",
            len(made.data),
            digest,
            precision,
            made.embedding_error,
        )

    async def cut_cost(self, cut, input_size=0):
        return fake_backbone.cost(cut, input_size)

    async def predict(self, space, rows, model, *, timeout_s=None):
        embedding, errors = fake_backbone.embed(space, rows)
        use = fake_backbone.check_use(space, rows, model.codec, model.codec_error)
        outputs = self.heads[model.head_sha256](embedding[:, fake_backbone.columns(model.slices)[0]])
        outputs[list(errors)] = np.nan
        return Prediction(outputs.astype(np.float32), errors, codec_use=use)

    async def extract(self, space, rows, slices=(), *, timeout_s=None):
        embedding, errors = fake_backbone.embed(space, rows)
        columns, found = fake_backbone.columns(slices)
        use = fake_backbone.use(space, fake_backbone.label(space, rows))
        return Extraction(np.ascontiguousarray(embedding[:, columns]), found, errors, codec_use=use)

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
        self._thread.join(10)

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

    def _fit(self, job):
        spec = job.spec
        store = self._metadata.store
        content = self._metadata.executor.submit(store.datasets.rows, job.tenant, spec.dataset).result(10)
        located = self._metadata.executor.submit(store.rows.locate, job.tenant, content.row_ids).result(10)
        rows = chunks.read_rows(self._blobs, located)
        space = content.record.space
        if not space.backbone:
            described = fake_backbone.spec(spec.input_size)
            space = described.space(described.cut("input"))
        embedding, errors = fake_backbone.embed(space, rows)
        if errors:
            raise WireError(ErrorCode.CORRUPT_IMAGE, f"{len(errors)} images cannot be decoded")
        slices = spec.slices or (("pooled",) if spec.embedding == "pooled" else ("grid",))
        x = embedding[:, fake_backbone.columns(slices)[0]]
        head, metrics = fake_backbone.fit(x, content.class_indices, content.targets, len(content.record.class_names))
        digest = hashlib.sha256(content_digest(x) + spec.model.encode()).hexdigest()
        self._heads[digest] = head
        return ModelRecord(
            tenant=job.tenant,
            name=spec.model,
            version=0,
            task="regression" if content.targets is not None else "classification",
            class_names=content.record.class_names,
            num_outputs=content.record.num_targets or len(content.record.class_names),
            space=space,
            embedding_fingerprint=fake_backbone.spec(space.input_size).embedding_fingerprint,
            slices=tuple(slices),
            metrics=metrics,
            dataset=f"{content.record.name}@{content.record.version}",
            dataset_digest=content.record.digest,
            head_sha256=digest,
            versions={"numpy": np.__version__},
            job_id=job.id,
            create_time=0.0,
            codec=content.record.codec,
            codec_error=fake_backbone.use(space, content.record.codec).embedding_error,
            candidates=tuple(
                Candidate(names, width, score, None)
                for names, width, score in fake_backbone.candidates(spec.embedding, 0.9)
            ),
        )


class Gateway:
    """The server on an event loop of its own. A context manager."""

    def __init__(self, folder):
        """Keep the folder of its state."""
        self._folder = folder
        self.token = TOKEN

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
            backends = Backends(
                {fake_backbone.NAME: _Engine(blobs, heads)}, self._metadata, blobs, {"numpy": np.__version__}
            )
            self._server = GatewayServer(Listener(port=0, token_file=str(tokens)), backends)
            return await self._server.start()

        self.address = f"127.0.0.1:{self._await(start())}"
        self._lane = _Lane(self._metadata, blobs, heads)
        return self

    def __exit__(self, *_):
        """Stop."""
        self._lane.close()
        self._await(self._server.stop(1.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self._metadata.executor.shutdown()
        self._database.close()

    def _await(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)
