"""A gateway without Ray over a real engine in this process: what a client that trains through the trunk meets."""

import asyncio
import threading

import trunkline
from serving_fakes import OTHER_TOKEN, READER_TOKEN, TOKEN, LocalMetadata
from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.engine.runtime_names import TORCH_FP32
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.budget import ByteBudget
from trunkline_worker.serving.gateway import GatewayServer, Listener
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.clock import SystemClock
from trunkline_worker.store.database import Database
from trunkline_worker.store.metadata import MetadataStore


class TrunkGateway:
    """The server on an event loop in a thread of its own. ``restart`` ends it and starts it again on the same port."""

    def __init__(self, folder, backbones, **options):
        self.folder = folder
        (folder / "tokens").write_text(f"{TOKEN}\n{OTHER_TOKEN} other\n{READER_TOKEN} default reader\n")
        self.blobs = BlobStore(f"file://{folder}/data")
        self.store = MetadataStore(Database(f"sqlite:///{folder}/metadata.sqlite"))
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

        async def start():
            settings = {"clock": SystemClock(), "num_threads": 1, "device": "cpu", "runtime": TORCH_FP32, **options}
            self.engines = {one.name: LocalEngine(one, self.blobs, **settings) for one in backbones}
            for engine in self.engines.values():
                await engine.start(prepare=False)

        self.run(start())
        self.backends = Backends(self.engines, LocalMetadata(self.store), self.blobs)
        self.budget = ByteBudget()
        self.port = 0
        self.serve()

    def serve(self):
        async def start():
            listener = Listener(port=self.port, token_file=str(self.folder / "tokens"))
            self.server = GatewayServer(listener, self.backends, budget=self.budget)
            return await self.server.start()

        self.port = self.run(start())

    def restart(self):
        self.run(self.server.stop(0.0))
        self.serve()

    def connect(self, token=TOKEN):
        return trunkline.connect(f"127.0.0.1:{self.port}", token=token)

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def close(self):
        async def stop():
            await self.server.stop(1.0)
            for engine in self.engines.values():
                await engine.close()

        self.run(stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(60)
        self.loop.close()
