"""A sweep of convolutional heads on a cluster: Ray Tune inside a lane, with a failure, and cancelled in the middle."""

import contextlib
import time

import pytest
import trunkline
from clusters import EmbeddedCluster, digits

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

TRIAL = "ray::ImplicitFunc"
"""What the process of a trial is called."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    running = EmbeddedCluster(tmp_path_factory.mktemp("sweep"))
    try:
        yield running.up()
    finally:
        left = running.down()
    assert left == []


@pytest.fixture(scope="module")
def client(served):
    with served.connect() as connected:
        yield connected


@pytest.fixture(scope="module")
def data(client):
    pictures, labels = digits(60)
    return client.upload(pictures, labels, name="digits", input_size=64)


def wait_for(condition, job, seconds=240):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, job.status()
        time.sleep(0.2)


def trials_running(served):
    return [title for title in served.titles() if title.startswith(TRIAL)]


def test_convolutional_heads_are_tried_in_processes_of_their_own_and_can_be_cancelled(served, client, data):
    conv = trunkline.Conv(channels=(4,))
    endless = client.sweep(data, name="endless", head=conv, learning_rate=[0.01, 0.02], folds=2, epochs=100_000)
    wait_for(lambda: trials_running(served), endless)
    endless.cancel()
    with pytest.raises(trunkline.JobCancelledError):
        endless.result(timeout_s=90)
    wait_for(lambda: not trials_running(served), endless)

    # The last learning rate is refused: that configuration fails, and the others do not mind.
    job = client.sweep(
        data, name="best", head=conv, learning_rate=[0.01, 0.003, 11.0], l2=[0.05], folds=2, epochs=3, validation=0.3
    )
    best = job.result(timeout_s=240)
    assert [bool(one.error) for one in best.trials] == [False, False, True]
    assert "at most 10" in best.trials[2].error
    assert all(len(one.scores) == 2 and one.seconds > 0 for one in best.trials[:2])
    assert [one.won for one in best.trials].count(True) == 1
    assert best.head.channels == (4,)
    assert len(best.predict(digits(3)[0]).labels) == 3
    # What Tune kept meanwhile is gone.
    left = []
    with contextlib.suppress(FileNotFoundError):
        left = list((served.state_dir / "data" / "train" / "trials").iterdir())
    assert left == []
