"""What goes between gateway, lanes and backbones over Serve handles, with handles that need no cluster."""

import asyncio

import numpy as np
import pytest
import ray
import serving_fakes as fakes
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.quantise import PackedRows, pack
from trunkline_wire.specs import FLOAT32, INT8
from trunkline_worker.serving import deployments
from trunkline_worker.serving.deployments import Backbone, HandleEngine
from trunkline_worker.training.ray_train import HandleTrunk

SPEC = fakes.fake_spec()
MID = SPEC.cut("mid")


class Local(Backbone):
    """A replica of a backbone without weights, over an engine that is given."""

    def __init__(self, engine):
        self._engine = engine

    def __del__(self):
        """There is no loop here on which the engine could be closed."""


class Response:
    """What a handle returns: an answer to wait for, on either side of an event loop."""

    def __init__(self, make):
        self.make = make

    def __await__(self):
        return self.make().__await__()

    def result(self, timeout_s):
        return asyncio.run(self.make())


class Handle:
    """A Serve handle on a backbone in this process. Calls in ``lost`` find their replica dead."""

    def __init__(self, backbone):
        self.backbone = backbone
        self.lost = 0
        self.responses = []

    def __getattr__(self, name):
        method = getattr(self.backbone, name)

        def remote(*args, **keywords):
            async def answer():
                if self.lost:
                    self.lost -= 1
                    raise ray.exceptions.RayActorError
                return await method(*args, **keywords)

            self.responses.append(Response(answer))
            return self.responses[-1]

        return type("Method", (), {"remote": staticmethod(remote)})


@pytest.fixture
def engine(tmp_path):
    return fakes.FakeEngine(fakes.BlobStore(f"file://{tmp_path}"))


@pytest.fixture
def handle(engine):
    return Handle(Local(engine))


@pytest.fixture
def remote(handle):
    found = HandleEngine("app")
    found._handle = handle
    return found


@pytest.mark.parametrize("precision", [FLOAT32, INT8])
def test_a_stem_of_either_precision_comes_through(remote, engine, precision):
    expected = asyncio.run(engine.stem("mid", 16, precision))
    assert asyncio.run(remote.stem("mid", 16, precision)) == expected
    assert expected.precision == precision


def test_what_a_cut_costs_comes_through_and_is_asked_for_again_when_the_replica_died(remote, engine, handle):
    handle.lost = 2
    cost = asyncio.run(remote.cut_cost("mid", 16))
    assert cost == fakes.fake_cost(fakes.fake_spec(16).cut("mid"))
    assert engine.costs_asked == [("mid", 16)]
    assert len(handle.responses) == 3


def test_a_tuning_comes_through_and_the_runtime_is_described_anew(remote, engine, handle):
    handle.lost = 1
    asyncio.run(remote.describe(16))
    assert asyncio.run(remote.tune("mid", 16, True)) == fakes.fake_tuning("mid", 16)
    assert engine.tunings_asked == [("mid", 16, True)]
    before = len(handle.responses)
    asyncio.run(remote.describe(16))
    assert len(handle.responses) == before + 1
    with pytest.raises(WireError, match="nowhere") as error:
        asyncio.run(remote.tune("nowhere"))
    assert error.value.code is ErrorCode.NOT_FOUND


@pytest.mark.parametrize(
    ("cores", "replicas", "nodes", "expected"),
    [(8, 1, 1, 8), (8, 2, 1, 4), (8, 3, 1, 2), (2, 5, 1, 1), (8, 4, 2, 4), (8, 3, 2, 4), (8, 1, 4, 8), (8, 2, 0, 4)],
)
def test_replicas_share_the_cores_of_a_machine(cores, replicas, nodes, expected):
    assert deployments.share_of_cores(cores, replicas, nodes) == expected


def test_refusals_come_back_as_they_were(remote):
    for call in (remote.cut_cost("nowhere"), remote.stem("mid", 0, "int2")):
        with pytest.raises(WireError) as error:
            asyncio.run(call)
        assert error.value.code in (ErrorCode.NOT_FOUND, ErrorCode.UNSUPPORTED)


def test_what_is_made_when_first_asked_for_may_take_longer_than_an_answer(remote, engine, monkeypatch):
    """With no patience for answers, stems and costs still come; once theirs is over too, nothing does."""
    monkeypatch.setattr(deployments, "DEFAULT_TIMEOUT_S", 0.0)
    with pytest.raises(WireError) as error:
        asyncio.run(remote.describe())
    assert error.value.code is ErrorCode.UNAVAILABLE
    assert asyncio.run(remote.stem("mid")).size_bytes == len(fakes.STEM)
    assert asyncio.run(remote.cut_cost("mid")).cut == MID
    monkeypatch.setattr(deployments, "PREPARE_TIMEOUT_S", 0.0)
    for call in (remote.stem("mid"), remote.cut_cost("mid")):
        with pytest.raises(WireError) as error:
            asyncio.run(call)
        assert error.value.code is ErrorCode.UNAVAILABLE


def test_packed_rows_and_what_is_said_of_them_go_through_a_handle(remote, engine):
    rows = pack(np.ones((2, 3, 2, 2), np.float32), "int4")
    extraction = asyncio.run(remote.extract(SPEC.space(MID, INT8), rows))
    assert isinstance(engine.last_rows, PackedRows)
    assert extraction.codec_use.codec == "int4@int8"


def test_a_lane_asks_what_a_cut_costs(handle, engine):
    trunk = HandleTrunk({"fake": "app"})
    trunk._handles["fake"] = handle
    handle.lost = 1
    assert trunk.cut_cost("fake", "mid", 16) == fakes.fake_cost(fakes.fake_spec(16).cut("mid"))
    with pytest.raises(WireError) as error:
        trunk.cut_cost("fake", "nowhere", 16)
    assert error.value.code is ErrorCode.NOT_FOUND
    with pytest.raises(WireError) as error:
        trunk.cut_cost("nobody", "mid", 16)
    assert error.value.code is ErrorCode.NOT_FOUND


def test_a_replica_that_ends_sends_callers_elsewhere_before_its_engine_ends():
    ended = []

    class Part:
        def __init__(self, name):
            self.name = name

        async def close(self):
            ended.append(self.name)

    class Replica:
        _engine, _endpoint = Part("engine"), Part("endpoint")

    class DoesNotListen:
        _engine, _endpoint = Part("engine"), None

    class DidNotLoad:
        pass

    for replica in (Replica(), DoesNotListen(), DidNotLoad()):
        asyncio.run(Backbone.__del__(replica))
    assert ended == ["endpoint", "engine", "engine"]
