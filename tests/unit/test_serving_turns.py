"""How a request comes to its turn: what time it has left after it waited, and what engines are told."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.v1 import inference_pb2 as pb
from trunkline_worker.serving import turns
from trunkline_worker.serving.auth import Principal, Role
from trunkline_worker.serving.boundary import Call
from trunkline_worker.serving.budget import ByteBudget
from trunkline_worker.serving.draining import Draining
from trunkline_worker.serving.turns import Turn, reserve


def call(deadline_s=None, connection="ipv4:127.0.0.1:5"):
    deadline = None if deadline_s is None else time.monotonic() + deadline_s
    return Call("id", Principal("tenant", Role.USER), deadline, Draining(), connection)


def test_an_engine_is_told_whose_the_rows_are_and_the_time_that_is_left():
    told = Turn(call(100.0), 50.0, wait=True).keywords()
    assert (told["caller"], told["wait"]) == ("tenant/ipv4:127.0.0.1:5", True)
    assert 49.0 < told["timeout_s"] <= 50.0
    assert 99.0 < Turn(call(100.0), 0.0, wait=False).keywords()["timeout_s"] <= 100.0
    assert Turn(call(), 0.0, wait=False).keywords()["timeout_s"] is None


@pytest.mark.parametrize(("deadline_s", "stated_s"), [(0.0, 0.0), (None, -1.0), (10.0, -1.0), (-1.0, 10.0)])
def test_a_request_whose_time_is_over_gets_no_turn(deadline_s, stated_s):
    with pytest.raises(WireError) as caught:
        Turn(call(deadline_s), stated_s, wait=True)
    assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED


def full(times):
    calls = []

    async def answer():
        calls.append(1)
        if len(calls) <= times:
            raise WireError(ErrorCode.OVERLOADED, "full")
        return len(calls)

    return answer


def test_only_who_waits_is_tried_again():
    assert asyncio.run(Turn(call(), 0.0, wait=True).until_room(full(1))) == 2
    with pytest.raises(WireError, match="full"):
        asyncio.run(Turn(call(), 0.0, wait=False).until_room(full(1)))


def test_the_time_that_a_message_waited_for_memory_is_taken_off_what_it_states(monkeypatch):
    readings = iter([1000.0, 1012.5])
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: next(readings)))
    message = pb.StreamExtractRequest(seq=1, extract=pb.ExtractRequest(timeout_s=30.0))
    budget = ByteBudget()
    held = asyncio.run(reserve(budget, call(), message, message.extract))
    assert message.extract.timeout_s == pytest.approx(17.5)
    assert budget.held_bytes > 0
    held.release()
    held.release()
    assert (budget.held_bytes, budget.num_held) == (0, 0)


def test_a_message_that_states_no_time_states_none_afterwards():
    message = pb.StreamExtractRequest(seq=1, extract=pb.ExtractRequest())
    asyncio.run(reserve(ByteBudget(), call(), message, message.extract)).release()
    assert message.extract.timeout_s == 0
