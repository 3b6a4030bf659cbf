"""How each contestant is called. A target holds its connection; requests are encoded before the clock runs.

Trunkline is called like the others, with a bare gRPC stub; and once more by its own client, as users do.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import model as peer_model
import numpy as np
import numpy.typing as npt

# Shape suffix legend: B = rows, H = height, W = width, K = classes

HTTP, OIP, RAW_GRPC = "http", "oip", "grpc"
GATEWAY, DIRECT, SDK = "gateway", "direct", "sdk"
IN_PROCESS = "in-process"

PREDICT = "/trunkline_wire.v1.InferenceService/Predict"

_SDK_THREADS = 64
_CONNECTIONS = 4
_MESSAGE_BYTES = 64 * 2**20
_GRPC_OPTIONS = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


class NotThere(Exception):
    """The contestant cannot take part; the text says why."""


class Target(Protocol):
    """One contestant, connected."""

    def encode(self, images_BHWC: npt.NDArray[np.uint8]) -> Any:
        """Return what is sent for some pictures."""

    async def call(self, request: Any) -> Any:
        """Send it, and return the answer as it came."""

    def decode(self, answer: Any) -> npt.NDArray[np.float32]:
        """Return the probabilities in an answer, (B, K)."""

    async def close(self) -> None:
        """Let go of the connection."""


class HttpTarget:
    """A peer that takes pictures as the raw bytes of a body."""

    def __init__(self, url: str) -> None:
        """Connect when the first call is made."""
        import aiohttp

        self._url = url
        self._errors = aiohttp.ClientResponseError
        # As many connections as there are calls: the limit of callers is the load's.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=600),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Content-Type": "application/octet-stream"},
            skip_auto_headers=("Accept-Encoding",),
        )

    def encode(self, images_BHWC: npt.NDArray[np.uint8]) -> Any:
        """Return the pictures' bytes."""
        return images_BHWC.tobytes()

    async def call(self, request: Any) -> Any:
        """POST a body; the answer is that of the server and its content type."""
        async with self._session.post(self._url, data=request) as response:
            body = await response.read()
            if response.status != 200:
                raise self._errors(
                    response.request_info, response.history, status=response.status, message=str(body[:200])
                )
            return response.content_type, body

    def decode(self, answer: Any) -> npt.NDArray[np.float32]:
        """Read float32 bytes, or JSON lists."""
        content_type, body = answer
        if content_type == "application/json":
            return np.array(json.loads(body), dtype=np.float32)
        return matrix(body)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


class Channels:
    """Several gRPC connections to one address, used in turn: callers of HTTP servers have one each, after all.

    A server may also bound the calls of one connection; that many callers are not one user.
    """

    def __init__(self, address: str, method: str) -> None:
        """Open them."""
        import grpc

        self._channels = [grpc.aio.insecure_channel(address, options=_GRPC_OPTIONS) for _ in range(_CONNECTIONS)]
        self._methods = itertools.cycle([channel.unary_unary(method) for channel in self._channels])

    def call(self, request: bytes, metadata: Any = None) -> Any:
        """Send a message; returns what is awaited."""
        return next(self._methods)(request, metadata=metadata)

    async def close(self) -> None:
        """Close them."""
        for channel in self._channels:
            await channel.close()


class GrpcTarget:
    """A peer behind one gRPC method, with messages of bytes."""

    def __init__(self, address: str, method: str, encode: Callable[..., bytes], decode: Callable[..., Any]) -> None:
        """Connect."""
        self._channels = Channels(address, method)
        self.encode, self.decode = encode, decode

    async def call(self, request: Any) -> Any:
        """Send a message."""
        return await self._channels.call(request)

    async def close(self) -> None:
        """Close the connections."""
        await self._channels.close()


class TrunklineTarget:
    """Trunkline's ``Predict`` with a bare stub, through the gateway or straight to the one replica."""

    def __init__(self, spec: dict[str, Any], *, direct: bool) -> None:
        """Connect to the gateway."""
        from trunkline_wire.v1 import inference_pb2, tensor_pb2

        self._pb = inference_pb2
        self._model = spec["model"]
        self._space = tensor_pb2.FeatureSpace(**spec["space"])
        self._token = (("authorization", f"Bearer {spec['token']}"),)
        self._address, self._is_direct = spec["address"], direct
        self._channels = Channels(spec["address"], PREDICT)
        self._ticket: Any = None
        self._replica, self._number, self._until = "", 0, 0.0
        self._asking = asyncio.Lock()

    def encode(self, images_BHWC: npt.NDArray[np.uint8]) -> Any:
        """Return a ``PredictRequest``."""
        from trunkline_wire.codecs import encode_rows

        message = self._pb.PredictRequest(
            space=self._space,
            features=encode_rows(images_BHWC, compress=False),
            model=self._model,
            timeout_s=peer_model.CALL_TIMEOUT_S,
        )
        return message.SerializeToString()

    async def call(self, request: Any) -> Any:
        """Send a message."""
        if not self._is_direct:
            return await self._channels.call(request, self._token)
        if time.monotonic() > self._until:
            async with self._asking:
                if time.monotonic() > self._until:
                    await self._get_ticket()
        return await self._channels.call(request, self._proof())

    def decode(self, answer: Any) -> npt.NDArray[np.float32]:
        """Return the outputs of a ``PredictResponse``."""
        message = self._pb.PredictResponse.FromString(answer)
        if message.row_errors:
            raise ValueError(message.row_errors[0].error.message)
        return np.frombuffer(message.outputs.data, dtype="<f4").reshape(tuple(message.outputs.shape))

    async def close(self) -> None:
        """Close the connections."""
        await self._channels.close()

    async def _get_ticket(self) -> None:
        """Ask the gateway where the replica listens, and for a ticket.

        Raises:
            NotThere: There are no endpoints, or they want TLS.
        """
        import grpc
        from trunkline_wire.v1 import catalog_pb2 as pb
        from trunkline_wire.v1.catalog_pb2_grpc import CatalogServiceStub

        async with grpc.aio.insecure_channel(self._address, options=_GRPC_OPTIONS) as gateway:
            ask = CatalogServiceStub(gateway).GetEndpoints
            try:
                found = await ask(pb.GetEndpointsRequest(backbone=self._space.backbone), metadata=self._token)
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                    raise NotThere("this cluster has no direct endpoints") from error
                raise
        if not found.endpoints:
            raise NotThere("no replica of this cluster listens itself")
        if found.tls:
            raise NotThere("the replicas want TLS, which this benchmark does not speak")
        endpoint = found.endpoints[0]
        if endpoint.replica != self._replica:
            await self._channels.close()
            self._channels, self._replica = Channels(endpoint.address, PREDICT), endpoint.replica
        self._ticket, self._number = found, 0
        self._until = time.monotonic() + found.valid_s / 2

    def _proof(self) -> tuple[tuple[str, bytes], ...]:
        from trunkline_wire.tickets import PROOF_METADATA, TICKET_METADATA, make_proof

        self._number += 1
        proof = make_proof(self._ticket.key, self._ticket.ticket, self._replica, PREDICT, self._number)
        return (TICKET_METADATA, self._ticket.ticket), (PROOF_METADATA, proof)


class SdkTarget:
    """Trunkline's client, as users call it: a method that blocks, each caller in a thread."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """Connect."""
        import trunkline
        from trunkline_wire.specs import FeatureSpace

        self._client = trunkline.connect(spec["address"], token=spec["token"])
        self._model = self._client.model(spec["model"])
        self._space = FeatureSpace(**spec["space"])
        self._threads = concurrent.futures.ThreadPoolExecutor(max_workers=_SDK_THREADS)

    def encode(self, images_BHWC: npt.NDArray[np.uint8]) -> Any:
        """Leave the pictures to the client: it encodes them in the call."""
        return images_BHWC

    async def call(self, request: Any) -> Any:
        """Predict."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._predict, request)

    def decode(self, answer: Any) -> npt.NDArray[np.float32]:
        """Return the probabilities."""
        return np.asarray(answer.probabilities, dtype=np.float32)

    async def close(self) -> None:
        """Close the client."""
        self._threads.shutdown()
        self._client.close()

    def _predict(self, images_BHWC: npt.NDArray[np.uint8]) -> Any:
        found = self._model.predict_features(
            images_BHWC, space=self._space, timeout_s=peer_model.CALL_TIMEOUT_S, progress=False
        )
        if found.errors:
            raise next(iter(found.errors.values()))
        return found


class InProcessTarget:
    """No server: the model in this very process."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """Load the model."""
        folder, threads = Path(spec["folder"]), int(spec["threads"])
        if spec["runtime"] == "chosen":
            from chosen import chosen_embed

            self._model = peer_model.with_head(
                folder, chosen_embed(Path(spec["data"]), spec["space"], spec["chosen"], threads)
            )
        else:
            self._model = peer_model.load(folder, spec["runtime"], threads)
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)

    def encode(self, images_BHWC: npt.NDArray[np.uint8]) -> Any:
        """Nothing to encode."""
        return images_BHWC

    async def call(self, request: Any) -> Any:
        """Run the model."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._model, request)

    def decode(self, answer: Any) -> npt.NDArray[np.float32]:
        """Nothing to decode."""
        found: npt.NDArray[np.float32] = answer
        return found

    async def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def matrix(body: bytes) -> npt.NDArray[np.float32]:
    """Return rows of ten probabilities of their bytes."""
    return np.frombuffer(body, dtype="<f4").reshape(-1, NUM_CLASSES)


NUM_CLASSES = 10
"""What every contestant's head tells apart."""


def connect(spec: dict[str, Any]) -> Target:
    """Return the target that a description names.

    Raises:
        NotThere: The contestant cannot take part here.
    """
    import oip

    kind = spec["kind"]
    if kind == HTTP:
        return HttpTarget(f"http://{spec['address']}{spec['path']}")
    if kind == OIP:
        return GrpcTarget(spec["address"], oip.METHOD, lambda images: oip.request(spec["name"], images), oip.outputs)
    if kind == RAW_GRPC:
        return GrpcTarget(spec["address"], spec["method"], lambda images: images.tobytes(), matrix)
    if kind in (GATEWAY, DIRECT):
        return TrunklineTarget(spec, direct=kind == DIRECT)
    if kind == SDK:
        return SdkTarget(spec)
    if kind == IN_PROCESS:
        return InProcessTarget(spec)
    raise ValueError(f"{kind!r} is not a kind of target")
