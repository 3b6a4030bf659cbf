"""What one writes by hand: a ``grpc.aio`` server around the model, one call at a time, no batching.

The model runs in a thread of its own, so that the event loop goes on reading; messages are raw bytes.
"""

import asyncio
import concurrent.futures
import signal

import grpc
import numpy as np
from model import images_of, port, served, served_shape

METHOD = "/peers.Pictures/Predict"


async def main() -> None:
    model, shape = served(), served_shape()
    thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)

    async def predict(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        images_BHWC = images_of(request, shape)
        outputs_BK = await asyncio.get_running_loop().run_in_executor(thread, model, images_BHWC)
        return np.ascontiguousarray(outputs_BK).tobytes()

    service, method = METHOD[1:].split("/")
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 * 2**20)])
    # Without serialisers messages stay bytes.
    handlers = {method: grpc.unary_unary_rpc_method_handler(predict)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port()}")
    await server.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
