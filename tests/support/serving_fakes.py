"""A gateway without Ray: the real server, servicers and store, over an engine that computes on pixels."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.quantise import CODECS, PackedRows, codec_of, row_bytes, unpack
from trunkline_wire.specs import (
    FLOAT32,
    INPUT_CUT,
    INT8,
    BackboneSpec,
    CodecCost,
    CodecUse,
    CutCost,
    CutSpec,
    FeatureSpace,
    Preprocessing,
    RuntimeResult,
    RuntimeSpeed,
    SliceSpec,
    StemCost,
    Timings,
    Tuning,
    codec_label,
    embedding_fingerprint,
    feature_fingerprint,
    int8_fingerprint,
)
from trunkline_worker.engine.api import EngineStats, Extraction, Prediction, StemFile
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.budget import ByteBudget
from trunkline_worker.serving.gateway import GatewayServer, Listener
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.database import Database
from trunkline_worker.store.metadata import MetadataStore

TOKEN = "a-token-of-the-tests-0123"
OTHER_TOKEN = "another-tenants-token-4567"
READER_TOKEN = "a-readers-token-89012345"
STEM = b"onnx" * 600_000  # more than one chunk
CODEC_ERRORS = {"float16": 0.0005, "bfloat16": 0.003, "int8": 0.01, "int4": 0.2}
"""What a codec does to the fake backbone's embedding, so it says."""

INT8_STEM_ERROR = 0.02
CLASS_NAMES = ("tench", "goldfish")


class LocalMetadata:
    """``Metadata`` over a store in this process."""

    def __init__(self, store):
        self.store = store
        self.away = False
        self._executor = ThreadPoolExecutor(1)

    async def call(self, name, *args, timeout_s=None):
        if self.away:
            raise WireError(ErrorCode.UNAVAILABLE, "the controller is away", retry_delay_s=1.0)
        area, _, method = name.partition(".")
        function = getattr(getattr(self.store, area), method)
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def wait_for_events(self, tenant, job_id, after_seq, timeout_s):
        return await self.call("jobs.events", tenant, job_id, after_seq, 100)


def fake_spec(input_size=8):
    """Describe a backbone whose embedding is the mean of each channel."""
    preprocessing = Preprocessing(input_size, 1.0, "nearest", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    mid = feature_fingerprint("w", "mid", preprocessing)
    cuts = (
        CutSpec(
            "input",
            (input_size, input_size, 3),
            feature_fingerprint("w", "input", preprocessing),
            ("a", "pooled"),
            channel_axis=2,
        ),
        CutSpec("mid", (3, 2, 2), mid, ("pooled",), is_stage=True, int8_fingerprint=int8_fingerprint(mid, "c")),
    )
    return BackboneSpec(
        name="fake",
        pretrained=True,
        weights="none",
        weights_sha256="w",
        num_parameters=0,
        preprocessing=preprocessing,
        resizable=True,
        cuts=cuts,
        slices=(SliceSpec("a", 0, 3), SliceSpec("pooled", 3, 6)),
        embedding_fingerprint=embedding_fingerprint("w", preprocessing),
        class_names=CLASS_NAMES,
    )


def fake_cost(cut):
    """Say what codecs and stems cost at the cut `mid`."""
    return CutCost(
        cut=cut,
        codecs=tuple(
            CodecCost(codec, row_bytes(cut.feature_shape, codec, cut.channel_axis), CODEC_ERRORS.get(codec, 0.0))
            for codec in CODECS
        ),
        stems=(StemCost(FLOAT32, len(STEM), 0.0), StemCost(INT8, len(STEM), INT8_STEM_ERROR)),
        jpeg_bytes_per_row=300.0,
        sample="made up",
    )


def fake_tuning(cut, input_size):
    """Say how a runtime was chosen."""
    return Tuning(
        backbone="fake",
        cut=cut,
        input_size=input_size,
        device="cpu",
        num_threads=2,
        runtimes=(
            RuntimeResult("torch-fp32", 0.0, (RuntimeSpeed(1, 10.0), RuntimeSpeed(8, 20.0)), 0.5),
            RuntimeResult("openvino-fp32", 1e-6, (RuntimeSpeed(1, 39.5), RuntimeSpeed(8, 40.0)), 1.5),
            RuntimeResult("torch-bf16", 0.5, (), 0.25, "its embedding differs"),
        ),
        chosen="openvino-fp32",
        batch_rows=1,
        libraries=(("openvino", "1"), ("torch", "2")),
    )


def fake_use(space, rows, spec=None):
    """Say how rows were made and sent, as an engine of that backbone, `fake` by default, does."""
    if space.is_local:
        return CodecUse(codec_of(rows), 0.0)
    spec = spec or fake_spec(space.input_size or 8)
    cut = spec.cut(space.cut)
    precision = cut.precision_in(space) if space.backbone else FLOAT32
    error = CODEC_ERRORS.get(codec_of(rows), 0.0) + (INT8_STEM_ERROR if precision == INT8 else 0.0)
    return CodecUse(codec_label(codec_of(rows), precision), error)


def unreadable(backbone):
    """Return an encoded image that the engine of that name cannot read, and others can."""
    return f"not for {backbone}".encode()


class FakeEngine:
    """An ``Engine``: rows of 255 fail, a row of 254 raises what is no caller's business. ``gate`` holds calls back.

    The embedding of an encoded image is its number of bytes.
    """

    def __init__(self, blobs, name="fake"):
        self.blobs = blobs
        self.name = name
        self.gate = None
        self.calls = 0
        self.running = 0
        self.most_running = 0
        self.overloaded = False
        self.started = threading.Event()
        self.costs_asked = []
        self.last_rows = None
        self.last_more = None
        self.callers = set()
        self.tunings_asked = []

    async def describe(self, input_size=0):
        return replace(fake_spec(input_size or 8), name=self.name)

    async def stem(self, cut, input_size=0, precision=FLOAT32):
        import hashlib

        spec = fake_spec(input_size or 8)
        found = spec.cut(cut)
        if found is None:
            raise WireError(ErrorCode.NOT_FOUND, f"no cut {cut!r}")
        if precision not in (FLOAT32, INT8):
            raise WireError(ErrorCode.UNSUPPORTED, f"no stem of precision {precision!r}; there are float32, int8")
        path = f"stems/{precision}.onnx"
        self.blobs.put(path, STEM)
        return StemFile(
            spec.space(found, precision),
            spec.preprocessing,
            found.feature_shape,
            path,
            len(STEM),
            hashlib.sha256(STEM).hexdigest(),
            precision,
            INT8_STEM_ERROR if precision == INT8 else 0.0,
        )

    async def cut_cost(self, cut, input_size=0):
        self.costs_asked.append((cut, input_size))
        found = fake_spec(input_size or 8).cut(cut)
        if found is None or cut == INPUT_CUT:
            raise WireError(ErrorCode.NOT_FOUND, f"no cut {cut!r}; there is mid")
        return fake_cost(found)

    async def tune(self, cut="", input_size=0, again=False):
        self.tunings_asked.append((cut, input_size, again))
        found = fake_spec(input_size or 8).cut(cut or INPUT_CUT)
        if found is None:
            raise WireError(ErrorCode.NOT_FOUND, f"no cut {cut!r}; there is mid")
        return replace(fake_tuning(found.name, input_size or 8), backbone=self.name)

    async def predict(self, space, rows, model, *, more_BE=None, outliers=False, timeout_s=None, caller="", wait=False):
        extraction = await self.extract(space, rows, timeout_s=timeout_s, caller=caller, wait=wait)
        self.last_more = more_BE
        outputs = np.tile(np.float32([0.25, 0.75]), (len(rows), 1))
        found = np.stack([np.arange(len(rows)), np.full(len(rows), 0.5)], axis=1).astype(np.float32)
        for row in extraction.row_errors:
            outputs[row] = found[row] = np.nan
        use = replace(extraction.codec_use, trained_codec=model.codec, trained_error=model.codec_error)
        return Prediction(outputs, extraction.row_errors, extraction.timings, use, found if outliers else None)

    async def extract(self, space, rows, slices=(), *, timeout_s=None, caller="", wait=False):
        self.calls += 1
        self.callers.add(caller)
        self.last_rows = rows
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.started.set()
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.overloaded:
                raise WireError(ErrorCode.OVERLOADED, "full", retry_delay_s=0.25)
            errors = {}
            embedding = np.zeros((len(rows), 6), np.float32)
            if isinstance(rows, np.ndarray):
                flat = rows.reshape(len(rows), -1)
                if (flat == 254).all(axis=1).any():
                    raise RuntimeError("secret path /var/secret and a traceback")
                for row in np.flatnonzero((flat == 255).all(axis=1)):
                    errors[int(row)] = WireError(ErrorCode.CORRUPT_IMAGE, "white")
                    embedding[row] = np.nan
            if isinstance(rows, PackedRows):
                embedding[:, :3] = unpack(rows).mean(axis=(2, 3))
            if isinstance(rows, list):
                embedding[:] = [[len(row)] for row in rows]
                for row in [number for number, one in enumerate(rows) if one == unreadable(self.name)]:
                    errors[row] = WireError(ErrorCode.CORRUPT_IMAGE, f"{self.name} cannot read it")
                    embedding[row] = np.nan
            chosen = [one for one in fake_spec().slices if one.name in slices] or fake_spec().slices
            embedding = np.concatenate([embedding[:, one.start : one.stop] for one in chosen], axis=1)
            return Extraction(embedding, tuple(chosen), errors, Timings(total_s=0.5), fake_use(space, rows))
        finally:
            self.running -= 1

    async def stats(self):
        return EngineStats(self.calls, 0, 0, 0)


class GatewayThread:
    """The server on an event loop in a thread of its own."""

    def __init__(self, folder, backbones=("fake",), *, endpoints=None, **listener):
        self.folder = folder
        tokens = folder / "tokens"
        tokens.write_text(f"{TOKEN}\n{OTHER_TOKEN} other\n{READER_TOKEN} default reader\n")
        self.blobs = BlobStore(f"file://{folder}/data")
        self.store = MetadataStore(Database(f"sqlite:///{folder}/metadata.sqlite"))
        self.metadata = LocalMetadata(self.store)
        self.engines = {name: FakeEngine(self.blobs, name) for name in backbones}
        self.engine = next(iter(self.engines.values()))
        self.budget = ByteBudget()
        listener = {"port": 0, "token_file": str(tokens), **listener}
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

        async def start():
            versions = {"numpy": np.__version__}
            backends = Backends(self.engines, self.metadata, self.blobs, versions, endpoints=endpoints)
            self.server = GatewayServer(Listener(**listener), backends, budget=self.budget)
            return await self.server.start()

        self.port = self.run(start())
        self.address = f"{listener.get('host', '127.0.0.1')}:{self.port}"

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def close(self):
        self.run(self.server.stop(2.0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(60)
        self.loop.close()


def images_space(spec=None, cut="input"):
    spec = spec or fake_spec()
    return spec.space(spec.cut(cut))


UNKNOWN_SPACE = FeatureSpace("nobody", "input", 8, "0" * 64)
