"""Ray Serve alone, over HTTP, as its documents advise.

``@serve.batch`` with ``max_batch_size`` and the default wait of 10 ms, and ``max_ongoing_requests`` above the batch, or
it never fills (https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html). What blocks runs in a thread
(https://docs.ray.io/en/latest/serve/advanced-guides/asyncio-best-practices.html), and the replica reserves the cores
that the model uses (https://docs.ray.io/en/latest/serve/advanced-guides/performance.html).
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

import numpy as np
import ray
from model import BATCH_WAIT_S, MAX_BATCH_ROWS, THREADS_VARIABLE, images_of, joined, port, served, served_shape
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

THREADS = int(os.environ[THREADS_VARIABLE])


@serve.deployment(num_replicas=1, max_ongoing_requests=8 * MAX_BATCH_ROWS, ray_actor_options={"num_cpus": THREADS})
class Pictures:
    """Pictures to probabilities."""

    def __init__(self) -> None:
        """Load the model, in the replica."""
        self._model = served()
        self._shape = served_shape()

    @serve.batch(max_batch_size=MAX_BATCH_ROWS, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _run(self, requests: list[np.ndarray]) -> list[np.ndarray]:
        return await asyncio.to_thread(joined, requests, self._model)

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        outputs_BK = await self._run(images_of(await request.body(), self._shape))
        return Response(np.ascontiguousarray(outputs_BK).tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    # Paths of Ray's sockets must be short, so not the server's own folder.
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        _temp_dir=sys.argv[1],
        runtime_env={
            "env_vars": {"PYTHONPATH": f"{Path(__file__).parent.parent}{os.pathsep}{os.environ['PYTHONPATH']}"}
        },
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port()})
    serve.run(Pictures.bind(), name="pictures", route_prefix="/predict")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
