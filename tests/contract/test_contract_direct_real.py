"""A client against the cluster's own endpoints and tickets, without Ray: what both sides must agree on."""

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest
import serving_fakes as fakes
import torch
import trunkline
from direct_fakes import NODE, DirectCluster, LocalDirectory
from small_backbones import small_backbone
from trunk_gateway import TrunkGateway
from trunkline.torch import RemoteTrunk
from trunkline_wire.v1.inference_pb2_grpc import InferenceServiceStub
from trunkline_wire.v1.trunk_pb2_grpc import TrunkServiceStub
from trunkline_worker.serving.addresses import Place
from trunkline_worker.serving.direct import DirectConfig, DirectEndpoint, EndpointBackends
from trunkline_worker.serving.endpoints import EndpointBook
from trunkline_worker.serving.server import Listener
from trunkline_worker.store.clock import SystemClock


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("TRUNKLINE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def cluster(tmp_path):
    running = DirectCluster(tmp_path)
    yield running
    running.close()


@pytest.fixture
def client(cluster):
    with trunkline.connect(cluster.address, token=fakes.TOKEN, timeout_s=30.0) as opened:
        yield opened


PIXELS = np.random.default_rng(5).integers(0, 200, (40, 8, 8, 3)).astype(np.uint8)


def extract(client, count=40, **keywords):
    space = fakes.images_space()
    return client.extract_features(PIXELS[:count], space=space, **keywords)


def reach(client, backbone, names):
    pool = client._calls.direct.pool(backbone)
    assert pool.wait(lambda one: sorted(x.endpoint.replica for x in one._ready) == sorted(names), 15), pool.why
    return pool


def forbid_gateway(client, monkeypatch):
    """Make rows that go through the gateway an error."""
    whole = client._calls.connection.stub

    def stub(kind):
        assert kind not in (InferenceServiceStub, TrunkServiceStub), "went through the gateway"
        return whole(kind)

    monkeypatch.setattr(client._calls.connection, "stub", stub)


def test_calls_and_streams(cluster, client, monkeypatch):
    expected = extract(client)
    cluster.replica("r1")
    cluster.replica("r2")
    reach(client, "fake", ["r1", "r2"])
    forbid_gateway(client, monkeypatch)
    for row in range(5):
        space = fakes.images_space()
        np.testing.assert_array_equal(
            client.extract_features(PIXELS[row : row + 1], space=space), expected[row : row + 1]
        )
    np.testing.assert_array_equal(extract(client, batch_size=3), expected)


def test_many_at_once_are_all_let_in(cluster, client, monkeypatch):
    """Proofs of many threads arrive in another order than they were made."""
    expected = extract(client)
    cluster.replica()
    reach(client, "fake", ["r1"])
    forbid_gateway(client, monkeypatch)
    failed = []

    def call(row):
        for _ in range(5):
            try:
                space = fakes.images_space()
                found = client.extract_features(PIXELS[row : row + 1], space=space)
                np.testing.assert_array_equal(found, expected[row : row + 1])
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=call, args=(row,)) for row in range(24)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    assert not failed


def test_a_controller_that_starts_again_ends_all_tickets(cluster, client, monkeypatch):
    gate = cluster.replica()._gate
    pool = reach(client, "fake", ["r1"])
    expected = extract(client, 1)
    assert len(gate) == 1
    cluster.directory.restart()
    gate._secrets = ()
    gate._known.clear()
    for _ in range(100):
        # A gateway says for another second what it knew, so the next ticket may be none of the new secret's either.
        np.testing.assert_array_equal(extract(client, 1), expected)
        if len(gate):
            break
        pool.wait(lambda one: False, 0.1)
    forbid_gateway(client, monkeypatch)
    np.testing.assert_array_equal(extract(client, 1), expected)


def test_a_replica_that_drains_in_the_middle_of_a_stream(cluster, client):
    expected = extract(client)
    engine = cluster.engines["fake"]

    async def gate():
        engine.gate = asyncio.Event()
        engine.started.clear()

    leaving = cluster.replica("r1")
    cluster.replica("r2")
    pool = reach(client, "fake", ["r1", "r2"])
    cluster.run(gate())
    found = []
    thread = threading.Thread(target=lambda: found.append(extract(client, batch_size=2)), daemon=True)
    thread.start()
    assert engine.started.wait(60)

    async def leave():
        ending = asyncio.ensure_future(leaving.close(20.0))
        while not leaving._server._draining.begun:
            await asyncio.sleep(0.01)
        engine.gate.set()
        await ending

    cluster.run(leave())
    thread.join(30)
    np.testing.assert_array_equal(found[0], expected)
    assert pool.wait(lambda one: [x.endpoint.replica for x in one._ready] == ["r2"], 10)


class DirectTrunkGateway(TrunkGateway):
    """A gateway over a real engine, and one replica with the same engine."""

    def serve(self):
        self.clock = SystemClock()
        self.directory = LocalDirectory(self.clock)
        book = EndpointBook(self.directory, clock=self.clock, node=NODE)
        self.backends = replace(self.backends, endpoints=book)
        super().serve()
        (name,) = self.engines
        backends = EndpointBackends(self.engines, self.backends.metadata, self.blobs)

        async def start():
            place = Place("127.0.0.1", "127.0.0.1")
            self.endpoint = DirectEndpoint(
                DirectConfig(Listener(port=0)),
                name,
                backends,
                self.directory,
                place=place,
                replica="r1",
                node=NODE,
                clock=self.clock,
            )
            await self.endpoint.start()
            await self.directory.announced.wait()

        self.run(start())

    def close(self):
        self.run(self.endpoint.close(1.0))
        super().close()


@pytest.mark.parametrize("batch_rows", [None, 2], ids=["one message", "a stream"])
def test_the_trunk_forward_and_backward(tmp_path, monkeypatch, batch_rows):
    torch.set_num_threads(1)
    gateway = DirectTrunkGateway(tmp_path, [small_backbone()])
    try:
        with gateway.connect() as client:
            trunk = RemoteTrunk(client, "places", cut="norm", input_size=32, batch_rows=batch_rows)
            rows = torch.randn(6, *trunk.feature_shape, generator=torch.Generator().manual_seed(0))

            def step():
                features = rows.clone().requires_grad_()
                outputs = trunk(features)
                outputs.square().sum().backward()
                return outputs.detach().numpy(), features.grad.numpy()

            through_gateway = step()
            reach(client, "places", ["r1"])
            forbid_gateway(client, monkeypatch)
            for one, other in zip(step(), through_gateway, strict=True):
                np.testing.assert_array_equal(one, other)
    finally:
        gateway.close()
