"""Bottlenecks at the gateway: what is checked before one is kept, and who may have it."""

import asyncio
import contextvars
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import serving_fakes as fakes
from trunkline_wire import bottleneck_file
from trunkline_wire.bottleneck import Bottleneck, ChannelLinear
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import INT8
from trunkline_worker.serving import bottlenecks, boundary
from trunkline_worker.serving.auth import Principal, Role
from trunkline_worker.serving.backends import Backends
from trunkline_worker.serving.draining import Draining
from trunkline_worker.store.blobs import BlobStore
from trunkline_worker.store.bottlenecks import bottleneck_path
from trunkline_worker.store.database import Database
from trunkline_worker.store.failpoints import Failpoints, SimulatedKill
from trunkline_worker.store.metadata import MetadataStore

SPEC = fakes.fake_spec()
MID = SPEC.cut("mid")


def make(value=0.0, **changes):
    encoder = ChannelLinear(np.full((1, 3), value, np.float32), np.zeros(1, np.float32))
    decoder = ChannelLinear(np.zeros((3, 1), np.float32), np.zeros(3, np.float32))
    return replace(Bottleneck(SPEC.space(MID), (3, 2, 2), 0, encoder, decoder, "int8", 0.01), **changes)


class Gateway:
    """The functions as a servicer calls them, on a store of their own."""

    def __init__(self, folder):
        self.failpoints = Failpoints()
        self.blobs = BlobStore(f"file://{folder}/data", failpoints=self.failpoints)
        self.store = MetadataStore(Database(f"sqlite:///{folder}/metadata.sqlite"))
        self.backends = Backends({"fake": fakes.FakeEngine(self.blobs)}, fakes.LocalMetadata(self.store), self.blobs)

    def call(self, function, tenant, argument):
        context = contextvars.copy_context()
        context.run(boundary._current.set, boundary.Call("id", Principal(tenant, Role.USER), None, Draining()))
        return context.run(lambda: asyncio.run(function(self.backends, tenant, argument)))

    def put(self, bottleneck, tenant="t"):
        return self.call(bottlenecks.put_bottleneck, tenant, bottleneck_file.to_bytes(bottleneck))

    def get(self, sha256, tenant="t"):
        return self.call(bottlenecks.get_bottleneck, tenant, sha256)

    def find(self, sha256, tenant="t"):
        return self.call(bottlenecks.find_bottleneck, tenant, sha256)


@pytest.fixture
def gateway(tmp_path):
    return Gateway(tmp_path)


def code_of(call, *arguments):
    with pytest.raises(WireError) as error:
        call(*arguments)
    return error.value.code


def test_what_was_put_is_there(gateway):
    file = bottleneck_file.to_bytes(make())
    sha256 = gateway.put(make())
    assert gateway.put(make()) == sha256, "repeating it changes nothing"
    assert gateway.get(sha256) == file
    found = gateway.find(sha256)
    assert bottleneck_file.to_bytes(found) == file
    assert gateway.find(sha256) is found
    assert bottleneck_file.to_bytes(bottlenecks.load_bottleneck(gateway.blobs, sha256)) == file


def test_another_tenants_is_none(gateway):
    sha256 = gateway.put(make())
    gateway.find(sha256)
    for call in (gateway.get, gateway.find):
        assert code_of(call, sha256, "other") is ErrorCode.NOT_FOUND
        assert code_of(call, "c" * 64) is ErrorCode.NOT_FOUND
        assert code_of(call, "../../etc/passwd") is ErrorCode.INVALID_ARGUMENT
    assert gateway.put(make(), "other") == sha256
    assert gateway.find(sha256, "other").space == SPEC.space(MID)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"space": replace(SPEC.space(MID), backbone="nobody")}, ErrorCode.NOT_FOUND),
        ({"space": replace(SPEC.space(MID), cut="late")}, ErrorCode.INCOMPATIBLE),
        ({"space": replace(SPEC.space(MID), input_size=16)}, ErrorCode.INCOMPATIBLE),
        ({"space": replace(SPEC.space(MID), fingerprint="0" * 64)}, ErrorCode.INCOMPATIBLE),
        ({"space": SPEC.space(MID, INT8)}, ErrorCode.INCOMPATIBLE),
        ({"feature_shape": (3, 4, 4)}, ErrorCode.INCOMPATIBLE),
        ({"feature_shape": (2, 3, 2), "channel_axis": 1}, ErrorCode.INCOMPATIBLE),
        ({"codec": "int3"}, ErrorCode.UNSUPPORTED),
        ({"embedding_error": -1.0}, ErrorCode.CORRUPT_DATA),
    ],
    ids=str,
)
def test_what_fits_no_backbone_is_not_kept(gateway, changes, code):
    file = bottleneck_file.to_bytes(make(**changes))
    assert code_of(gateway.put, make(**changes)) is code
    sha256 = hashlib.sha256(file).hexdigest()
    assert not gateway.blobs.exists(bottleneck_path(sha256))
    assert code_of(gateway.get, sha256) is ErrorCode.NOT_FOUND


@pytest.mark.parametrize("point", ["before_write", "written", "synced", "renamed", "durable"])
def test_a_name_never_stands_for_half_a_file(gateway, point):
    gateway.failpoints.arm(f"store.blob.{point}")
    with pytest.raises(SimulatedKill):
        gateway.put(make())
    gateway.failpoints.disarm()
    sha256 = hashlib.sha256(bottleneck_file.to_bytes(make())).hexdigest()
    assert code_of(gateway.get, sha256) is ErrorCode.NOT_FOUND
    assert gateway.put(make()) == sha256
    assert gateway.get(sha256) == bottleneck_file.to_bytes(make())


def test_damage_in_storage_is_noticed(gateway):
    sha256 = gateway.put(make())
    gateway.blobs.put(bottleneck_path(sha256), bottleneck_file.to_bytes(make(1.0)))
    for call in (gateway.get, gateway.find):
        assert code_of(call, sha256) is ErrorCode.CORRUPT_DATA


def test_memory_is_bounded(gateway, monkeypatch):
    monkeypatch.setattr(bottlenecks, "CAPACITY_BYTES", 2 * make().num_bytes)
    hashes = [gateway.put(make(float(value))) for value in range(4)]
    for sha256 in hashes:
        assert gateway.find(sha256).encoder.weight[0, 0] == hashes.index(sha256)
    assert [key for _, key in gateway.backends.bottlenecks] == hashes[2:]
    assert gateway.find(hashes[0]).encoder.weight[0, 0] == 0
