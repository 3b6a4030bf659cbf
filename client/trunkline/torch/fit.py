"""Fits a bottleneck to pictures of one's own, through the remote trunk: no labels, no torch weights of the backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from trunkline_wire import bottleneck_file
from trunkline_wire.quantise import FLOAT32, INT8

from trunkline.bottlenecks import install_bottleneck
from trunkline.errors import InvalidArgumentError
from trunkline.progress import show_progress
from trunkline.stems import RUN_ROWS
from trunkline.torch.bottleneck import Bottleneck
from trunkline.torch.remote_trunk import RemoteTrunk

if TYPE_CHECKING:
    from trunkline.client import Client
    from trunkline.images import Picture
    from trunkline.stems import Stem

# Shape suffix legend: B = rows, D = embedding columns

MIN_PICTURES = 8
"""Fewest pictures that anything can be fitted to and measured on."""


@dataclass(frozen=True)
class FittedBottleneck:
    """A bottleneck and how good it is.

    Attributes:
        bottleneck: The module.
        embedding_error: Largest relative difference over the slices of the embedding, codec included, on pictures held
            out.
        start_error: The same before training, of the principal components alone.
        losses: Mean relative squared error of the embedding in each epoch.
    """

    bottleneck: Bottleneck
    embedding_error: float
    start_error: float
    losses: tuple[float, ...]

    @property
    def row_bytes(self) -> int:
        """Size of one row of codes on the wire, in bytes, before zstd."""
        return self.bottleneck.row_bytes

    def to_bytes(self) -> bytes:
        """Return its file. Equal ones give equal bytes."""
        return bottleneck_file.to_bytes(self.bottleneck.to_wire(self.embedding_error))

    def save(self, path: str | Path) -> None:
        """Write its file, which ``trunkline.bottlenecks.install_bottleneck`` takes."""
        Path(path).expanduser().write_bytes(self.to_bytes())

    def install(self, client: Client, *, threads: int | None = None) -> Stem:
        """Put it on a cluster, and return the stem that goes with it. Repeating it changes nothing.

        Args:
            client: Of the cluster.
            threads: As in ``Client.stem``.

        Raises:
            IncompatibleModelError: The backbone there has other weights.
        """
        return install_bottleneck(client, self.to_bytes(), threads=threads)


def fit_bottleneck(
    client: Client,
    images: Any,
    *,
    backbone: str,
    cut: str,
    code_channels: int,
    codec: str = INT8,
    input_size: int | None = None,
    epochs: int = 5,
    batch_rows: int = 32,
    learning_rate: float = 2e-2,
    validation: float = 0.2,
    seed: int = 0,
    timeout_s: float | None = None,
    progress: bool | None = None,
) -> FittedBottleneck:
    """Fit a linear encoder and decoder around the wire, so that the embedding stays what it is.

    It starts from the principal components of the channels. Then both layers are trained through the remote trunk, the
    codec included, to lower the relative squared error of every slice of the embedding behind the cut.

    Args:
        client: Of the cluster.
        images: As in ``Client.upload``, without labels: some hundred of those that will be sent later.
        backbone: Name of the backbone.
        cut: Where the stem ends.
        code_channels: Channels of the code: with the codec, what a row costs.
        codec: In which codes will travel.
        input_size: Side of the square that pictures are brought to, in pixels. Default: the backbone's own.
        epochs: Passes over the pictures. 0: the principal components as they are.
        batch_rows: Pictures a step.
        learning_rate: Of Adam, at the start; it falls to 0 along half a cosine.
        validation: Fraction of the pictures held out to measure the error.
        seed: Of the order of the pictures and of those held out.
        timeout_s: Deadline of one pass through the trunk. Default: 300 s.
        progress: None: show it if somebody can see it. False: never.

    Raises:
        InvalidArgumentError: Something is out of range.
        NotFoundError: There is no such backbone or cut.
        UnsupportedError: There is no such codec.
        NotFiniteError: It diverged; use a lower learning rate.
    """
    from trunkline.images import pictures

    rows = pictures(images)
    _check(len(rows), epochs, batch_rows, learning_rate, validation)
    spec = client.describe(backbone, input_size=input_size)
    stem = client.stem(backbone, cut=cut, input_size=input_size, codec=FLOAT32)
    found = spec.cut(cut)
    assert found is not None
    widths = [one.width for name in found.slices for one in spec.slices if one.name == name]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    num_held = min(max(1, round(validation * len(rows))), len(rows) - 1)
    with show_progress(f"Fitting a bottleneck at {cut}", epochs + 1.0, progress) as bar:
        held, kept = (_features(stem, [rows[one] for one in some]) for some in (order[:num_held], order[num_held:]))
        made = Bottleneck.from_features(kept, stem.space, found.channel_axis, code_channels, codec)
        where: dict[str, Any] = {"cut": cut, "input_size": input_size, "timeout_s": timeout_s}
        plain = RemoteTrunk(client, backbone, outputs=found.slices, **where)
        narrow = RemoteTrunk(client, backbone, outputs=found.slices, decoder=made.decoder, **where)
        held_BD, kept_BD = _embedding(plain, held, batch_rows), _embedding(plain, kept, batch_rows)
        bar.advance(1.0)
        start_error = _error(made, narrow, held, held_BD, widths, batch_rows)
        optimiser = torch.optim.Adam(made.parameters(), lr=learning_rate)
        total = epochs * math.ceil(len(kept) / batch_rows)
        losses: list[float] = []
        step = 0
        for _ in range(epochs):
            summed = 0.0
            for some in torch.randperm(len(kept), generator=generator).split(batch_rows):
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
                loss = _relative(narrow(made.encode(kept[some])), kept_BD[some], widths).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                summed += loss.item() * len(some)
                step += 1
            losses.append(summed / len(kept))
            bar.advance(1.0)
        error = _error(made, narrow, held, held_BD, widths, batch_rows) if epochs else start_error
    return FittedBottleneck(made, error, start_error, tuple(losses))


def _check(num_rows: int, epochs: int, batch_rows: int, learning_rate: float, validation: float) -> None:
    if num_rows < MIN_PICTURES:
        raise InvalidArgumentError(
            f"{num_rows} pictures; at least {MIN_PICTURES} are needed",
            hint="Give some hundred of those that will be sent",
        )
    if epochs < 0 or batch_rows < 1 or not 0 < learning_rate < 1 or not 0 < validation < 1:
        raise InvalidArgumentError(
            f"epochs ({epochs}) are 0 or more, batch_rows ({batch_rows}) 1 or more, learning_rate ({learning_rate}) "
            f"and validation ({validation}) between 0 and 1"
        )


def _features(stem: Stem, rows: Sequence[Picture]) -> Tensor:
    parts = [stem.run(rows[start : start + RUN_ROWS]) for start in range(0, len(rows), RUN_ROWS)]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32, copy=False))


@torch.no_grad()
def _embedding(trunk: RemoteTrunk, features: Tensor, batch_rows: int) -> Tensor:
    return torch.cat([trunk(some) for some in features.split(batch_rows)])


@torch.no_grad()
def _error(
    made: Bottleneck, narrow: RemoteTrunk, features: Tensor, expected_BD: Tensor, widths: Sequence[int], batch_rows: int
) -> float:
    got_BD = torch.cat([narrow(made.encode(some)) for some in features.split(batch_rows)])
    return float(_relative(got_BD, expected_BD, widths).sqrt().max())


def _relative(got_BD: Tensor, expected_BD: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the relative squared error of each slice, taken as one vector over the rows."""
    pairs = zip(got_BD.split(list(widths), dim=1), expected_BD.split(list(widths), dim=1), strict=True)
    return torch.stack([(got - want).square().sum() / want.square().sum().clamp_min(1e-12) for got, want in pairs])
