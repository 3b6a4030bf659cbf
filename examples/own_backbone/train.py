"""Train the network on drawings of circles, squares and triangles, and save its weights beside this file."""

import tomllib
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageDraw
from shapes_net import build

FOLDER = Path(__file__).parent
LABELS = (FOLDER / "labels.txt").read_text().split()
NUM_STEPS, BATCH = 150, 48


def draw(label: int, size: int, random: np.random.Generator) -> Image.Image:
    """Draw one shape somewhere, in some colour, on a ground of another."""
    radius = random.uniform(0.2, 0.4) * size
    across, down = random.uniform(radius, size - radius, size=2)
    ground, colour = (tuple(random.integers(low, low + 100, size=3).tolist()) for low in random.permutation([20, 150]))
    picture = Image.new("RGB", (size, size), ground)
    pen = ImageDraw.Draw(picture)
    if LABELS[label] == "circle":
        pen.ellipse((across - radius, down - radius, across + radius, down + radius), fill=colour)
    else:
        sides = 4 if LABELS[label] == "square" else 3
        pen.regular_polygon((across, down, radius), sides, rotation=random.uniform(0, 360), fill=colour)
    return picture


def batch(num: int, size: int, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rows, 3, size, size) on the scale 0 to 1, and the labels."""
    labels = random.integers(len(LABELS), size=num)
    pictures = np.stack([np.asarray(draw(label, size, random)) for label in labels])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels)


def main() -> None:
    manifest = tomllib.loads((FOLDER / "backbone.toml").read_text())
    preparation = manifest["preprocessing"]
    mean, std = (torch.tensor(preparation[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    network = build(**manifest["arguments"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=NUM_STEPS)
    for step in range(NUM_STEPS):
        pictures, labels = batch(BATCH, preparation["input_size"], random)
        loss = torch.nn.functional.cross_entropy(network((pictures - mean) / std), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 30 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    network.eval()
    with torch.inference_mode():
        pictures, labels = batch(300, preparation["input_size"], random)
        correct = (network((pictures - mean) / std).argmax(1) == labels).float().mean().item()
    safetensors.torch.save_file(network.state_dict(), FOLDER / manifest["weights"])
    print(f"{correct:.1%} of 300 new drawings are right; weights in {FOLDER / manifest['weights']}")


if __name__ == "__main__":
    main()
