"""A local engine for the length of one test."""

import asyncio

from trunkline_worker.engine.local import LocalEngine
from trunkline_worker.store.clock import SystemClock


def with_engine(backbone, blobs, test, *, patience_s=60, **options):
    """Start an engine, by default on one thread without ONNX Runtime, and await ``test(engine)``."""

    async def main():
        engine = LocalEngine(
            backbone,
            blobs,
            **{"clock": SystemClock(), "num_threads": 1, "use_onnx": False, "device": "cpu", **options},
        )
        await engine.start(prepare=False)
        async with asyncio.timeout(patience_s):
            try:
                await test(engine)
            finally:
                await engine.close()

    asyncio.run(main())
