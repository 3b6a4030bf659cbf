"""Local models, heads of every kind, several backbones and a remote trunk on a cluster, through a death as well."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trunkline
from clusters import EmbeddedCluster, digits
from trunkline.torch import RemoteTrunk
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.heads.artefact import head_from_bytes, head_path
from trunkline_worker.store.blobs import BlobStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

DOCS = Path(__file__).parents[2] / "docs"
BACKBONE, CUT, SIZE = "efficientnet_lite0", "blocks.2", 64


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A cluster with two backbones, one of them untrained."""
    running = EmbeddedCluster(tmp_path_factory.mktemp("fusion"), exact=(BACKBONE, "resnet18"))
    try:
        yield running.up("--backbone", BACKBONE, "--backbone", "resnet18", "--allow-untrained")
    finally:
        left = running.down()
    assert left == []


@pytest.fixture(scope="module")
def client(served):
    with served.connect() as connected:
        yield connected


@pytest.fixture(scope="module")
def stem(client):
    return client.stem(BACKBONE, cut=CUT, input_size=SIZE, codec="float32")


@pytest.fixture(scope="module")
def local():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten()
    )
    return trunkline.local_model(net, name="edge", input_size=32, version="1")


LABELS = {
    "classification": lambda digit: digit,
    "multi_label": lambda digit: np.stack([digit % 2 == 0, digit > 4, digit == 0], axis=1),
    "regression": lambda digit: np.stack([digit / 3.0, -digit.astype(float)], axis=1),
}
HEADS = {
    "linear": trunkline.Linear(),
    "mlp-add": trunkline.MLP(hidden=(64, 32), activation="gelu", batch_norm=True, dropout=0.1, fuse="add"),
    "mlp-gate": trunkline.MLP(hidden=(32,), fuse="gate"),
    "conv": trunkline.Conv(channels=(16,), tap="blocks.4", batch_norm=True),
    "prototype": trunkline.Prototype(),
}


@pytest.fixture(scope="module")
def datasets(client, stem, local):
    pictures, labels = digits(240)
    return {
        task: client.upload(pictures, make(labels), name=f"fused-{task}", stem=stem, local=local)
        for task, make in LABELS.items()
    }


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("kind", HEADS)
def test_every_head_is_served_as_it_computes_in_torch(client, served, datasets, stem, local, kind, task):
    pictures, labels = digits(300)
    name = f"{kind}-{task.replace('_', '-')}"
    embedding = "auto" if kind == "conv" else ("blocks.3.mean", "pooled")
    model = client.train(
        datasets[task],
        name=name,
        head=HEADS[kind],
        embedding=embedding,
        epochs=0 if kind in ("linear", "prototype") else 15,
    ).result(progress=False)
    assert model.task == task
    others = pictures[240:]
    outputs = model.predict(others, stem=stem, local=local).outputs_NK

    blobs = BlobStore(f"file://{served.state_dir}/data")
    head = head_from_bytes(blobs.get_checked(head_path(model.record.head_sha256), model.record.head_sha256))
    backbone = load_backbone(BACKBONE)
    backbone.describe(SIZE)
    features = torch.from_numpy(stem(others))
    with torch.inference_mode():
        if kind == "conv":
            first = backbone.trunk(CUT, "blocks.4.map")(features)
        else:
            embedded = backbone.trunk(CUT)(features)
            spec = backbone.describe(SIZE)
            behind = [one for one in spec.slices if one.name in spec.cut(CUT).slices]
            ranges = {one.name: slice(one.start - behind[0].start, one.stop - behind[0].start) for one in behind}
            first = torch.cat([embedded[:, ranges[one]] for one in model.slices], dim=1)
        own = torch.from_numpy(local.run(list(others)))
        expected = head.predict(torch.cat([first, own], dim=1)).numpy()
    scale = max(1.0, float(np.abs(expected).max()))
    assert np.abs(outputs - expected).max() <= 1e-5 * scale
    # And it has learned something.
    truth = LABELS[task](labels[240:])
    if task == "classification":
        assert (outputs.argmax(1) == truth).mean() > 0.5
    elif task == "multi_label":
        assert ((outputs > 0.5) == truth).mean() > 0.75
    else:
        assert np.mean((outputs - truth) ** 2) < np.mean((truth.mean(axis=0) - truth) ** 2)


def test_a_model_knows_its_local_model(client, datasets, stem, local):
    model = client.train(datasets["classification"], name="knows-its-own", embedding="pooled").result(progress=False)
    pictures, _ = digits(8)
    torch.manual_seed(1)
    other_net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 72))
    other = trunkline.local_model(other_net, name="edge", input_size=32, version="1")
    with pytest.raises(trunkline.IncompatibleModelError, match="edge"):
        model.predict(pictures, stem=stem, local=other)
    with pytest.raises(trunkline.InvalidArgumentError, match="edge"):
        model.predict(pictures, stem=stem)
    [needed] = model.record.more_inputs
    assert needed.space == local.space
    assert (
        model.predict(pictures, stem=False, local=local).labels
        == model.predict(pictures, stem=stem, local=local).labels
    )


def test_local_features_alone(client, local):
    pictures, labels = digits(300)
    data = client.upload(pictures[:240], labels[:240], name="local-alone", local=local, remote=False)
    model = client.train(data, name="local-alone").result(progress=False)
    assert model.space == local.space
    answer = model.predict(pictures[240:], local=local)
    assert np.mean([int(one) == truth for one, truth in zip(answer.labels, labels[240:], strict=True)]) > 0.5


def test_what_neither_input_knows_alone_both_know_together(client, stem):
    """The class is the digit on the picture plus a number that only the local features know, modulo ten."""
    pictures, shown = digits(1700)
    draw = np.random.default_rng(0)
    added = draw.integers(10, size=len(shown))
    codes = (np.eye(10)[added] + 0.1 * draw.normal(size=(len(shown), 10))).astype(np.float32)
    labels = (shown + added) % 10
    sensor = trunkline.local_model(lambda rows: rows, name="sensor", version="1")
    made = {
        "both": {"stem": stem, "local": sensor, "local_inputs": codes[:1500]},
        "remote": {"stem": stem},
        "local": {"local": sensor, "local_inputs": codes[:1500], "remote": False},
    }
    accuracy = {}
    for name, inputs in made.items():
        images = None if name == "local" else pictures[:1500]
        data = client.upload(images, labels[:1500], name=f"sum-{name}", **inputs)
        model = client.train(
            data,
            name=f"sum-{name}",
            head=trunkline.MLP(hidden=(512,), fuse="add" if name == "both" else "concat"),
            embedding="auto" if name == "local" else ("blocks.4.grid", "pooled"),
            epochs=60,
        ).result(progress=False)
        asked = {key: value for key, value in inputs.items() if key in ("stem", "local")}
        if "local" in inputs:
            asked["local_inputs"] = codes[1500:]
        answer = model.predict(None if name == "local" else pictures[1500:], **asked)
        said = np.array([int(one) for one in answer.labels])
        accuracy[name] = float((said == labels[1500:]).mean())
    print(accuracy)
    assert accuracy["both"] > 0.6
    assert max(accuracy["remote"], accuracy["local"]) < 0.25


def test_two_backbones_read_the_same_pictures(client):
    pictures, labels = digits(200)
    data = client.upload(pictures[:160], labels[:160], name="read-twice")
    model = client.train(
        data, name="read-twice", backbone=[BACKBONE, "resnet18"], input_size=SIZE, embedding="pooled"
    ).result(progress=False)
    [second] = model.record.more_inputs
    assert (second.space.backbone, second.slices) == ("resnet18", ("pooled",))
    answer = model.predict(pictures[160:])
    assert np.mean([int(one) == truth for one, truth in zip(answer.labels, labels[160:], strict=True)]) > 0.5


def loop(client, steps, on_step=lambda step: None):
    """Train a stem and a head around the remote trunk, and return the losses."""
    torch.manual_seed(0)
    images = torch.rand(steps * 16, 3, 32, 32)
    labels = torch.randint(0, 4, (steps * 16,))
    trunk = RemoteTrunk(client, "resnet18", cut="layer2", input_size=SIZE, timeout_s=300)
    stem = torch.nn.Conv2d(3, trunk.feature_shape[0], 5, stride=4, padding=2)
    head = torch.nn.Linear(trunk.num_outputs, 4)
    optimiser = torch.optim.SGD([*stem.parameters(), *head.parameters()], lr=0.05)
    losses = []
    for step in range(steps):
        on_step(step)
        rows = slice(16 * step, 16 * step + 16)
        loss = torch.nn.functional.cross_entropy(head(trunk(stem(images[rows]))), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_training_through_a_replica_that_dies_ends_with_the_same_loss(client, served):
    undisturbed = loop(client, 8)
    killed = []

    def kill(step):
        if step == 4:
            pid = served.pid_of("ray::ServeReplica:trunkline-backbone-resnet18")
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    assert loop(client, 8, kill) == undisturbed
    assert served.pid_of("ray::ServeReplica:trunkline-backbone-resnet18") not in killed


@pytest.mark.parametrize("page", ["fusion.md", "remote-trunk.md", "training.md"])
def test_the_code_of_a_page_runs(served, page, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,  # what it writes
        env=served.environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if page == "remote-trunk.md":
        first, last, accuracy = map(float, re.findall(r"loss ([\d.]+) to ([\d.]+), accuracy ([\d.]+)", done.stdout)[0])
        assert last < 0.7 * first
        assert accuracy > 0.5
