"""A backbone's replica of a real cluster, reached past the gateway."""

import grpc
import numpy as np
import pytest
from direct_calls import EXTRACT, ByHand
from direct_fakes import Caller
from trunkline_wire.hosts import is_loopback

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def by_hand(cluster):
    caller = ByHand(cluster)
    yield caller
    caller.close()


@pytest.fixture(scope="module")
def found(by_hand):
    """Its endpoints: announced within a sign of life or two."""
    return by_hand.endpoints_that(lambda one: one.endpoints, within_s=60)


def test_a_replica_answers_as_the_gateway_does(by_hand, found):
    request = by_hand.request()
    np.testing.assert_allclose(by_hand.direct(request, found), by_hand.through_the_gateway(request), rtol=0, atol=1e-3)


def test_it_listens_on_loopback_where_the_gateway_does(found):
    assert all(is_loopback(one.address.rpartition(":")[0]) for one in found.endpoints)
    assert (found.tls, found.tls_name) == (False, "")


def test_nobody_comes_in_without_a_ticket_or_twice_with_one_proof(by_hand, found):
    request, caller = by_hand.request(), Caller(found, number=1000)
    caller.metadata = lambda method, said=caller.metadata(EXTRACT): said
    by_hand.direct(request, found, caller)
    for refused in (caller, type("Nobody", (), {"metadata": lambda self, method: ()})()):
        with pytest.raises(grpc.RpcError) as caught:
            by_hand.direct(request, found, refused)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
