"""Who may call, and what happens where nobody answers."""

import socket
import time

import pytest
import trunkline
from trunkline_wire.errors import ErrorCode


@pytest.mark.parametrize("token", ["", "a-wrong-token-of-some-length-0123"])
def test_no_token_or_a_wrong_one(server, token):
    with pytest.raises(trunkline.AuthenticationError) as caught:
        server.connect(token=token)
    assert caught.value.code is ErrorCode.UNAUTHENTICATED
    assert caught.value.request_id and "TRUNKLINE_TOKEN" in str(caught.value)
    assert not token or token not in str(caught.value)


def test_nobody_there(server):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(trunkline.ServiceUnavailableError, match="trunkline up"):
        trunkline.connect(address, token=server.token)
    assert time.monotonic() - started < 20.0  # a third of what the client allows otherwise


def test_somebody_else_there():
    """A socket that accepts and never speaks."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises((trunkline.ServiceUnavailableError, trunkline.DeadlineExceededError)):
            trunkline.connect(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=1.0)
        assert time.monotonic() - started < 20.0  # a third of what the client allows otherwise


def test_another_tenant_sees_nothing(fake, fake_client, pictures):
    images, labels = pictures(6)
    data = fake_client.upload(images, labels, name="d")
    fake_client.train(data, name="m").result(20)
    from fake_worker import OTHER_TOKEN

    with trunkline.connect(fake.address, token=OTHER_TOKEN) as other:
        assert (other.datasets(), other.models(), other.jobs()) == ([], [], [])
        with pytest.raises(trunkline.NotFoundError):
            other.dataset("d")
        # Knowing what the rows are made from gives no access to them: they are sent again.
        assert other.upload(images, labels, name="d").report.rows_sent == 6
