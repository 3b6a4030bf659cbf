"""Networks that Trunkline does not bring: one of the operator's own, from a folder outside, and one of timm's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trunkline
from clusters import EmbeddedCluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_backbone"
TIMM = "timm/test_resnet"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The example, copied to where a user might have it, with weights that its own script trained there."""
    folder = tmp_path_factory.mktemp("elsewhere") / "shapes"
    shutil.copytree(EXAMPLE, folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # beside other processes spinning threads are slower than one
    subprocess.run(
        [sys.executable, "train.py"], cwd=folder, env=environment, check=True, capture_output=True, timeout=300
    )
    return folder


@pytest.fixture(scope="module")
def served(shapes, tmp_path_factory):
    """A cluster that serves both, and nothing else."""
    running = EmbeddedCluster(tmp_path_factory.mktemp("backbones"), exact=("shapes", TIMM))
    try:
        yield running.up("--own-backbone", str(shapes), "--backbone", "shapes", "--backbone", TIMM, "--allow-untrained")
    finally:
        left = running.down()
    assert left == []


@pytest.fixture(scope="module")
def client(served):
    with served.connect() as connected:
        yield connected


def drawings(shapes, count, seed):
    """Draw shapes with the example's own code, as uint8 pictures with their names."""
    code = (
        "import sys, numpy as np; from train import LABELS, draw; random = np.random.default_rng(int(sys.argv[1]));"
        "labels = np.arange(int(sys.argv[2])) % len(LABELS);"
        "np.savez(sys.argv[3], pictures=np.stack([np.asarray(draw(one, 64, random)) for one in labels]),"
        "labels=np.array(LABELS)[labels])"
    )
    file = shapes / f"drawings-{seed}.npz"
    subprocess.run([sys.executable, "-c", code, str(seed), str(count), str(file)], cwd=shapes, check=True, timeout=120)
    loaded = np.load(file)
    return loaded["pictures"], loaded["labels"]


def test_a_network_of_ones_own_is_cut_trained_on_and_served(client, shapes):
    spec = client.describe("shapes")
    assert spec.class_names == ("circle", "square", "triangle")
    assert [cut.name for cut in spec.cuts if cut.is_stage] == ["start", "blocks.0", "blocks.1", "blocks.2"]
    stem = client.stem("shapes", cut="blocks.0")
    pictures, labels = drawings(shapes, 120, seed=1)
    data = client.upload(pictures, labels, name="drawings", stem=stem)
    assert data.codec == "float16"
    model = client.train(data, name="shapes-head").result(progress=False)
    assert {one.slices for one in model.candidates} >= {("pooled",), model.slices}
    others, truth = drawings(shapes, 90, seed=2)
    assert model.evaluate(others, truth, stem=stem).accuracy >= 0.9
    # The same rows as pictures, through the whole network: the same answers. Nothing is rounded on the way and runtimes
    # are exact: what an error does to a row that lies between two classes depends on how steep the head is there.
    exact = client.stem("shapes", cut="blocks.0", codec="float32")
    np.testing.assert_allclose(
        model.predict(others, stem=False).probabilities, model.predict(others, stem=exact).probabilities, atol=1e-3
    )
    # float16 changes the embedding no more than it may change one of the features: roundings cancel where they are
    # pooled.
    rounded, unrounded = (client.extract(others, stem=one) for one in (stem, exact))
    assert 0 < np.linalg.norm(rounded - unrounded) / np.linalg.norm(unrounded) <= 2.0**-11


def test_a_point_that_is_no_cut_is_answered_with_the_nearest(client):
    nearest = r"2 tensors cross there.*'start' before it and 'blocks\.0\.add' after it"
    with pytest.raises(trunkline.InvalidArgumentError, match=nearest):
        client.stem("shapes", cut="blocks.0.first.0")


def test_a_network_of_timm_by_name_is_cut_and_read(client, served):
    spec = client.describe(TIMM)
    stage = next(cut for cut in spec.cuts if cut.is_stage)
    size = spec.preprocessing.input_size
    pictures = np.random.default_rng(0).integers(0, 256, size=(4, size, size, 3), dtype=np.uint8)
    stem = client.stem(TIMM, cut=stage.name, codec="float32")
    whole = client.extract(pictures, backbone=TIMM)
    behind = client.extract(pictures, stem=stem)
    np.testing.assert_allclose(behind, whole[:, -behind.shape[1] :], rtol=0, atol=1e-4 * np.abs(whole).max())
    shown = json.loads(served.run("backbones", "show", TIMM, "--cut", stage.name, "--json").stdout)
    assert stage.name in json.dumps(shown)
