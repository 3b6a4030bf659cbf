"""Connections that break, clusters that refuse, data that arrives damaged: what the client makes of it."""

import os
import signal
import threading
import time

import grpc
import numpy as np
import pytest
import trunkline
from trunkline import JobState
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.limits import CHUNK_BYTES


@pytest.fixture
def model(fake_client, pictures):
    """Train a model on images."""
    return fake_client.train(fake_client.upload(*pictures(30), name="train"), name="m").result(20)


@pytest.fixture
def many(fake_client):
    """Make features that need six chunks, and their labels."""
    size = 256
    stem = fake_client.stem("fake_net", cut="half", input_size=size, codec="float32")
    rows = 6 * (CHUNK_BYTES // (3 * (size // 2) ** 2 * 4)) - 2
    features = np.random.default_rng().random((rows, *stem.feature_shape), dtype=np.float32)
    return features, np.arange(rows) % 2, stem.space


class TestUpload:
    def test_goes_on_after_broken_connections(self, fake, fake_client, many):
        features, labels, space = many
        fake.faults.drop_upload_after = [2, 0, 1]
        data = fake_client.upload_features(features, labels, name="d", space=space)
        assert fake.calls["UploadRows"] >= 3
        assert len(fake.rows["default"]) == len(features) == data.num_rows
        # What was acknowledged was not sent again.
        assert fake.received_chunks == 6
        # After a break it asks what is missing.
        assert fake.calls["FindMissingRows"] >= 3

    def test_gives_up_where_nothing_gets_through(self, fake, fake_client, many, monkeypatch):
        monkeypatch.setattr(fake_client._calls.caller, "sleep", lambda seconds: None)
        features, labels, space = many
        fake.faults.drop_upload_after = [0] * 100
        with pytest.raises(trunkline.ServiceUnavailableError):
            fake_client.upload_features(features, labels, name="d", space=space)
        assert fake.calls["UploadRows"] < 20

    def test_one_deadline_over_all_tries(self, fake, fake_client, many):
        features, labels, space = many
        fake.faults.drop_upload_after = [0] * 1000
        started = time.monotonic()
        with pytest.raises((trunkline.ServiceUnavailableError, trunkline.DeadlineExceededError)):
            fake_client.upload_features(features, labels, name="d", space=space, timeout_s=0.4)
        assert time.monotonic() - started < 10.0  # half of what the client allows otherwise

    def test_sends_a_damaged_chunk_again(self, fake, fake_client, many):
        features, labels, space = many
        fake.faults.damage_chunks = 2
        data = fake_client.upload_features(features, labels, name="d", space=space)
        assert data.report.chunks_sent == 6 + 2 and fake.received_chunks == 8

    def test_says_that_the_disk_is_full_and_goes_on_later(self, fake, fake_client, many):
        features, labels, space = many
        fake.faults.storage_full = True
        with pytest.raises(trunkline.StorageFullError, match="Make room"):
            fake_client.upload_features(features, labels, name="d", space=space)
        fake.faults.storage_full = False
        assert fake_client.upload_features(features, labels, name="d", space=space).num_rows == len(features)

    def test_a_lost_answer_makes_one_dataset(self, fake, fake_client, pictures):
        fake.faults.lose_answer["CommitDataset"] = 2
        data = fake_client.upload(*pictures(6), name="d")
        assert (data.version, len(fake_client.datasets())) == (1, 1)
        assert fake.calls["CommitDataset"] == 3

    def test_computes_only_what_is_missing(self, fake_client, pictures, monkeypatch):
        stem = fake_client.stem("fake_net", cut="half")
        images, labels = pictures(8)
        fake_client.upload(images[:5], labels[:5], name="d", stem=stem)
        computed = []
        whole = stem.run
        monkeypatch.setattr(stem, "run", lambda rows: computed.extend(rows) or whole(rows))
        fake_client.upload(images, labels, name="d", stem=stem)
        assert len(computed) == 3

    def test_ends_with_the_error_of_a_row(self, fake, fake_client, pictures):
        images, labels = pictures(4)
        rows = [*images[:3], b"no image"]
        with pytest.raises(trunkline.CorruptImageError, match="row 3"):
            fake_client.upload(rows, labels, name="d", stem=fake_client.stem("fake_net", cut="half"))
        assert not fake_client.datasets()

    def test_bounds_what_is_in_flight(self, fake, fake_client, many, monkeypatch):
        from trunkline._calls import datasets

        monkeypatch.setattr(datasets, "UPLOAD_WINDOW", 2)
        features, labels, space = many
        gate, arrived = threading.Event(), threading.Semaphore(0)
        store, sent = fake.store, []
        fake.store = lambda *args: (arrived.release(), gate.wait(20), store(*args))[2]
        real = datasets._chunk_message
        monkeypatch.setattr(datasets, "_chunk_message", lambda *args: sent.append(1) or real(*args))
        thread = threading.Thread(
            target=lambda: fake_client.upload_features(features, labels, name="d", space=space), daemon=True
        )
        thread.start()
        assert arrived.acquire(timeout=60)
        waited = time.monotonic() + 0.3
        while time.monotonic() < waited:
            assert len(sent) <= 2
        gate.set()
        thread.join(20)
        assert len(sent) == 6


class TestPredict:
    def test_stream_goes_on_after_broken_connections(self, fake, model, pictures):
        images, labels = pictures(40)
        fake.faults.drop_predict_after = [3, 0, 1]
        prediction = model.predict(images, stem=False, batch_size=4)
        assert prediction.indices.tolist() == labels.tolist()
        assert fake.calls["StreamPredict"] == 4

    @pytest.mark.parametrize("window", [1, 3])
    def test_bounds_what_is_in_flight(self, model, pictures, monkeypatch, window):
        from trunkline._calls import inference

        made = []

        class Recorded(inference.Exchange):
            def __init__(self, source, window):
                super().__init__(source, window)
                made.append(window)

        monkeypatch.setattr(inference, "Exchange", Recorded)
        model.predict(pictures(12)[0], stem=False, batch_size=2, max_in_flight=window)
        assert made == [window]

    def test_overload_is_waited_out(self, fake, model, pictures):
        images, labels = pictures(20)
        fake.faults.overload_batches = 7
        fake.faults.overload_calls["Predict"] = 2
        assert model.predict(images, stem=False, batch_size=4).indices.tolist() == labels.tolist()
        assert model.predict(images[:2], stem=False).indices.tolist() == labels[:2].tolist()
        assert fake.calls["Predict"] == 3

    def test_overload_without_end(self, fake, model, pictures):
        fake.faults.overload_calls["Predict"] = 1000
        with pytest.raises(trunkline.OverloadedError) as caught:
            model.predict(pictures(2)[0], stem=False)
        assert caught.value.retry_delay_s == pytest.approx(0.05) and fake.calls["Predict"] == 5

    def test_error_of_a_batch_is_one_of_its_rows(self, fake, model, pictures):
        images, labels = pictures(12)
        fake.faults.batch_error = WireError(ErrorCode.WORKER_OOM, "out of memory")
        prediction = model.predict(images, stem=False, batch_size=4)
        assert sorted(prediction.errors) == [4, 5, 6, 7]
        assert isinstance(prediction.errors[4], trunkline.WorkerOutOfMemoryError)
        assert prediction.errors[4].request_id in fake.request_ids
        assert prediction.indices[[0, 11]].tolist() == labels[[0, 11]].tolist()

    def test_answer_to_nothing(self, fake, model, pictures):
        fake.faults.wrong_seq = True
        with pytest.raises(trunkline.InternalError, match="not under way"):
            model.predict(pictures(12)[0], stem=False, batch_size=4)

    def test_deadline_passes_under_way(self, fake, model, pictures):
        fake.faults.delay = threading.Event()
        started = time.monotonic()
        with pytest.raises(trunkline.DeadlineExceededError):
            model.predict(pictures(2)[0], stem=False, timeout_s=0.3)
        assert time.monotonic() - started < 10.0  # half of what the client allows otherwise

    def test_cluster_gone(self, fake, fake_client, model, pictures):
        fake._server.stop(0).wait(60)
        with pytest.raises(trunkline.ServiceUnavailableError, match="nothing listens"):
            model.predict(pictures(2)[0], stem=False, timeout_s=0.5)

    def test_internals_stay_inside(self, fake, fake_client):
        fake.faults.raise_internally = True
        with pytest.raises(trunkline.InternalError) as caught:
            fake_client.backbones()
        assert "secret" not in str(caught.value)
        assert caught.value.request_id == fake.request_ids[-1]


class TestStem:
    def test_damaged_or_cut_off_is_fetched_again(self, fake, fake_client, pictures):
        fake.faults.damage_stems = 1
        fake.faults.cut_stems = 1
        fake_client.stem("fake_net", cut="half")(pictures(2)[0])
        assert fake.calls["FetchStem"] == 3

    def test_always_damaged(self, fake, fake_client, monkeypatch, tmp_path):
        monkeypatch.setattr(fake_client._calls.caller, "sleep", lambda seconds: None)
        fake.faults.damage_stems = 100
        with pytest.raises(trunkline.CorruptDataError, match="checksum"):
            fake_client.stem("fake_net", cut="half")
        assert not list(tmp_path.rglob("*.onnx"))

    def test_damaged_cache_is_fetched_again(self, fake, fake_client, tmp_path):
        fake_client.stem("fake_net", cut="half")
        (path,) = tmp_path.rglob("*.onnx")
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        with trunkline.connect(fake.address, token=fake.token) as again:
            again.stem("fake_net", cut="half")
        assert path.read_bytes() == good and fake.calls["FetchStem"] == 2
        with trunkline.connect(fake.address, token=fake.token) as again:
            again.stem("fake_net", cut="half")
        assert fake.calls["FetchStem"] == 2

    def test_without_onnxruntime(self, fake, fake_client, model, pictures, monkeypatch):
        monkeypatch.setattr("trunkline._onnx.has_onnxruntime", lambda: False)
        monkeypatch.setattr("trunkline.models.has_onnxruntime", lambda: False)
        with pytest.raises(trunkline.MissingExtraError, match=r"pip install 'trunkline\[stem\]'"):
            fake_client.stem("fake_net", cut="half")
        assert not fake.calls["FetchStem"]
        assert not model.predict(pictures(3)[0]).errors


class TestJobs:
    def test_events_go_on_after_broken_connections(self, fake, fake_client, pictures):
        fake.faults.drop_watch_after = [1, 0, 1]
        job = fake_client.train(fake_client.upload(*pictures(6), name="d"), name="m")
        events = list(job.events(timeout_s=20))
        assert [one.seq for one in events] == [1, 2, 3, 4]
        assert fake.calls["WatchJob"] == 4

    def test_a_lost_answer_makes_one_job(self, fake, fake_client, pictures):
        data = fake_client.upload(*pictures(6), name="d")
        fake.faults.lose_answer["SubmitJob"] = 1
        job = fake_client.train(data, name="m")
        assert [one.id for one in fake_client.jobs()] == [job.id]
        assert job.result(20).version == 1

    def test_failed_job(self, fake, fake_client, pictures):
        fake.faults.job_error = WireError(ErrorCode.STORAGE_FULL, "the disk is full")
        job = fake_client.train(fake_client.upload(*pictures(6), name="d"), name="m")
        with pytest.raises(trunkline.JobFailedError, match="the disk is full") as caught:
            job.result(20)
        assert (caught.value.code, caught.value.job_id) == (ErrorCode.STORAGE_FULL, job.id)
        assert job.status().state is JobState.FAILED

    def test_cancelled_job(self, fake, fake_client, pictures):
        fake.faults.hold_jobs = threading.Event()
        job = fake_client.train(fake_client.upload(*pictures(6), name="d"), name="m")
        job.cancel()
        with pytest.raises(trunkline.JobCancelledError):
            job.result(20)

    def test_a_lost_answer_to_cancelling_is_no_error(self, fake, fake_client, pictures):
        fake.faults.hold_jobs = threading.Event()
        job = fake_client.train(fake_client.upload(*pictures(6), name="d"), name="m")
        fake.faults.lose_answer["CancelJob"] = 2
        job.cancel()
        assert fake.calls["CancelJob"] == 3
        with pytest.raises(trunkline.JobCancelledError):
            job.result(20)

    def test_waiting_ends_and_the_job_goes_on(self, fake, fake_client, pictures):
        fake.faults.hold_jobs = threading.Event()
        job = fake_client.train(fake_client.upload(*pictures(6), name="d"), name="m")
        with pytest.raises(trunkline.DeadlineExceededError, match="goes on"):
            job.result(0.3)
        fake.faults.hold_jobs.set()
        assert job.result(20).name == "m"

    def test_interrupting_says_that_the_job_goes_on(self, fake, fake_client, pictures, capsys, terminal):
        fake.faults.hold_jobs = threading.Event()
        job = fake_client.train(fake_client.upload(*pictures(6), name="d"), name="m")
        main = threading.main_thread().ident

        def interrupt():
            assert fake.faults.watched.wait(20)
            signal.pthread_kill(main, signal.SIGINT)

        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            job.result(20)
        interrupting.join()
        said = capsys.readouterr().err
        assert "goes on" in said and f"client.job({job.id!r})" in said
        fake.faults.hold_jobs.set()
        assert job.result(20).name == "m"


def test_other_wire_version(fake):
    fake.faults.wire_version = 99
    with pytest.raises(trunkline.IncompatibleModelError, match="wire version 99"):
        trunkline.connect(fake.address, token=fake.token)


def test_every_call_has_an_id_of_its_own(fake, fake_client):
    fake_client.backbones()
    fake_client.models()
    assert len(set(fake.request_ids)) == len(fake.request_ids) == 3


def test_closed_client(fake_client):
    fake_client.close()
    with pytest.raises(trunkline.ConfigError, match="closed"):
        fake_client.backbones()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forked_child_has_a_channel_of_its_own(fake, fake_client):
    fake_client.backbones()
    parents = fake_client._calls.connection.channel
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # Some versions of gRPC mend a channel after a fork, others hang: we rely on none of them.
            own = fake_client._calls.connection.channel is not parents
            works = fake_client.backbones(timeout_s=10)[0].name == "fake_net"
            os.write(writing, b"ok" if own and works else b"wrong")
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"ok"
    os.waitpid(child, 0)
    assert fake_client.backbones()
    # connect, parent | child | parent: the child must not write into the parent's socket.
    *parent, of_child, again = fake.peers
    assert set(parent) == {again} and of_child != again


def test_a_stream_that_the_gateway_cancels_goes_on_over_another(fake, fake_client, monkeypatch):
    """A gateway that is stopped without any grace cancels what it is at."""
    caller = fake_client._calls.caller
    monkeypatch.setattr(caller, "sleep", lambda seconds: None)
    real, cancelled = caller.connection.stub, []

    class Cancelled(grpc.RpcError):
        def code(self):
            return grpc.StatusCode.CANCELLED

        def details(self):
            return "CANCELLED"

        def trailing_metadata(self):
            return ()

        def __iter__(self):
            return self

        def __next__(self):
            raise self

        def cancel(self):
            pass

    class Stub:
        def __init__(self, stub):
            self.stub = stub

        def __getattr__(self, name):
            if name != "StreamExtract" or cancelled:
                return getattr(self.stub, name)
            cancelled.append(name)
            return lambda requests, **_: Cancelled()

    monkeypatch.setattr(caller.connection, "stub", lambda kind: Stub(real(kind)))
    spec = fake_client.describe("fake_net")
    cut = spec.cuts[-1]
    rows = np.ones((6, *cut.feature_shape), np.float32)
    embedding = fake_client.extract_features(rows, space=spec.space(cut), batch_size=2)
    assert cancelled == ["StreamExtract"] and len(embedding) == 6
