"""LitServe, as its documents advise.

Batching is on (https://lightning.ai/docs/litserve/features/batching): ``max_batch_size`` and a small ``batch_timeout``,
with ``batch`` and ``unbatch`` of one's own, since a request may hold several pictures. ``workers_per_device`` is 1, its
default: one instance of the model has all the threads. Bodies are raw bytes: LitServe parses a body as JSON unless
``decode_request`` says what it takes, which FastAPI then honours. No ``from __future__ import annotations`` here:
LitServe reads the annotation itself.
"""

from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body, Response
from model import BATCH_WAIT_S, CALL_TIMEOUT_S, MAX_BATCH_ROWS, images_of, joined, port, served, served_shape


class Pictures(litserve.LitAPI):
    """Pictures to probabilities."""

    def setup(self, device: str) -> None:
        """Load the model, in the worker."""
        self.model = served()
        self.shape = served_shape()

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> Any:
        """Return the pictures of one request."""
        return images_of(request, self.shape)

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Leave the requests apart: ``predict`` joins them."""
        return inputs

    def predict(self, x: list[Any]) -> list[Any]:
        """Run them as one batch."""
        return joined(x, self.model)

    def unbatch(self, output: list[Any]) -> list[Any]:
        """Return one answer for each request."""
        return output

    def encode_response(self, output: Any) -> Response:
        """Return the probabilities' bytes."""
        return Response(np.ascontiguousarray(output).tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    api = Pictures(max_batch_size=MAX_BATCH_ROWS, batch_timeout=BATCH_WAIT_S)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, timeout=CALL_TIMEOUT_S)
    server.run(host="127.0.0.1", port=port(), num_api_servers=1, log_level="warning", generate_client_file=False)
