"""Rows mixed in pairs, columns or maps and labels alike, while a head learns.

Source: Zhang, Cisse, Dauphin and Lopez-Paz 2018, "mixup: Beyond Empirical Risk Minimization".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trunkline_worker.training.objective import Objective

# Shape suffix legend: B = rows of a minibatch, D = columns

_STREAM = 1
"""Of random numbers, beside those of the same seed elsewhere."""


@dataclass(frozen=True)
class Mix:
    """How the rows of a minibatch are mixed.

    Attributes:
        share: Of each row itself in what is learnt from, 0 to 1; the rest is its partner's.
        partner_B: Which row of the minibatch each is mixed with.
    """

    share: float
    partner_B: Tensor

    def columns(self, x_BD: Tensor) -> Tensor:
        """Return mixed columns."""
        return self.share * x_BD + (1.0 - self.share) * x_BD[self.partner_B]

    def loss(self, objective: Objective, outputs: Tensor, truth: Tensor) -> Tensor:
        """Return the losses by both labels, mixed as the columns are.

        Of the cross-entropy that is the loss by the mixed label; of squared errors too, but for what no output changes.
        """
        own, other = objective.loss(outputs, truth), objective.loss(outputs, truth[self.partner_B])
        return self.share * own + (1.0 - self.share) * other


class Mixer:
    """Draws how minibatches are mixed, one after another."""

    def __init__(self, alpha: float, seed: int, *place: int) -> None:
        """Prepare to draw.

        Args:
            alpha: Shares come from Beta(alpha, alpha): the smaller, the closer to one of the two rows.
            seed: Of everything drawn. What else is drawn while learning has streams of its own.
            place: Where to begin, such as a step: a run that is resumed draws what it would have drawn.
        """
        self._alpha = alpha
        self._random = np.random.default_rng([seed % 2**64, _STREAM, *place])

    def draw(self, num_rows: int, device: torch.device) -> Mix:
        """Return how the next minibatch is mixed."""
        share = float(self._random.beta(self._alpha, self._alpha))
        return Mix(share, torch.from_numpy(self._random.permutation(num_rows)).to(device))
