"""MLServer, as its documents advise: a custom runtime with adaptive batching, asked over gRPC.

Adaptive batching needs ``max_batch_size`` and ``max_batch_time`` above 0
(https://docs.seldon.ai/mlserver/user-guide/adaptive-batching). ``parallel_workers`` stays at its default of 1:
inference runs in a process of its own (https://docs.seldon.ai/mlserver/user-guide/parallel-inference). Rows travel as
``raw_input_contents`` of type BYTES, one element a row: elements of type UINT8 would be unpacked into a list of Python
numbers, 150,528 for one picture of 224 pixels (https://github.com/SeldonIO/MLServer/issues/926).
"""

import json
import os
from pathlib import Path

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from model import BATCH_WAIT_S, MAX_BATCH_ROWS, images_of, served, served_shape

NAME = "pictures"


class Pictures(MLModel):
    """Pictures to probabilities."""

    async def load(self) -> bool:
        """Load the model, in the worker."""
        self._model = served()
        self._shape = served_shape()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Run one batch."""
        rows = getattr(payload.inputs[0].data, "root", payload.inputs[0].data)
        images_BHWC = images_of(b"".join(rows), self._shape)
        outputs_BK = np.ascontiguousarray(self._model(images_BHWC))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("probabilities", outputs_BK)])


def write_settings(folder: Path, ports: tuple[int, int, int]) -> None:
    """Write the files that ``mlserver start FOLDER`` reads; ports are those of gRPC, HTTP and the metrics."""
    grpc_port, http_port, metrics_port = ports
    settings = {
        "host": "127.0.0.1",
        "grpc_port": grpc_port,
        "http_port": http_port,
        "metrics_port": metrics_port,
        "grpc_max_message_length": 64 * 2**20,
        "debug": False,
    }
    model = {
        "name": NAME,
        "implementation": "mlserver_runtime.Pictures",
        "max_batch_size": MAX_BATCH_ROWS,
        "max_batch_time": BATCH_WAIT_S,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))


if __name__ == "__main__":
    import socket
    import sys

    from mlserver.cli.main import main
    from model import port

    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        free = one.getsockname()[1], other.getsockname()[1]
    # The class must come from a module that the worker process can import by its name.
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    write_settings(Path.cwd(), (port(), *free))
    sys.argv = ["mlserver", "start", "."]
    main()
