"""One suite against several servers. ``real`` joins where a fixture ``cluster`` gives address, token and ca_file."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fake_backbone
import trunkline
from fake_worker import FakeWorker


@dataclass
class Server:
    """A server under test, and what it has."""

    address: str
    token: str
    ca_file: str
    backbone: str
    cut: str
    input_size: int
    slices: tuple[str, ...]
    other_backbone: str = ""
    fake: Any = None

    def connect(self, **keywords):
        """Connect as its user."""
        return trunkline.connect(
            self.address, **{"token": self.token, "ca_file": self.ca_file or None, "timeout_s": 60.0, **keywords}
        )


FAKE = (fake_backbone.NAME, fake_backbone.CUT, 8, ("grid", "pooled"), fake_backbone.OTHER_NAME)
"""What the fakes have, in the order of ``Server``."""


@pytest.fixture(autouse=True)
def own_directories(tmp_path, monkeypatch):
    """Keep settings, state and cache of whoever runs the tests out of them."""
    for name in ("ADDRESS", "TOKEN", "TOKEN_FILE", "CA_FILE", "INSECURE", "PROFILE", "TIMEOUT_S", "DIRECT"):
        monkeypatch.delenv(f"TRUNKLINE_{name}", raising=False)
    monkeypatch.setenv("TRUNKLINE_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("TRUNKLINE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("TRUNKLINE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def fake():
    """A fake worker, for faults that a real one cannot be asked for."""
    with FakeWorker() as worker:
        yield worker


@pytest.fixture
def fake_client(fake):
    """A client of the fake worker."""
    with trunkline.connect(fake.address, token=fake.token, timeout_s=20.0) as client:
        yield client


@pytest.fixture(params=["fake", "gateway", pytest.param("real", marks=pytest.mark.ray)])
def server(request):
    """Every server that the contract binds."""
    if request.param == "fake":
        worker = request.getfixturevalue("fake")
        yield Server(worker.address, worker.token, "", *FAKE, worker)
    elif request.param == "gateway":
        gateway = pytest.importorskip("contract_gateway", reason="needs the worker", exc_type=ImportError)
        folder = request.getfixturevalue("tmp_path_factory").mktemp("gateway")
        with gateway.Gateway(folder) as running:
            yield Server(running.address, running.token, "", *FAKE)
    else:
        try:
            cluster = request.getfixturevalue("cluster")
        except pytest.FixtureLookupError:
            pytest.skip("no fixture `cluster`")
        with trunkline.connect(cluster.address, token=cluster.token, ca_file=cluster.ca_file or None) as client:
            spec, *others = client.backbones()
        names = tuple(one.name for one in spec.slices)
        cut = [one.name for one in spec.cuts if one.is_stage][2]
        other = others[0].name if others else ""
        yield Server(cluster.address, cluster.token, cluster.ca_file, spec.name, cut, 64, names, other)


@pytest.fixture
def client(server):
    """A client of each server."""
    with server.connect() as client:
        yield client


@pytest.fixture
def unique(request):
    """Make names that no other test used: a real cluster keeps what tests leave behind."""
    stem = "".join(one if one.isalnum() else "-" for one in request.node.name)[:60]
    token = f"{np.random.default_rng().integers(2**40):x}"
    return lambda what: f"{what}-{stem}-{token}"


@pytest.fixture
def pictures():
    """Make labelled pictures: noise, with one channel raised according to the class. Different each time."""
    generator = np.random.default_rng()

    def make(count, classes=3, size=16):
        labels = np.arange(count) % classes
        images = generator.integers(0, 60, (count, size, size, 3)).astype(np.uint8)
        images[np.arange(count), :, :, labels % 3] += 150
        return images, labels

    return make
