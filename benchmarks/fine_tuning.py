"""What fine-tuning gives: the head alone, the last blocks behind it, and the network from scratch, on few digits.

In this process, by one worker, with the loop that the cluster runs. Digits through the built-in ImageNet backbone; all
rows that are not labelled are measured, so that intervals are narrow. ``from scratch`` is the same network with random
weights, trained on the same labelled rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from common import report
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from trunkline_wire.fits import FineTuneConfig
from trunkline_wire.specs import map_slice
from trunkline_worker.backbones.backbone import Backbone
from trunkline_worker.backbones.catalogue import load_backbone
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.loop import Labels, Source, TrainingResult, train_head
from trunkline_worker.training.trust.bootstrap import difference, mean_interval
from trunkline_worker.training.tuning.local import LocalTailTrainer
from trunkline_worker.training.tuning.tune import TailSource

BACKBONE = "efficientnet_lite0"
_PORTION = 128


@dataclass(frozen=True)
class Rows:
    """All digits, as pictures, as the backbone's embedding, and as its map at the cut."""

    images: Tensor
    embedding: Tensor
    maps: Tensor
    classes: npt.NDArray[np.int64]


def read(backbone: Backbone, cut: str, size: int) -> Rows:
    """Send every digit through the backbone."""
    digits = load_digits()
    pictures = [
        np.asarray(Image.fromarray(one).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
        for one in (digits.images * (255 / 16)).astype(np.uint8)
    ]
    images = torch.from_numpy(np.stack(pictures))
    with torch.inference_mode():
        embed, tap = backbone.trunk("input"), backbone.trunk("input", map_slice(cut))
        embedding = torch.cat([embed(one) for one in images.split(_PORTION)])
        maps = torch.cat([tap(one) for one in images.split(_PORTION)])
    return Rows(images, embedding.clone(), maps.clone(), digits.target.astype(np.int64))


def train(
    backbone: Backbone, rows: Rows, labelled: npt.NDArray[np.int64], size: int, tuning: FineTuneConfig | None, seed: int
) -> TrainingResult:
    """Train as a job does."""
    spec = backbone.describe(size)
    tail = None
    if tuning is not None:
        cut = spec.cut(tuning.cut)
        assert cut is not None
        trainer = LocalTailTrainer(backbone, lambda name: rows.maps[labelled])
        tail = TailSource(cut, trainer)
    return train_head(
        [Source(BACKBONE, rows.embedding[labelled].numpy(), spec.slices)],
        Labels(tuple(map(str, range(10))), rows.classes[labelled], None),
        JobSpec("m", "d", BACKBONE, size, seed=seed, fine_tune=tuning),
        tail=tail,
        on_event=lambda event: None,
        should_stop=lambda: False,
    )


def hits(
    backbone: Backbone, result: TrainingResult, rows: Rows, fresh: npt.NDArray[np.int64], size: int
) -> npt.NDArray[np.bool_]:
    """Return which fresh rows a model is right about."""
    if result.head.head.tail is not None:
        columns = rows.maps
    else:
        known = {one.name: one for one in backbone.describe(size).slices}
        parts = [rows.embedding[:, known[one].start : known[one].stop] for one in result.head.slices]
        columns = torch.cat(parts, dim=1)
    said = torch.cat([result.head.predict(one) for one in columns[fresh].split(_PORTION)])
    right: npt.NDArray[np.bool_] = said.argmax(dim=1).numpy() == rows.classes[fresh]
    return right


def from_scratch(
    rows: Rows, labelled: npt.NDArray[np.int64], fresh: npt.NDArray[np.int64], epochs: int, seed: int
) -> npt.NDArray[np.bool_]:
    """Train the whole network from random weights on the labelled rows, and return what it is right about."""
    torch.manual_seed(seed)
    import timm

    network = timm.create_model(BACKBONE, pretrained=False, num_classes=10)
    images = rows.images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    truth = torch.from_numpy(rows.classes)
    index = torch.from_numpy(labelled)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * -(-len(index) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    network.train()
    for _ in range(epochs):
        for batch in index[torch.randperm(len(index))].split(32):
            if len(batch) > 1:
                loss = nn.functional.cross_entropy(network(images[batch]), truth[batch], label_smoothing=0.1)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    network.eval()
    with torch.inference_mode():
        said = torch.cat([network(one) for one in images[torch.from_numpy(fresh)].split(_PORTION)])
    right: npt.NDArray[np.bool_] = said.argmax(dim=1).numpy() == rows.classes[fresh]
    return right


def shown(right_N: npt.NDArray[np.bool_]) -> str:
    """Return a share and its 95 % interval."""
    low, high = mean_interval(right_N, np.random.default_rng(0)) or (0.0, 1.0)
    return f"{right_N.mean():.3f} ({low:.3f} to {high:.3f})"


def compared(a_N: npt.NDArray[np.bool_], b_N: npt.NDArray[np.bool_]) -> str:
    """Return the gain of ``a`` over ``b`` and its 95 % interval over the same rows."""
    low, high = difference(a_N, b_N, np.random.default_rng(0)) or (-1.0, 1.0)
    return f"{a_N.mean() - b_N.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def measure(per_class: Sequence[int], cut: str, size: int, epochs: int, scratch_epochs: int, seed: int) -> None:
    """Measure and write the table."""
    backbone = load_backbone(BACKBONE)
    rows = read(backbone, cut, size)
    table: list[tuple[str, ...]] = [
        ("labelled per class", "method", "accuracy on fresh rows", "over the head alone", "said of held-out rows", "s")
    ]
    for count in per_class:
        draw = np.random.default_rng(seed)
        classes = [np.flatnonzero(rows.classes == one) for one in range(10)]
        labelled = draw.permutation(np.concatenate([draw.choice(one, count, replace=False) for one in classes]))
        fresh = np.setdiff1d(np.arange(len(rows.classes)), labelled)
        started = time.perf_counter()
        alone = train(backbone, rows, labelled, size, None, seed)
        base = hits(backbone, alone, rows, fresh, size)
        spent = time.perf_counter() - started
        table.append((str(count), "head alone", shown(base), "", "", f"{spent:.0f}"))
        for name, rank in (("all weights", 0), ("rank 8", 8)):
            started = time.perf_counter()
            config = FineTuneConfig(cut=cut, lora_rank=rank, epochs=epochs)
            result = train(backbone, rows, labelled, size, config, seed)
            right = hits(backbone, result, rows, fresh, size)
            assert result.tuning is not None
            spent = time.perf_counter() - started
            verdict = "kept" if result.tuning.kept else "not kept"
            said = f"{verdict}, gain {result.tuning.gain:+.3f} ({result.tuning.low:+.3f} to {result.tuning.high:+.3f})"
            table.append((str(count), f"LP-FT, {name}", shown(right), compared(right, base), said, f"{spent:.0f}"))
        started = time.perf_counter()
        right = from_scratch(rows, labelled, fresh, scratch_epochs, seed)
        spent = time.perf_counter() - started
        table.append((str(count), "from scratch", shown(right), compared(right, base), "", f"{spent:.0f}"))
    report(
        "fine_tuning",
        "Fine-tuning on few digits",
        table,
        [
            f"{BACKBONE} at {size} px, the blocks behind {cut}, {epochs} epochs; from scratch {scratch_epochs} epochs.",
            "Intervals: 95 %, bootstrap over the fresh rows. What is not kept is the head alone. The gain on held-out",
            "rows, a fifth of the labelled ones, is in nats a row.",
        ],
    )


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-class", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--cut", default="blocks.3")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--scratch-epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    measure(given.per_class, given.cut, given.size, given.epochs, given.scratch_epochs, given.seed)


if __name__ == "__main__":
    main()
