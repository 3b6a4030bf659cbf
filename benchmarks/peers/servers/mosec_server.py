"""mosec, as its documents advise: one stage with dynamic batching.

``max_batch_size`` above 1 turns batching on, ``max_wait_time`` is in milliseconds
(https://mosecorg.github.io/mosec/reference/interface.html); its own examples use the default wait of 10 ms. ``num`` is
1: one instance of the model. ``deserialize`` and ``serialize`` are overridden to take and give raw bytes, as its
documents show (https://mosecorg.github.io/mosec/examples/pytorch.html). The limit of 3 s for a request is raised:
callers that send 32 rows at a time wait longer for an eager network.
"""

import os

import numpy as np
from model import BATCH_WAIT_S, CALL_TIMEOUT_S, MAX_BATCH_ROWS, images_of, joined, port, served, served_shape
from mosec import Server, Worker


class Pictures(Worker):
    """Pictures to probabilities."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        """Load the model, in the worker."""
        super().__init__()
        self._model = served()
        self._shape = served_shape()

    def deserialize(self, data: bytes) -> np.ndarray:
        """Return the pictures of one request."""
        return images_of(data, self._shape)

    def forward(self, data: list[np.ndarray]) -> list[np.ndarray]:
        """Run the requests of a batch as one."""
        return joined(data, self._model)

    def serialize(self, data: np.ndarray) -> bytes:
        """Return the probabilities' bytes."""
        return np.ascontiguousarray(data).tobytes()


if __name__ == "__main__":
    os.environ |= {
        "MOSEC_ADDRESS": "127.0.0.1",
        "MOSEC_PORT": str(port()),
        "MOSEC_TIMEOUT": str(int(CALL_TIMEOUT_S * 1000)),
        "MOSEC_LOG_LEVEL": "warning",
    }
    server = Server()
    server.append_worker(Pictures, num=1, max_batch_size=MAX_BATCH_ROWS, max_wait_time=int(BATCH_WAIT_S * 1000))
    server.run()
