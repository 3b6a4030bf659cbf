"""Straight to replicas: what the client does where they can be reached, cannot, refuse, drain and die."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import trunkline
from certificates import certificate
from direct_double import FakeCluster
from trunkline._calls import Batch
from trunkline._deadline import Deadline
from trunkline._direct import pool as pool_module
from trunkline.config import resolve
from trunkline.doctor import examine
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import Endpoint

NAME = "fake_net"


@pytest.fixture
def cluster():
    with FakeCluster() as running:
        yield running


def connect(cluster, **keywords):
    return trunkline.connect(cluster.address, token=cluster.token, timeout_s=20.0, **keywords)


@pytest.fixture
def client(cluster):
    with connect(cluster) as opened:
        yield opened


@pytest.fixture
def rows(client):
    """Make features that differ from row to row, and say where they live."""
    stem = client.stem(NAME, cut="half", codec="float32")
    return np.random.default_rng(7).random((40, *stem.feature_shape), dtype=np.float32), stem.space


@pytest.fixture
def expected(cluster, rows):
    """Compute what every way must answer, through the gateway alone."""
    with connect(cluster, direct=False) as plain:
        found = plain.extract_features(rows[0], space=rows[1])
    cluster.calls.clear()
    cluster.trunk_rows = 0
    return found


def pool_of(client):
    return client._calls.direct.pool(NAME)


def reach(client, count):
    """Connect, and wait until so many replicas are ready."""
    pool = pool_of(client)
    assert pool.wait(lambda one: one.num_ready == count, 10), (pool.num_ready, pool.why)
    return pool


def one_row(client, rows):
    return client.extract_features(rows[0][:1], space=rows[1])


def streamed(client, rows, batch=2, **keywords):
    return client.extract_features(rows[0], space=rows[1], batch_size=batch, **keywords)


class TestUnary:
    def test_goes_to_a_replica_once_that_is_ready_and_to_the_gateway_until_then(self, cluster, client, rows, expected):
        replica = cluster.replica()
        np.testing.assert_array_equal(one_row(client, rows), expected[:1])
        assert cluster.calls["Extract"] == 1 and not cluster.calls["GetEndpoints"]
        np.testing.assert_array_equal(one_row(client, rows), expected[:1])
        reach(client, 1)
        through_gateway = cluster.calls["Extract"]
        for _ in range(3):
            np.testing.assert_array_equal(one_row(client, rows), expected[:1])
        assert cluster.calls["Extract"] == through_gateway and replica.calls["Extract"] == 3
        assert [number for _, number, _ in replica.seen] == [1, 2, 3]
        assert cluster.calls["GetEndpoints"] == 1 and not replica.refusals

    def test_predictions_too(self, cluster, client, pictures):
        images, labels = pictures(30)
        model = client.train(client.upload(images, labels, name="d"), name="m").result(20)
        cluster.replica()
        reach(client, 1)
        assert model.predict(images[:3], stem=False).indices.tolist() == labels[:3].tolist()
        assert cluster.replicas[0].calls["Predict"] == 1 and not cluster.calls["Predict"]

    def test_a_model_of_two_backbones_goes_through_the_gateway(self, cluster, client, pictures):
        images, labels = pictures(12)
        stems = [client.stem(name, cut="half") for name in (NAME, "other_net")]
        data = client.upload(images, labels, name="d", stem=stems)
        model = client.train(data, name="m").result(20)
        replica = cluster.replica()
        reach(client, 1)
        for keywords in ({}, {"batch_size": 2}):
            assert model.predict(images, **keywords).indices.tolist() == labels.tolist()
        assert cluster.calls["Predict"] == cluster.calls["StreamPredict"] == 1 and not replica.seen

    def test_the_least_busy_one_is_chosen(self, cluster, client, rows):
        first, second = cluster.replica(), cluster.replica()
        pool = reach(client, 2)
        busy, _ = pool.ready()
        pool.add_rows(busy, 5)
        for _ in range(4):
            one_row(client, rows)
        by_name = {one.name: one for one in (first, second)}
        assert not by_name.pop(busy.endpoint.replica).calls["Extract"]
        assert next(iter(by_name.values())).calls["Extract"] == 4
        pool.add_rows(busy, -5)

    def test_equal_ones_take_turns(self, cluster, client, rows):
        replicas = [cluster.replica() for _ in range(3)]
        reach(client, 3)._random_float = random.Random(1).random
        for _ in range(30):
            one_row(client, rows)
        assert all(one.calls["Extract"] >= 3 for one in replicas)

    def test_overload_of_one_is_another_ones_work(self, cluster, client, rows):
        first, second = cluster.replica(), cluster.replica()
        reach(client, 2)
        client._calls.caller.sleep = lambda seconds: pytest.fail("waited")
        first.faults.overload_calls["Extract"] = second.faults.overload_calls["Extract"] = 0
        first.faults.overload_calls["Extract"] = 100
        for _ in range(6):
            one_row(client, rows)
        assert second.calls["Extract"] == 6 and not cluster.calls["Extract"]

    def test_overload_of_all_is_waited_out(self, cluster, client, rows, expected):
        replicas = [cluster.replica(), cluster.replica()]
        reach(client, 2)
        waited = []
        client._calls.caller.sleep = waited.append
        for one in replicas:
            one.faults.overload_calls["Extract"] = 2
        np.testing.assert_array_equal(one_row(client, rows), expected[:1])
        assert len(waited) == 2 and min(waited) >= 0.05
        assert sum(one.calls["Extract"] for one in replicas) == 5 and not cluster.calls["Extract"]

    def test_an_error_of_the_rows_is_the_callers(self, cluster, client, rows):
        replica = cluster.replica()
        reach(client, 1)
        replica.faults.raise_internally = True
        with pytest.raises(trunkline.InternalError) as caught:
            one_row(client, rows)
        assert caught.value.request_id in replica.request_ids and not cluster.calls["Extract"]
        assert len(pool_of(client).ready()) == 1

    def test_many_callers_at_once(self, cluster, client, rows, expected):
        replicas = [cluster.replica(), cluster.replica()]
        pool = reach(client, 2)
        wrong = []

        def call(start):
            for row in range(start, start + 4):
                found = client.extract_features(rows[0][row : row + 1], space=rows[1])
                if not np.array_equal(found, expected[row : row + 1]):
                    wrong.append(row)

        threads = [threading.Thread(target=call, args=(start % 36,)) for start in range(32)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(30)
        assert not wrong and not cluster.calls["Extract"]
        assert sum(one.calls["Extract"] for one in replicas) == 128 and not replicas[0].refusals + replicas[1].refusals
        assert all(one.outstanding == one.num_calls == 0 for one in pool.ready())


class TestTickets:
    def test_one_that_ends_in_the_middle_is_renewed(self, cluster, client, rows, expected):
        replica = cluster.replica()
        pool = reach(client, 1)
        one_row(client, rows)
        cluster.revoke()
        np.testing.assert_array_equal(one_row(client, rows), expected[:1])
        assert replica.refusals == {"unknown ticket": 1} and cluster.calls["Extract"] == 1
        assert pool.wait(lambda one: one.num_ready == 1, 10)
        np.testing.assert_array_equal(one_row(client, rows), expected[:1])
        assert cluster.calls["Extract"] == 1 and cluster.calls["GetEndpoints"] == 2
        # The same channel, the same count: a number is never used twice whatever the ticket.
        assert len(set(replica.peers)) == 1 and [number for _, number, _ in replica.seen] == [1, 3]

    def test_is_renewed_in_time(self, cluster, client, rows):
        cluster.valid_s = 1.5
        replica = cluster.replica()
        reach(client, 1)
        for _ in range(3):
            assert cluster.asked.acquire(timeout=60)
            one_row(client, rows)
        assert not replica.refusals and len({ticket for ticket, _, _ in replica.seen}) >= 2

    def test_a_replica_that_refuses_everyone_is_left_alone(self, cluster, client, rows, expected):
        replica = cluster.replica()
        pool = reach(client, 1)
        replica.refuses_all = True
        for _ in range(5):
            np.testing.assert_array_equal(one_row(client, rows), expected[:1])
            pool.wait(lambda one: one.num_ready == 1, 0.05)
        assert 1 <= replica.refusals["expired"] <= 3 and cluster.calls["GetEndpoints"] <= 4

    def test_forged_and_replayed_proofs_end_at_the_gateway(self, cluster, client, rows, expected):
        replica = cluster.replica()
        pool = reach(client, 1)
        one_row(client, rows)
        (ready,) = pool.ready()
        ready._numbers = iter([1])  # used already
        np.testing.assert_array_equal(one_row(client, rows), expected[:1])
        pool.wait(lambda one: one.num_ready == 1, 10)
        ticket, key = ready._shown
        ready._shown, ready._numbers = (ticket, b"another key" + key), iter([99])
        np.testing.assert_array_equal(one_row(client, rows), expected[:1])
        assert replica.refusals == {"replayed": 1, "forged": 1} and cluster.calls["Extract"] == 2

    def test_the_token_stays_with_the_gateway(self, cluster, client, rows):
        replica = cluster.replica()
        reach(client, 1)
        one_row(client, rows)
        streamed(client, rows)
        assert not replica.refusals["a token was shown"] and len(replica.seen) == 2

    def test_grpc_itself_repeats_nothing(self, cluster, client, rows, expected):
        """A lost answer: the proof is not shown again, the gateway answers."""
        replica = cluster.replica()
        reach(client, 1)
        replica.faults.lose_answer["Extract"] = 1
        np.testing.assert_array_equal(one_row(client, rows), expected[:1])
        assert replica.calls["Extract"] == cluster.calls["Extract"] == 1 and not replica.refusals


class TestOutOfReach:
    def test_nothing_listens(self, cluster, client, rows, expected, monkeypatch):
        monkeypatch.setattr(pool_module, "CONNECT_S", 0.3)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        cluster.listed.append(Endpoint(f"127.0.0.1:{port}", "gone"))
        pool = pool_of(client)
        for _ in range(3):
            np.testing.assert_array_equal(one_row(client, rows), expected[:1])
        assert pool.wait(lambda one: one.is_settled, 10) and pool.num_ready == 0
        assert "no connection to" in pool.why and cluster.calls["Extract"] == 3
        np.testing.assert_array_equal(streamed(client, rows), expected)

    def test_something_listens_and_never_answers(self, cluster, client, rows, expected, monkeypatch):
        monkeypatch.setattr(pool_module, "CONNECT_S", 0.3)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            cluster.listed.append(Endpoint(f"127.0.0.1:{silent.getsockname()[1]}", "silent"))
            replica = cluster.replica()
            pool = reach(client, 1)
            for _ in range(3):
                np.testing.assert_array_equal(one_row(client, rows), expected[:1])
            np.testing.assert_array_equal(streamed(client, rows), expected)
            assert replica.calls["Extract"] == 3 and not cluster.calls["Extract"] + cluster.calls["StreamExtract"]
            assert pool.wait(lambda one: one.is_settled, 10) and (pool.num_listed, pool.num_ready) == (2, 1)

    def test_none_listen_themselves(self, cluster, client, rows, expected):
        pool = pool_of(client)
        assert pool.wait(lambda one: one.is_settled, 10)
        for _ in range(3):
            one_row(client, rows)
        np.testing.assert_array_equal(streamed(client, rows), expected)
        assert pool.why == "no replica listens itself" and cluster.calls["GetEndpoints"] == 1

    def test_old_cluster(self, cluster, client, rows, expected):
        cluster.faults.is_old = True
        pool = pool_of(client)
        assert pool.wait(lambda one: one.is_settled, 10)
        np.testing.assert_array_equal(streamed(client, rows), expected)
        assert pool.why == "the cluster is of a version that has none" and cluster.calls["GetEndpoints"] == 1

    def test_a_gateway_that_does_not_say(self, cluster, client, rows, expected):
        cluster.faults.overload_calls["GetEndpoints"] = 100
        pool = pool_of(client)
        assert pool.wait(lambda one: one.is_settled, 10)
        np.testing.assert_array_equal(one_row(client, rows), expected[:1])
        assert "queues are full" in pool.why and cluster.calls["GetEndpoints"] == 1

    def test_switched_off(self, cluster, rows, monkeypatch):
        replica = cluster.replica()
        monkeypatch.setenv("TRUNKLINE_DIRECT", "0")
        with connect(cluster) as plain, connect(cluster, direct=True) as direct:
            assert not plain.settings.direct and direct.settings.direct
            for _ in range(3):
                one_row(plain, rows)
            streamed(plain, rows)
            assert pool_of(plain) is None and not cluster.calls["GetEndpoints"] and not replica.seen
            reach(direct, 1)

    def test_one_that_dies_is_replaced(self, cluster, client, rows, expected):
        first = cluster.replica()
        pool = reach(client, 1)
        one_row(client, rows)
        cluster.listed.clear()
        second = cluster.replica()
        first.stop().wait(60)
        np.testing.assert_array_equal(one_row(client, rows), expected[:1])
        assert pool.wait(lambda one: [x.endpoint.replica for x in one.ready()] == [second.name], 20)
        answered = second.calls["Extract"]
        one_row(client, rows)
        assert second.calls["Extract"] == answered + 1


class TestStreams:
    def test_one_replica_is_one_stream(self, cluster, client, rows, expected):
        replica = cluster.replica()
        reach(client, 1)
        np.testing.assert_array_equal(streamed(client, rows), expected)
        assert replica.calls["StreamExtract"] == 1 and replica.batches == 20 and not cluster.calls["StreamExtract"]

    def test_replicas_share_and_a_slow_one_gets_fewer(self, cluster, client, rows, expected):
        slow, quick = cluster.replica(), cluster.replica()
        reach(client, 2)
        go_on = threading.Event()
        slow.hook = lambda number: go_on.wait(20)
        # The slow one holds what it has, two at most, until the quick one has answered all the others.
        quick.hook = lambda number: quick.batches >= 17 and go_on.set()
        np.testing.assert_array_equal(streamed(client, rows, max_in_flight=2), expected)
        assert (slow.batches, quick.batches) == (2, 18) and not cluster.calls["StreamExtract"]

    def test_few_batches_are_spread_evenly(self, cluster, client, rows, expected):
        replicas = [cluster.replica() for _ in range(3)]
        reach(client, 3)
        both = threading.Barrier(2)
        for one in replicas:
            one.hook = lambda number: both.wait(60)
        np.testing.assert_array_equal(streamed(client, rows, batch=20), expected)
        assert sorted(one.batches for one in replicas) == [0, 1, 1]

    def test_window_counts_for_each_replica(self, cluster, client, rows):
        replicas = [cluster.replica() for _ in range(2)]
        pool = reach(client, 2)
        both, rows_under_way = threading.Barrier(2), []

        def hook(number):
            if number == 0:
                both.wait(60)
            rows_under_way.extend(one.outstanding for one in pool.ready())

        for one in replicas:
            one.hook = hook
        streamed(client, rows, max_in_flight=1)
        assert max(rows_under_way) == 2 and all(one.outstanding == 0 for one in pool.ready())

    @pytest.mark.parametrize("others", [0, 1])
    def test_one_that_breaks_off(self, cluster, client, rows, expected, others):
        """The stream ends in the middle; what it has not answered goes elsewhere. Answered once, in order, equal."""
        broken = cluster.replica()
        replicas = [cluster.replica() for _ in range(others)]
        reach(client, 1 + others)
        broken.faults.drop_predict_after = [3]
        np.testing.assert_array_equal(streamed(client, rows, max_in_flight=2), expected)
        assert broken.batches >= 3 and cluster.calls["StreamExtract"] == (0 if others else 1)
        assert sum(one.trunk_rows for one in (*replicas, broken, cluster)) == 40

    @pytest.mark.parametrize("others", [0, 1])
    def test_one_that_dies(self, cluster, client, rows, expected, others):
        dying = cluster.replica()
        for _ in range(others):
            cluster.replica()
        reach(client, 1 + others)
        dying.hook = lambda number: number == 2 and dying.stop(0.0)
        np.testing.assert_array_equal(streamed(client, rows, max_in_flight=2), expected)
        assert cluster.calls["StreamExtract"] == (0 if others else 1)

    def test_one_that_is_not_listed_any_more_answers_what_it_has(self, cluster, client, rows, expected):
        """The list changes in the middle of a stream: nothing more is sent there, nothing is sent twice."""
        cluster.valid_s = 1.0
        leaving, staying = cluster.replica(), cluster.replica()
        pool = reach(client, 2)

        def wait(number):
            if number == 3:
                assert pool.wait(lambda one: [x.endpoint for x in one._ready] == [staying.endpoint], 10)

        def leave(number):
            if number == 3:
                cluster.listed.remove(leaving.endpoint)
            wait(number)

        leaving.hook, staying.hook = leave, wait
        np.testing.assert_array_equal(streamed(client, rows, max_in_flight=2), expected)
        assert leaving.trunk_rows + staying.trunk_rows == 40 and leaving.batches <= 6
        assert not cluster.calls["StreamExtract"]

    def test_a_batch_that_is_sent_away_goes_to_the_gateway(self, cluster, client, rows, expected):
        replica = cluster.replica()
        reach(client, 1)
        replica.faults.batch_error = WireError(ErrorCode.UNAVAILABLE, "ending")
        np.testing.assert_array_equal(streamed(client, rows), expected)
        assert cluster.calls["StreamExtract"] == 1

    def test_a_batch_that_is_refused_by_one_goes_to_the_other(self, cluster, client, rows, expected):
        full, other = cluster.replica(), cluster.replica()
        reach(client, 2)
        full.faults.overload_batches = 10
        np.testing.assert_array_equal(streamed(client, rows), expected)
        assert other.trunk_rows > 0 and not cluster.calls["StreamExtract"]

    def test_a_batch_that_fails_is_one_of_its_rows(self, cluster, client, pictures):
        images, labels = pictures(12)
        model = client.train(client.upload(images, labels, name="d"), name="m").result(20)
        replica = cluster.replica()
        reach(client, 1)
        replica.faults.batch_error = WireError(ErrorCode.WORKER_OOM, "out of memory")
        prediction = model.predict(images, stem=False, batch_size=4)
        assert sorted(prediction.errors) == [4, 5, 6, 7] and replica.calls["StreamPredict"] == 1

    def test_replicas_join_while_the_gateway_answers(self, cluster, client, rows, expected, monkeypatch):
        monkeypatch.setattr(pool_module, "NONE_AGAIN_S", 0.05)
        replica_answers = threading.Event()

        def before(number):
            if number == 2:
                cluster.replica().hook = lambda _: replica_answers.set()
            if number == 3:
                assert replica_answers.wait(60)

        cluster.before_batch = before
        np.testing.assert_array_equal(streamed(client, rows), expected)
        (replica,) = cluster.replicas
        assert replica.trunk_rows > 0 and replica.trunk_rows + cluster.trunk_rows == 40

    def test_ticket_that_ends_between_streams(self, cluster, client, rows, expected):
        replica = cluster.replica()
        pool = reach(client, 1)
        cluster.revoke()
        np.testing.assert_array_equal(streamed(client, rows), expected)
        assert replica.refusals == {"unknown ticket": 1}
        assert pool.wait(lambda one: one.num_ready == 1, 10)
        before = cluster.calls["StreamExtract"]
        np.testing.assert_array_equal(streamed(client, rows), expected)
        assert cluster.calls["StreamExtract"] == before and len(replica.seen) >= 1

    def test_answers_that_are_not_taken_hold_the_senders_back(self, cluster, client, rows):
        replicas = [cluster.replica() for _ in range(2)]
        reach(client, 2)
        pulled, more = [], threading.Event()

        def source():
            for number in range(30):
                pulled.append(number)
                if number > 4:
                    more.set()
                yield Batch(rows[0][number : number + 1], (number,))

        answers = client._calls.inference.stream_extract(rows[1], source(), (), window=2, deadline=Deadline(20))
        next(answers)
        # Two for each replica, and the one that was taken.
        assert not more.wait(0.3)
        assert len(list(answers)) == 29 and sum(one.batches for one in replicas) == 30

    def test_given_up_in_the_middle(self, cluster, client, rows):
        replica = cluster.replica()
        pool = reach(client, 1)
        batches = iter([Batch(rows[0][:1], (0,))] * 30)
        answers = client._calls.inference.stream_extract(rows[1], batches, (), window=2, deadline=Deadline(20))
        next(answers)
        answers.close()
        for one in threading.enumerate():
            if one.name == "trunkline-stream":
                one.join(60)
        assert [(one.num_calls, one.outstanding) for one in pool.ready()] == [(0, 0)] and replica.batches < 30


class TestSafety:
    @pytest.fixture
    def secure(self, tmp_path):
        cert, key = certificate(tmp_path, "replica.example", expires_in_s=86400, dns=("replica.example", "localhost"))
        self.pem = (Path(key).read_bytes(), Path(cert).read_bytes())
        self.ca_file = cert
        with FakeCluster(tls=self.pem) as running:
            yield running

    def connect(self, cluster):
        return trunkline.connect(cluster.address, token=cluster.token, ca_file=self.ca_file, timeout_s=20.0)

    def rows(self, client):
        stem = client.stem(NAME, cut="half", codec="float32")
        return np.random.default_rng(7).random((8, *stem.feature_shape), dtype=np.float32), stem.space

    def test_tls_with_the_same_trust_and_the_name_given(self, secure, tmp_path):
        """The replica's certificate does not know its address, and is trusted by the same file as the gateway's."""
        (tmp_path / "own").mkdir()
        cert, key = certificate(tmp_path / "own", "replica", expires_in_s=86400, dns=("replica.example",), addresses=())
        with Path(self.ca_file).open("ab") as trusted:
            trusted.write(Path(cert).read_bytes())
        replica = secure.replica(tls=(Path(key).read_bytes(), Path(cert).read_bytes()))
        secure.tls_name = "replica.example"
        with self.connect(secure) as client:
            rows = self.rows(client)
            reach(client, 1)
            one_row(client, rows)
        assert replica.calls["Extract"] == 1

    def test_another_name_is_not_accepted(self, secure, monkeypatch):
        monkeypatch.setattr(pool_module, "CONNECT_S", 0.5)
        replica = secure.replica(tls=self.pem)
        secure.tls_name = "stranger.example"
        with self.connect(secure) as client:
            pool = pool_of(client)
            assert pool.wait(lambda one: one.is_settled, 10) and not pool.num_ready
            one_row(client, self.rows(client))
        assert not replica.request_ids and secure.calls["Extract"] == 1

    def test_another_certificate_is_not_accepted(self, secure, tmp_path, monkeypatch):
        monkeypatch.setattr(pool_module, "CONNECT_S", 0.5)
        (tmp_path / "other").mkdir()
        cert, key = certificate(tmp_path / "other", "localhost", expires_in_s=86400)
        replica = secure.replica(tls=(Path(key).read_bytes(), Path(cert).read_bytes()))
        with self.connect(secure) as client:
            pool = pool_of(client)
            assert pool.wait(lambda one: one.is_settled, 10) and not pool.num_ready
            one_row(client, self.rows(client))
        assert not replica.request_ids and secure.calls["Extract"] == 1

    def test_never_from_tls_to_plaintext(self, secure):
        replica = secure.replica()
        secure.replicas_tls = False
        with self.connect(secure) as client:
            pool = pool_of(client)
            assert pool.wait(lambda one: one.is_settled, 10)
            one_row(client, self.rows(client))
            assert not pool.num_ready and "not encrypted" in pool.why
        assert not replica.seen and not replica.request_ids and secure.calls["Extract"] == 1


def checks(cluster, **keywords):
    found = examine(lambda: resolve(cluster.address, token=cluster.token, **keywords))
    return {one.name: one for one in found}


class TestDoctor:
    def test_all(self, cluster):
        for _ in range(2):
            cluster.replica()
        found = checks(cluster)["direct"]
        assert (found.status, found.detail) == ("ok", "2 of 2 replicas of fake_net, 2 of 2 replicas of other_net")

    def test_some(self, cluster):
        cluster.replica()
        with socket.create_server(("127.0.0.1", 0)) as silent:
            cluster.listed.append(Endpoint(f"127.0.0.1:{silent.getsockname()[1]}", "silent"))
            found = checks(cluster)["direct"]
        assert found.status == "warn" and "1 of 2 replicas of fake_net" in found.detail and "firewall" in found.fix

    def test_none(self, cluster):
        found = checks(cluster)["direct"]
        assert (found.status, found.fix) == ("ok", "") and "no replica listens itself" in found.detail

    def test_switched_off(self, cluster):
        found = checks(cluster, direct=False)["direct"]
        assert found.status == "ok" and found.detail == "switched off (from argument)"

    def test_old(self, cluster):
        cluster.faults.is_old = True
        assert "version that has none" in checks(cluster)["direct"].detail


class TestProcess:
    def test_closed(self, cluster, rows):
        replica = cluster.replica()
        with connect(cluster) as client:
            pool = reach(client, 1)
            (ready,) = pool.ready()
            one_row(client, rows)
            channel = ready._channel
        client._calls.direct.join(60)
        with pytest.raises(ValueError, match="closed channel"):
            channel.unary_unary("/any")(b"")
        with pytest.raises(trunkline.ConfigError, match="closed"):
            one_row(client, rows)
        assert len(replica.seen) == 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_forked_children_have_connections_of_their_own(self, expected_of_fork):
        """The cluster is another process: its threads would forbid gRPC to prepare for a fork."""
        client, rows, expected, counts = expected_of_fork
        np.testing.assert_array_equal(one_row(client, rows), expected)
        for _ in range(3):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    reach(client, 1)
                    found = one_row(client, rows)
                    client.close()
                    os.write(writing, b"ok" if np.array_equal(found, expected) else b"wrong")
                except BaseException as error:
                    os.write(writing, repr(error).encode())
                finally:
                    os._exit(0)
            os.close(writing)
            with os.fdopen(reading, "rb") as pipe:
                assert pipe.read() == b"ok"
            os.waitpid(child, 0)
        np.testing.assert_array_equal(one_row(client, rows), expected)
        # The parent twice over one connection, each child over its own, each process with a ticket of its own.
        assert counts() == {"peers": 4, "tickets": 4, "calls": 5, "refusals": 0, "by_gateway": 1}

    @pytest.fixture
    def expected_of_fork(self):
        command = [sys.executable, str(Path(__file__).parent / "direct_double.py")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            address, token = server.stdout.readline().split()

            def counts():
                server.stdin.close()
                return json.loads(server.stdout.readline())

            try:
                with trunkline.connect(address, token=token, timeout_s=20.0) as client:
                    stem = client.stem(NAME, cut="half", codec="float32")
                    rows = np.random.default_rng(7).random((1, *stem.feature_shape), dtype=np.float32), stem.space
                    expected = one_row(client, rows)
                    reach(client, 1)
                    yield client, rows, expected, counts
            finally:
                server.kill()
