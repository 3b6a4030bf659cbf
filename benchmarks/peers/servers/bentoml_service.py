"""BentoML, as its documents advise: one service with a batchable API.

Adaptive batching (https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html) chooses batch and wait itself;
``max_latency_ms`` is no wait but the time after which it answers 503, and stays at its default of 60 s. ``workers`` and
``threads`` stay at 1: one instance of the model. A body is raw bytes: the main server refuses BentoML's own binary
format from outside, and takes arrays as JSON numbers, so the input has a pydantic type of its own that reads the body
(https://docs.bentoml.com/en/latest/build-with-bentoml/iotypes.html, root input and pydantic types).
"""

from typing import Annotated, Any

import bentoml
import numpy as np
from model import CALL_TIMEOUT_S, MAX_BATCH_ROWS, images_of, served, served_shape
from pydantic_core import core_schema


class RawPictures:
    """Reads pictures from the bytes of a body."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Decode, with no other check than the size."""
        shape = served_shape()

        def decode(body: Any) -> Any:
            return body if isinstance(body, np.ndarray) else images_of(body, shape)

        return core_schema.no_info_plain_validator_function(decode)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        """Say that the body is a file: BentoML hands its bytes over as they are."""
        return {"type": "file", "format": "binary", "content_type": "application/octet-stream"}


@bentoml.service(workers=1, threads=1, traffic={"timeout": CALL_TIMEOUT_S})
class Pictures:
    """Pictures to probabilities."""

    def __init__(self) -> None:
        """Load the model."""
        self.model = served()

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=MAX_BATCH_ROWS)
    def predict(self, images: Annotated[Any, RawPictures()], /) -> np.ndarray:
        """Run one batch."""
        return self.model(images)
