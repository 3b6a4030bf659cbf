"""Kill -9 of the controller and of a replica, with a caller that goes past the gateway."""

import os
import signal
import time

import grpc
import numpy as np
import pytest
from direct_calls import ByHand
from direct_fakes import Caller
from trunkline_worker.serving.endpoints import FORGET_S, LIST_TTL_S

pytestmark = pytest.mark.ray

BACK_WITHIN_S = 120.0
"""A bound that only a hang would break."""


@pytest.fixture
def by_hand(cluster):
    caller = ByHand(cluster)
    yield caller
    caller.close()


def kill(cluster, title):
    os.kill(cluster.pid_of(title), signal.SIGKILL)


def test_tickets_outlive_the_controller_and_new_ones_are_given_soon(cluster, by_hand):
    before = by_hand.endpoints_that(lambda one: one.endpoints, BACK_WITHIN_S)
    request, caller = by_hand.request(), Caller(before)
    expected = by_hand.direct(request, before, caller)
    kill(cluster, "ray::Controller")
    # After this long, what the gateway says can only come from the new controller, with another secret.
    surely_new = time.monotonic() + FORGET_S + LIST_TTL_S
    deadline = time.monotonic() + BACK_WITHIN_S
    while True:
        late = time.monotonic() >= surely_new
        found = by_hand.endpoints()  # an answer without endpoints is one; an error is none
        if found.endpoints:
            assert found.endpoints == before.endpoints
            np.testing.assert_array_equal(by_hand.direct(request, found), expected)
            if late:
                break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    np.testing.assert_array_equal(by_hand.direct(request, before, caller), expected)


def test_a_replica_that_died_is_forgotten_and_its_successor_is_found(cluster, by_hand):
    before = by_hand.endpoints_that(lambda one: one.endpoints, BACK_WITHIN_S)
    request, old = by_hand.request(), before.endpoints[0]
    expected = by_hand.direct(request, before)
    kill(cluster, "ray::ServeReplica:trunkline-backbone")
    with pytest.raises(grpc.RpcError) as caught:
        by_hand.direct(request, before)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    after = by_hand.endpoints_that(lambda one: one.endpoints and old not in one.endpoints, BACK_WITHIN_S)
    assert after.endpoints[0].replica != old.replica
    np.testing.assert_allclose(by_hand.direct(request, after), expected, rtol=0, atol=1e-3)
