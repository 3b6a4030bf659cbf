"""Replicas that listen themselves: over loopback, with tickets of a real gateway, without Ray."""

import asyncio
import logging
import re
import socket
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
import serving_fakes as fakes
from certificates import certificate
from direct_fakes import Caller, DirectCluster
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from trunkline_wire import codecs, messages
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import Endpoints
from trunkline_wire.tickets import PROOF_METADATA, TICKET_METADATA
from trunkline_wire.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    error_pb2,
    inference_pb2,
    inference_pb2_grpc,
    trunk_pb2,
    trunk_pb2_grpc,
)
from trunkline_worker.engine.api import TrunkOutputs
from trunkline_worker.serving.addresses import Place
from trunkline_worker.serving.direct import (
    DirectConfig,
    DirectEndpoint,
    EndpointBackends,
    certificate_name,
    open_endpoint,
)
from trunkline_worker.serving.server import Listener
from trunkline_worker.serving.tickets import LEEWAY_S, VALID_S
from trunkline_worker.store.clock import ManualClock

USER = (("authorization", f"Bearer {fakes.TOKEN}"),)
READER = (("authorization", f"Bearer {fakes.READER_TOKEN}"),)
EXTRACT, STREAM = "InferenceService/Extract", "InferenceService/StreamExtract"
HEALTH = health_pb2.HealthCheckRequest(service="trunkline_wire.v1.InferenceService")


@pytest.fixture
def cluster(tmp_path):
    running = DirectCluster(tmp_path)
    yield running
    running.close()


@pytest.fixture
def replica(cluster):
    return cluster.replica()


@pytest.fixture
def channel(replica):
    with grpc.insecure_channel(replica.address) as opened:
        yield opened


def endpoints(cluster, metadata=USER, backbone="fake"):
    with grpc.insecure_channel(cluster.address) as opened:
        stub = catalog_pb2_grpc.CatalogServiceStub(opened)
        answer = stub.GetEndpoints(catalog_pb2.GetEndpointsRequest(backbone=backbone), metadata=metadata)
    return messages.endpoints_from_proto(answer)


@pytest.fixture
def caller(cluster, replica):
    return Caller(endpoints(cluster))


def request(rows=2, value=0, space=None, **fields):
    space = messages.space_to_proto(space or fakes.images_space())
    rows = np.full((rows, 8, 8, 3), value, np.uint8)
    return inference_pb2.ExtractRequest(space=space, features=codecs.encode_rows(rows), **fields)


def extract(channel, metadata, **fields):
    return inference_pb2_grpc.InferenceServiceStub(channel).Extract(request(**fields), metadata=metadata)


def refused(call, code):
    with pytest.raises(grpc.RpcError) as caught:
        answer = call()
        if hasattr(answer, "__next__"):
            list(answer)
    assert caught.value.code() is code, caught.value
    return caught.value.details()


def unauthenticated(call):
    details = refused(call, grpc.StatusCode.UNAUTHENTICATED)
    assert details.startswith("[UNAUTHENTICATED] ")
    return details


def test_a_gateway_says_where_replicas_listen_and_their_answers_are_its_own(cluster, replica, channel, caller):
    found = endpoints(cluster)
    assert [(one.address, one.replica) for one in found.endpoints] == [(replica.address, "r1")]
    assert (found.valid_s, found.tls, found.tls_name) == (VALID_S, False, "")
    assert endpoints(cluster, backbone="").endpoints == found.endpoints
    with grpc.insecure_channel(cluster.address) as gateway:
        expected = extract(gateway, USER)
    direct = extract(channel, caller.metadata(EXTRACT))
    assert direct == expected


def test_the_directory_needs_a_token_and_a_backbone_that_is_there(cluster, replica):
    unauthenticated(lambda: endpoints(cluster, metadata=()))
    assert "'nobody'" in refused(lambda: endpoints(cluster, backbone="nobody"), grpc.StatusCode.NOT_FOUND)
    assert endpoints(cluster, READER).endpoints


def test_without_replicas_that_listen_the_answer_is_empty(cluster):
    assert endpoints(cluster) == Endpoints()


def test_every_method_of_a_replica_refuses_callers_without_a_ticket(channel, replica):
    stubs = {
        "InferenceService": (inference_pb2_grpc.InferenceServiceStub, inference_pb2),
        "TrunkService": (trunk_pb2_grpc.TrunkServiceStub, trunk_pb2),
    }
    called = 0
    for name, (make, module) in stubs.items():
        stub = make(channel)
        for method in module.DESCRIPTOR.services_by_name[name].methods:
            message = getattr(module, method.input_type.name)()
            argument = iter([message]) if method.client_streaming else message
            call = getattr(stub, method.name)
            for metadata in ((), USER):
                details = unauthenticated(lambda call=call, one=argument, sent=metadata: call(one, metadata=sent))
                assert "GetEndpoints" in details
            called += 1
    assert called == 9


def test_a_replica_serves_nothing_else(channel, caller):
    stub = catalog_pb2_grpc.CatalogServiceStub(channel)
    question = catalog_pb2.GetServerInfoRequest()
    for metadata in (USER, caller.metadata("CatalogService/GetServerInfo")):
        refused(lambda sent=metadata: stub.GetServerInfo(question, metadata=sent), grpc.StatusCode.UNIMPLEMENTED)
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    services = reflection_pb2.ServerReflectionRequest(list_services="")
    refused(lambda: reflection.ServerReflectionInfo(iter([services])), grpc.StatusCode.UNIMPLEMENTED)


def test_a_call_cannot_be_repeated_by_whoever_overheard_it(channel, caller):
    overheard = caller.metadata(EXTRACT)
    extract(channel, overheard)
    assert "used" in unauthenticated(lambda: extract(channel, overheard))
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    other = dict(caller.metadata(EXTRACT))
    assert "proof" in unauthenticated(lambda: stub.StreamExtract(iter([]), metadata=tuple(other.items())))
    extract(channel, caller.metadata(EXTRACT))


def test_forged_tickets_and_proofs_are_refused(channel, caller):
    ticket, proof = (dict(caller.metadata(EXTRACT))[name] for name in (TICKET_METADATA, PROOF_METADATA))
    forged, wrong = (one[:-1] + bytes([one[-1] ^ 1]) for one in (ticket, proof))
    for one, other, what in ((forged, proof, "none of this cluster's"), (ticket, wrong, "proof")):
        sent = ((TICKET_METADATA, one), (PROOF_METADATA, other))
        assert what in unauthenticated(lambda sent=sent: extract(channel, sent))


def test_a_proof_for_one_replica_is_of_no_use_at_another(cluster, channel, caller):
    other = cluster.replica("r2")
    sent = caller.metadata(EXTRACT)
    with grpc.insecure_channel(other.address) as opened:
        assert "proof" in unauthenticated(lambda: extract(opened, sent))
        again = Caller(endpoints(cluster), replica="r2")
        extract(opened, again.metadata(EXTRACT))
    extract(channel, sent)


def test_a_ticket_for_another_backbone_is_refused(tmp_path):
    cluster = DirectCluster(tmp_path, ("fake", "other"))
    try:
        replica = cluster.replica("r1", "fake")
        cluster.replica("r2", "other")
        caller = Caller(endpoints(cluster, backbone="other"), replica="r1")
        with grpc.insecure_channel(replica.address) as opened:
            details = unauthenticated(lambda: extract(opened, caller.metadata(EXTRACT)))
        assert "'other'" in details and "'fake'" in details
    finally:
        cluster.close()


def test_a_reader_is_a_reader_at_a_replica_too(cluster, replica, channel):
    caller = Caller(endpoints(cluster, READER))
    extract(channel, caller.metadata(EXTRACT))
    stub = trunk_pb2_grpc.TrunkServiceStub(channel)
    sent = caller.metadata("TrunkService/PutBottleneck")
    details = refused(
        lambda: stub.PutBottleneck(trunk_pb2.PutBottleneckRequest(), metadata=sent), grpc.StatusCode.PERMISSION_DENIED
    )
    assert "'user'" in details


def test_tenants_are_who_their_ticket_says(cluster, replica, channel, monkeypatch):
    stub = trunk_pb2_grpc.TrunkServiceStub(channel)
    call, tenants = cluster.metadata.call, []

    async def watched(name, tenant, *args, **keywords):
        tenants.append(tenant)
        return await call(name, tenant, *args, **keywords)

    monkeypatch.setattr(cluster.metadata, "call", watched)
    mine = Caller(endpoints(cluster))
    other = Caller(endpoints(cluster, (("authorization", f"Bearer {fakes.OTHER_TOKEN}"),)))
    method = "TrunkService/GetBottleneck"
    for caller in (mine, other):
        question = trunk_pb2.GetBottleneckRequest(sha256="0" * 64)
        refused(
            lambda caller=caller, question=question: stub.GetBottleneck(question, metadata=caller.metadata(method)),
            grpc.StatusCode.NOT_FOUND,
        )
    assert tenants == ["default", "other"]


def test_the_trunk_service_runs_on_the_replicas_engine(cluster, replica, channel, caller):
    async def forward(space, rows, outputs=(), *, decoder=None, timeout_s=None):
        return TrunkOutputs(np.full((len(rows), 3), 7, np.float32))

    cluster.engine.forward = forward
    space = messages.space_to_proto(fakes.images_space(cut="mid"))
    features = codecs.encode_array(np.zeros((2, 3, 2, 2), np.float32))
    stub = trunk_pb2_grpc.TrunkServiceStub(channel)
    sent = trunk_pb2.ForwardRequest(space=space, features=features)
    answer = stub.Forward(sent, metadata=caller.metadata("TrunkService/Forward"))
    assert codecs.decode(answer.outputs).tolist() == [[7, 7, 7]] * 2
    stream = [
        trunk_pb2.StreamTrunkRequest(seq=0, forward=sent),
        trunk_pb2.StreamTrunkRequest(seq=1, end=error_pb2.EndOfStream(num_messages=1)),
    ]
    replies = list(stub.StreamTrunk(iter(stream), metadata=caller.metadata("TrunkService/StreamTrunk")))
    assert [one.WhichOneof("kind") for one in replies] == ["forward", "end"]


def test_errors_keep_their_codes_and_secrets_stay_inside(channel, caller):
    details = refused(lambda: extract(channel, caller.metadata(EXTRACT), value=254), grpc.StatusCode.INTERNAL)
    assert "secret" not in details
    space = fakes.fake_spec().space(fakes.fake_spec().cut("input"))
    other = type(space)("nobody", "input", 8, "0" * 64)
    details = refused(lambda: extract(channel, caller.metadata(EXTRACT), space=other), grpc.StatusCode.UNAVAILABLE)
    assert "go through the gateway" in details


def test_health_is_open_to_everyone(channel):
    assert health_pb2_grpc.HealthStub(channel).Check(HEALTH).status == health_pb2.HealthCheckResponse.SERVING


class OpenStream:
    """A stream of extractions that stays open until it is told to end."""

    def __init__(self, channel, metadata):
        self._more = threading.Semaphore(0)
        self._sent, self._ending = 0, False
        self.replies = inference_pb2_grpc.InferenceServiceStub(channel).StreamExtract(
            self._requests(), metadata=metadata, timeout=60
        )

    def _requests(self):
        while True:
            self._more.acquire()
            if self._ending:
                yield inference_pb2.StreamExtractRequest(
                    seq=self._sent, end=error_pb2.EndOfStream(num_messages=self._sent)
                )
                return
            self._sent += 1
            yield inference_pb2.StreamExtractRequest(seq=self._sent - 1, extract=request())

    def send(self):
        self._more.release()

    def end(self):
        self._ending = True
        self._more.release()


def test_a_stream_outlives_the_ticket_it_was_opened_with(cluster):
    clock = ManualClock(cluster.clock.now())
    replica = cluster.replica(clock=clock)
    caller = Caller(endpoints(cluster))
    with grpc.insecure_channel(replica.address) as channel:
        stream = OpenStream(channel, caller.metadata(STREAM))
        stream.send()
        assert next(stream.replies).WhichOneof("kind") == "result"
        clock.advance(VALID_S + LEEWAY_S + 5)
        assert "expired" in unauthenticated(lambda: extract(channel, caller.metadata(EXTRACT)))
        stream.send()
        assert next(stream.replies).WhichOneof("kind") == "result"
        stream.end()
        assert [one.WhichOneof("kind") for one in stream.replies] == ["end"]


def gated(cluster):
    """Hold the engine's answers back until the event that is returned is set."""

    async def make():
        return asyncio.Event()

    cluster.engine.gate = cluster.run(make())
    return cluster.engine.gate


@pytest.mark.parametrize("which", ["replica", "gateway"])
def test_a_server_that_ends_answers_what_it_has_read_and_sends_callers_elsewhere(cluster, replica, which):
    address, metadata = (replica.address, None) if which == "replica" else (cluster.address, USER)
    metadata = metadata or Caller(endpoints(cluster)).metadata(STREAM)
    gate = gated(cluster)
    with grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(HEALTH)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        stream = OpenStream(channel, metadata)
        stream.send()
        assert cluster.engine.started.wait(20)
        server = replica if which == "replica" else cluster.server
        closing = asyncio.run_coroutine_threadsafe(
            server.close(30) if which == "replica" else server.stop(30), cluster.loop
        )
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        if which == "replica":
            assert cluster.directory.directory.list("fake").announcements == ()
        assert not closing.done()
        cluster.loop.call_soon_threadsafe(gate.set)
        assert next(stream.replies).WhichOneof("kind") == "result"
        # The caller neither sent more nor said that it had: it is told to go elsewhere.
        details = refused(lambda: stream.replies, grpc.StatusCode.UNAVAILABLE)
        assert "not answered" in details
        closing.result(20)
        stream.end()
    assert cluster.engine.calls == 1


def test_after_a_restart_of_the_directory_old_and_new_tickets_are_taken(cluster, replica, channel, caller):
    cluster.directory.restart()
    extract(channel, caller.metadata(EXTRACT))

    async def announced():
        async with asyncio.timeout(60):
            await cluster.directory.announced.wait()

    cluster.run(announced())
    cluster.book._known.clear()  # as after a second
    again = Caller(endpoints(cluster))
    assert again.key != caller.key
    extract(channel, again.metadata(EXTRACT))
    extract(channel, caller.metadata(EXTRACT))


def test_a_directory_that_is_away_is_no_error(cluster, replica):
    cluster.directory.away = True
    assert endpoints(cluster) == Endpoints()


def test_ports_are_tried_in_turn_and_never_shared(cluster):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = taken.getsockname()[1]
        one = cluster.replica("r1", ports=(first, free_port()))
        assert not one.address.endswith(f":{first}")
        with pytest.raises(RuntimeError, match=f"cannot listen on 127.0.0.1:{first}"):
            cluster.replica("r2", ports=(first,))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("host", "listener", "what"),
    [
        ("0.0.0.0", {"token_file": "t"}, "needs TLS"),
        ("127.0.0.1", {"tls_cert": "nowhere.pem", "tls_key": "nowhere.key"}, "nowhere.pem"),
        ("127.0.0.1", {"tls_cert": "nowhere.pem"}, "both a certificate and its key"),
        ("192.0.2.1", {"insecure": True}, r"cannot listen on 192\.0\.2\.1:0"),
    ],
)
def test_a_replica_that_cannot_listen_says_why_and_goes_on_without(cluster, caplog, host, listener, what):
    def make():
        backends = EndpointBackends(cluster.engines, cluster.metadata, cluster.blobs)
        config = DirectConfig(Listener(**listener))
        place = Place(host, host)
        return DirectEndpoint(
            config, "fake", backends, cluster.directory, place=place, replica="r", node="n", clock=cluster.clock
        )

    async def start():
        return await open_endpoint(make)

    with caplog.at_level(logging.WARNING):
        assert cluster.run(start()) is None
    assert re.search(what, caplog.text)
    assert "through the gateway" in caplog.text


@pytest.mark.parametrize("mutual", [False, True])
def test_tls_with_the_gateways_files_and_the_name_that_callers_are_told(tmp_path, mutual):
    cert, key = certificate(tmp_path, "server", expires_in_s=3600, dns=("cluster.example", "also.example"))
    ours, our_key = certificate(tmp_path, "caller", expires_in_s=3600)
    files = {"tls_cert": cert, "tls_key": key, **({"tls_client_ca": ours} if mutual else {})}
    cluster = DirectCluster(tmp_path, **files)
    try:
        replica = cluster.replica()
        root = Path(cert).read_bytes()
        known = grpc.ssl_channel_credentials(root, Path(our_key).read_bytes(), Path(ours).read_bytes())
        with grpc.secure_channel(cluster.address, known) as gateway:
            stub = catalog_pb2_grpc.CatalogServiceStub(gateway)
            found = messages.endpoints_from_proto(
                stub.GetEndpoints(catalog_pb2.GetEndpointsRequest(backbone="fake"), metadata=USER)
            )
        assert (found.tls, found.tls_name) == (True, "cluster.example")
        caller = Caller(found)
        options = [("grpc.ssl_target_name_override", found.tls_name)]
        with grpc.secure_channel(replica.address, known, options) as opened:
            assert len(extract(opened, caller.metadata(EXTRACT)).embedding.data)
        strangers = [
            grpc.secure_channel(replica.address, grpc.ssl_channel_credentials(Path(ours).read_bytes()), options)
        ]
        if mutual:
            strangers.append(grpc.secure_channel(replica.address, grpc.ssl_channel_credentials(root), options))
        for opened in [*strangers, grpc.insecure_channel(replica.address)]:
            with opened:
                refused(lambda one=opened: extract(one, caller.metadata(EXTRACT)), grpc.StatusCode.UNAVAILABLE)
    finally:
        cluster.close()


def test_the_name_in_a_certificate(tmp_path):
    def name(**names):
        cert, _ = certificate(tmp_path, "one", expires_in_s=60, **names)
        return certificate_name(Path(cert).read_bytes())

    assert name(dns=("a.example", "b.example")) == "a.example"
    assert name(dns=("*.example",)) == "replica.example"
    assert name() == ""
    assert name(addresses=()) == ""


def test_a_gateway_with_tls_tells_of_no_replica_without(tmp_path):
    cert, key = certificate(tmp_path, "server", expires_in_s=3600)
    cluster = DirectCluster(tmp_path, tls_cert=cert, tls_key=key)
    try:
        cluster.replica(insecure=True)
        with grpc.secure_channel(cluster.address, grpc.ssl_channel_credentials(Path(cert).read_bytes())) as gateway:
            stub = catalog_pb2_grpc.CatalogServiceStub(gateway)
            assert not stub.GetEndpoints(catalog_pb2.GetEndpointsRequest(), metadata=USER).endpoints
    finally:
        cluster.close()


def test_without_tokens_everyone_gets_a_ticket_of_the_default_tenant(tmp_path):
    cluster = DirectCluster(tmp_path, token_file=None, insecure=True)
    try:
        replica = cluster.replica()
        caller = Caller(endpoints(cluster, ()))
        with grpc.insecure_channel(replica.address) as opened:
            extract(opened, caller.metadata(EXTRACT))
            assert "GetEndpoints" in unauthenticated(lambda: extract(opened, ()))
    finally:
        cluster.close()


def test_other_backbones_are_asked_where_the_replica_knows_them(cluster):
    backends = EndpointBackends({"fake": cluster.engine}, cluster.metadata, cluster.blobs)
    assert backends.engine("fake") is cluster.engine
    with pytest.raises(WireError) as caught:
        backends.engine("other")
    assert caught.value.code is ErrorCode.UNAVAILABLE
