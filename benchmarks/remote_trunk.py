"""Training steps a second through a remote trunk, over the same loop with the trunk in this process.

In one run, in turn: a round of steps with the trunk on the cluster, a round with the very same layers here, and again.
ResNet-18 is cut in the middle, behind `layer2`; the trunk is frozen. What learns is a stem of one's own (a copy of the
network's first half, and a head) or only a small adapter, a 1x1 convolution on features at hand, and a head: then
nearly all of a step is the trunk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from common import embedded_cluster, report, summary
from torch import Tensor, nn
from trunkline.torch import RemoteTrunk
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.catalogue import load_backbone

BACKBONE, CUT = "resnet18", "layer2"
CLASSES = 10


def own_stem() -> nn.Module:
    """Return the first half of a ResNet-18, to be trained."""
    from torchvision.models import resnet18

    network = resnet18(weights=None)
    return nn.Sequential(
        network.conv1, network.bn1, network.relu, network.maxpool, network.layer1, network.layer2
    ).train()


def adapter() -> nn.Module:
    """Return a 1x1 convolution."""
    return nn.Conv2d(128, 128, 1)


def loop(part: nn.Module, learner: Callable[[], nn.Module], rows: Tensor, steps: int) -> tuple[float, list[float]]:
    """Train for some steps and return steps a second, the first left out, and the losses."""
    torch.manual_seed(0)
    stem, head = learner(), nn.Linear(512, CLASSES)
    labels = torch.randint(0, CLASSES, (len(rows),))
    optimiser = torch.optim.SGD([*stem.parameters(), *head.parameters()], lr=0.01)
    losses = []
    started = time.perf_counter()
    for step in range(steps + 1):
        if step == 1:
            started = time.perf_counter()
        loss = nn.functional.cross_entropy(head(part(stem(rows))), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return steps / (time.perf_counter() - started), losses


def gradient_difference(trunk: RemoteTrunk, local: nn.Module, rows: Tensor) -> float:
    """Return the largest difference between the gradients at the cut, over the largest gradient."""
    gradients = []
    for part in (trunk, local):
        features = rows.clone().requires_grad_()
        part(features * 1.0).square().mean().backward()
        assert features.grad is not None
        gradients.append(features.grad)
    return float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max())


@contextmanager
def weights_file() -> Iterator[str]:
    """Write random weights to a file, so that the cluster and this process have the same."""
    from torchvision.models import resnet18

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        file = f"{folder}/{BACKBONE}.pth"
        torch.save(resnet18(weights=None).state_dict(), file)
        yield file


def local_trunk(backbone: Backbone) -> nn.Module:
    """Return the same layers as plain PyTorch runs them: no gradient for their weights."""
    return backbone.reader(CUT, ("pooled",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    table: list[tuple[str, ...]] = [
        ("what learns", "input", "in-process steps/s", "remote steps/s", "remote / in-process", "gradient difference")
    ]
    with (
        weights_file() as file,
        embedded_cluster(backbones=json.dumps([BACKBONE]), weights=json.dumps({BACKBONE: file})) as cluster,
        cluster.connect() as client,
    ):
        for size in (224, 96):
            trunk = RemoteTrunk(client, BACKBONE, cut=CUT, input_size=size)
            local = local_trunk(load_backbone(BACKBONE, weights=file))
            features = torch.randn(arguments.rows, *trunk.feature_shape)
            pictures = torch.rand(arguments.rows, 3, size, size)
            for name, learner, rows in (("own stem", own_stem, pictures), ("adapter", adapter, features)):
                ours, theirs, ratios = [], [], []
                for _ in range(arguments.rounds):
                    theirs.append(loop(local, learner, rows, arguments.steps)[0])
                    ours.append(loop(trunk, learner, rows, arguments.steps)[0])
                    ratios.append(ours[-1] / theirs[-1])
                table.append(
                    (
                        name,
                        f"{size} px",
                        f"{statistics.median(theirs):.2f}",
                        f"{statistics.median(ours):.2f}",
                        summary(ratios),
                        f"{gradient_difference(trunk, local, features[:8]):.1e}",
                    )
                )
                print(table[-1], flush=True)
    report(
        "remote_trunk",
        "Training through a remote trunk, against the same loop in one process",
        table,
        [
            f"{BACKBONE} cut at {CUT}, frozen, float32; {arguments.rows} rows a step, {arguments.steps} steps a round, "
            f"{arguments.rounds} rounds; median (least to most).",
            "Client, gateway and trunk share the machine's cores; the loop in one process has them for itself. Quote "
            "the ratio: the steps a second are those of a shared machine.",
            "The gradient difference is the largest one at the cut, over the largest gradient.",
        ],
    )


if __name__ == "__main__":
    main()
