"""Which replicas a client uses, and when it asks for them: without network or threads."""

import json
import math
import random

import grpc
import pytest
from trunkline import _channel
from trunkline._direct import pool as pool_module
from trunkline._direct.admission import refusal
from trunkline._direct.pool import FIRST_PAUSE_S, IDLE_S, LOST_REST_S, MAX_REPLICAS, NONE_AGAIN_S, Pool
from trunkline._direct.replica import Replica
from trunkline.config import resolve
from trunkline_wire.specs import Endpoint, Endpoints
from trunkline_wire.tickets import PROOF_METADATA, TICKET_METADATA, read_proof
from trunkline_wire.v1.inference_pb2_grpc import InferenceServiceStub

SERVING = b"\x08\x01"


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Channel:
    """A channel whose health check ends when the test says how."""

    def __init__(self):
        self.closed = False

    def unary_unary(self, method):
        assert method == "/grpc.health.v1.Health/Check"
        return self

    def future(self, request, timeout):
        return self

    def add_done_callback(self, callback):
        self.callback = callback

    def end(self, code=grpc.StatusCode.OK, answer=SERVING):
        self.code, self.result, self.details = (lambda: code), (lambda: answer), (lambda: "last error: refused")
        self.callback(self)

    def close(self):
        self.closed = True


class Setup:
    """A pool, and the channels that it opened, by name of the replica."""

    def __init__(self):
        self.clock, self.channels, self.due = Clock(), {}, []
        self.pool = Pool(
            "net", clock=self.clock, random_float=random.Random(3).random, on_due=lambda: self.due.append(1)
        )

    def open(self, endpoint, endpoints):
        self.channels[endpoint.replica] = Channel()
        numbers = iter(range(1, 10**6))
        return Replica(endpoint, self.channels[endpoint.replica], numbers, (endpoints.ticket, endpoints.key))

    def learn(self, *names, ticket=b"t1", valid_s=60.0):
        # Starts of one replica have one letter: they are at one address.
        listed = tuple(Endpoint(f"10.0.0.1:{ord(name[0])}", name) for name in names)
        self.pool.learn(Endpoints(listed, ticket, b"key", valid_s), self.clock.now, self.open)

    def ready(self, *names):
        self.learn(*names)
        for name in names:
            self.channels[name].end()
        return {one.endpoint.replica: one for one in self.pool.ready()}

    def names(self):
        return [one.endpoint.replica for one in self.pool.ready()]

    def asked_in(self):
        return self.pool.due_s() - self.clock.now


@pytest.fixture
def setup():
    return Setup()


class TestReady:
    def test_only_what_was_reached(self, setup):
        setup.learn("a", "b", "c", "d", "e")
        assert setup.names() == [] and not setup.pool.is_settled and setup.pool.take(1) is None
        setup.channels["a"].end()
        setup.channels["b"].end(grpc.StatusCode.UNAVAILABLE)
        setup.channels["c"].end(answer=b"\x08\x02")  # NOT_SERVING
        setup.channels["d"].end(grpc.StatusCode.UNIMPLEMENTED)
        assert setup.names() == ["a", "d"] and not setup.pool.is_settled
        setup.channels["e"].end(grpc.StatusCode.DEADLINE_EXCEEDED)
        assert setup.pool.is_settled and (setup.pool.num_ready, setup.pool.num_listed) == (2, 5)
        assert setup.pool.why == "no connection to 10.0.0.1:101: refused"

    def test_what_was_not_reached_is_tried_again_rarely(self, setup):
        setup.learn("a")
        setup.channels["a"].end(grpc.StatusCode.UNAVAILABLE)
        setup.pool.sweep()
        first = setup.channels.pop("a")
        assert first.closed
        for _ in range(2):
            setup.clock.now += 40
            setup.learn("a")
            assert not setup.channels
        setup.clock.now += 41
        setup.learn("a")
        assert setup.channels

    def test_nothing_after_the_end_of_the_ticket(self, setup):
        setup.ready("a")
        setup.clock.now += 59.9
        assert setup.names() == ["a"] and setup.pool.take(1)
        setup.clock.now += 0.1
        assert setup.names() == [] and setup.pool.take(1) is None

    def test_one_that_is_gone_is_closed_when_its_last_call_ends(self, setup):
        setup.ready("a", "b")
        taken = setup.pool.take(3)
        other = ({"a", "b"} - {taken.endpoint.replica}).pop()
        setup.learn()
        assert setup.names() == []
        setup.pool.sweep()
        assert setup.channels[other].closed and not setup.channels[taken.endpoint.replica].closed
        setup.pool.give_back(taken, 3)
        assert 0 < setup.asked_in() <= 2.0
        setup.pool.sweep()
        assert setup.channels[taken.endpoint.replica].closed

    def test_another_start_is_another_replica(self, setup):
        setup.learn("a1")
        setup.learn("a2")
        setup.channels["a1"].end()  # too late
        assert setup.names() == []
        setup.channels["a2"].end()
        assert setup.names() == ["a2"]

    def test_so_many_and_no_more(self, setup):
        setup.ready(*[f"r{number}" for number in range(MAX_REPLICAS + 9)][:5])
        kept = set(setup.names())
        setup.learn(*[f"r{number}" for number in range(MAX_REPLICAS + 9)])
        assert len(setup.channels) == MAX_REPLICAS and kept <= set(setup.channels)

    def test_watchers_are_told(self, setup):
        told = []
        setup.pool.watch(lambda: told.append(setup.names()))
        found = setup.ready("a", "b")
        setup.pool.lost(found["a"])
        setup.learn("b", ticket=b"t2")
        assert told == [["a"], ["a", "b"], ["b"]]

    def test_close(self, setup):
        setup.ready("a", "b")
        setup.pool.close()
        assert setup.names() == [] and all(one.closed for one in setup.channels.values())


class TestChoice:
    def test_the_fewest_rows(self, setup):
        found = setup.ready("a", "b", "c")
        setup.pool.add_rows(found["a"], 5)
        setup.pool.add_rows(found["b"], 2)
        setup.pool.add_rows(found["c"], 9)
        taken = [setup.pool.take(2).endpoint.replica for _ in range(3)]
        assert taken == ["b", "b", "a"] or taken == ["b", "b", "b"]
        assert sum(one.outstanding for one in found.values()) == 22

    def test_equal_ones_in_turns(self, setup):
        found = setup.ready("a", "b", "c")
        for _ in range(300):
            one = setup.pool.take(1)
            one.asked = getattr(one, "asked", 0) + 1
            setup.pool.give_back(one, 1)
        assert all(70 < one.asked < 130 for one in found.values())
        assert all((one.outstanding, one.num_calls) == (0, 0) for one in found.values())

    def test_not_those_to_be_avoided(self, setup):
        found = setup.ready("a", "b")
        assert setup.pool.take(1, [found["a"]]) is found["b"]
        assert setup.pool.take(1, list(found.values())) is None
        assert setup.pool.take_several(5, {found["b"]}) == [found["a"]]
        assert {one.endpoint.replica for one in setup.pool.take_several(5, ())} == {"a", "b"}


class TestAsking:
    def test_before_the_ticket_ends(self, setup):
        assert setup.pool.wants_answer()
        setup.learn("a", valid_s=60.0)
        assert not setup.pool.wants_answer() and setup.asked_in() == pytest.approx(40.0)
        setup.learn("a", valid_s=0.0)
        assert setup.asked_in() == pytest.approx(0.5)

    def test_where_nobody_listens_or_answers(self, setup):
        setup.learn()
        assert setup.asked_in() == NONE_AGAIN_S
        setup.pool.unanswered("old", 600.0)
        assert setup.asked_in() == 600.0 and setup.pool.why == "old"

    def test_at_once_and_then_more_and_more_rarely_after_a_loss(self, setup):
        found = setup.ready("a", "b")
        setup.pool.lost(found["a"])
        setup.pool.lost(found["a"])  # by another call that was under way there
        assert setup.names() == ["b"] and setup.pool.wants_answer() and len(setup.due) == 1
        waits = []
        for _ in range(8):
            setup.learn("b")
            waits.append(setup.pool._ask_s - setup.clock.now)
            setup.clock.now = setup.pool._ask_s
        assert waits == pytest.approx([FIRST_PAUSE_S * 2**n for n in range(6)] + [40.0, 40.0])

    def test_a_lost_one_rests(self, setup):
        found = setup.ready("a")
        setup.pool.lost(found["a"])
        lost = setup.channels.pop("a")
        setup.pool.sweep()
        assert lost.closed
        setup.learn("a")
        assert not setup.channels
        setup.clock.now += LOST_REST_S
        setup.learn("a")
        setup.channels["a"].end()
        assert setup.names() == ["a"]

    def test_a_refused_ticket_is_replaced(self, setup):
        found = setup.ready("a", "b")
        setup.pool.refused(found["a"], b"an older one")
        assert setup.names() == ["a", "b"]
        setup.pool.refused(found["a"], b"t1")
        assert setup.names() == ["b"] and setup.pool.wants_answer() and setup.due
        setup.learn("a", "b", ticket=b"t2")
        assert setup.names() == ["a", "b"] and found["a"].ticket == b"t2"

    def test_one_that_refuses_every_ticket_is_shown_few(self, setup):
        found, shown = setup.ready("a"), 0
        end = setup.clock.now + 60
        while setup.clock.now < end:
            if setup.pool.wants_answer():
                shown += 1
                setup.learn("a", ticket=b"t%d" % shown)
            for one in setup.pool.ready():
                setup.pool.refused(one, one.ticket)
            setup.clock.now += 0.1
        assert found and 5 <= shown <= 8

    def test_idle(self, setup):
        setup.ready("a")
        setup.clock.now += IDLE_S + 1
        assert setup.pool.is_idle()
        setup.pool.take(1)
        assert not setup.pool.is_idle()
        setup.pool.watch(print)
        setup.clock.now += IDLE_S + 1
        assert not setup.pool.is_idle()
        setup.pool.unwatch(print)
        setup.clock.now += IDLE_S + 1
        assert setup.pool.is_idle() and math.isfinite(setup.pool.due_s())


def test_every_call_is_shown_a_proof_of_its_own(setup):
    (replica,) = setup.ready("a").values()
    for number in (1, 2, 3):
        ticket, metadata = replica.show(InferenceServiceStub, "Predict", "id")
        shown = dict(metadata)
        assert shown[TICKET_METADATA] == ticket == b"t1"
        assert shown["trunkline-request-id"] == "id" and "authorization" not in shown
        method = "/trunkline_wire.v1.InferenceService/Predict"
        assert read_proof(b"key", b"t1", "a", method, shown[PROOF_METADATA]) == number
    setup.learn("a", ticket=b"t2")
    ticket, metadata = replica.show(InferenceServiceStub, "StreamPredict", "id")
    proof = dict(metadata)[PROOF_METADATA]
    assert read_proof(b"key", b"t2", "a", "/trunkline_wire.v1.InferenceService/StreamPredict", proof) == 4


@pytest.fixture
def no_profile(tmp_path, monkeypatch):
    for name in ("ADDRESS", "TOKEN", "TOKEN_FILE", "CA_FILE", "INSECURE", "PROFILE", "DIRECT"):
        monkeypatch.delenv(f"TRUNKLINE_{name}", raising=False)
    monkeypatch.setenv("TRUNKLINE_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("TRUNKLINE_STATE_DIR", str(tmp_path / "state"))


LOCAL, TUNNEL_END = "127.0.0.1:1", "127.0.0.1:1"


@pytest.mark.parametrize(
    ("gateway", "insecure", "address", "tls", "said"),
    [
        (LOCAL, None, "127.0.0.1:2", False, ""),
        (LOCAL, None, "[::1]:2", False, ""),
        (TUNNEL_END, None, "10.0.0.1:2", False, "would not be encrypted"),
        (TUNNEL_END, None, "10.0.0.1:2", True, ""),
        ("far.example:1", None, "10.0.0.1:2", True, ""),
        ("far.example:1", None, "10.0.0.1:2", False, "is not encrypted"),
        ("far.example:1", None, "127.0.0.1:2", True, "the cluster's own machine"),
        ("far.example:1", True, "10.0.0.1:2", False, ""),
        ("far.example:1", True, "127.0.0.1:2", False, "the cluster's own machine"),
        ("far.example:1", True, "unix:///tmp/x", False, "is not an address"),
        ("far.example:1", True, "10.0.0.1", False, "is not an address"),
        (LOCAL, None, "", False, "is not an address"),
    ],
)
def test_which_endpoints_may_be_used(no_profile, gateway, insecure, address, tls, said):
    settings = resolve(gateway, token="t", insecure=insecure)
    why = refusal(Endpoint(address, "r"), Endpoints(tls=tls), settings)
    assert (said in why) if said else not why, why


def test_tls_to_the_gateway_forbids_plaintext_on_this_machine_too(no_profile, tmp_path):
    (tmp_path / "ca.pem").write_text("x")
    settings = resolve(LOCAL, token="t", ca_file=tmp_path / "ca.pem")
    assert "is not encrypted" in refusal(Endpoint("127.0.0.1:2", "r"), Endpoints(tls=False), settings)


def test_grpc_repeats_nothing_by_itself():
    options = dict(_channel.direct_options("10.0.0.1:2", "name"))
    assert options["grpc.enable_retries"] == 0 and "grpc.service_config" not in options
    assert options["grpc.ssl_target_name_override"] == "name"
    assert "grpc.ssl_target_name_override" not in dict(_channel.direct_options("10.0.0.1:2", ""))
    assert "retryPolicy" in json.dumps(json.loads(dict(_channel.channel_options("10.0.0.1:2"))["grpc.service_config"]))


def test_constants_agree():
    assert pool_module.REFRESH_AFTER * 60.0 < IDLE_S
