"""A local engine for the length of one test."""

import asyncio

from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.engine.runtime_names import TORCH_FP32
from trunkline_worker.store.clock import SystemClock


def with_engine(backbone, blobs, test, *, patience_s=60, **options):
    """Start an engine, by default on one thread and in float32 torch, and await ``test(engine)``.

    With ``runtime=None`` it measures which runtime is the best.
    """

    async def main():
        settings = {"num_threads": 1, "use_onnx": False, "device": "cpu", "runtime": TORCH_FP32, **options}
        engine = LocalEngine(backbone, blobs, **{"clock": SystemClock(), **settings})
        await engine.start(prepare=False)
        async with asyncio.timeout(patience_s):
            try:
                await test(engine)
            finally:
                await engine.close()

    asyncio.run(main())
