"""Rows of an embedding with labels that can be learnt, for tests of whole trainings."""

from __future__ import annotations

from typing import Any

import numpy as np
from trunkline_wire.specs import SliceSpec
from trunkline_worker.store.records import JobSpec
from trunkline_worker.training.loop import Labels, Source, TrainingResult, train_head

SLICES = (SliceSpec("a/mean", 0, 4), SliceSpec("a/grid", 4, 20), SliceSpec("pooled", 20, 30))
NAMES = ("cat", "dog", "hen")
SPEC = JobSpec(model="m", dataset="d", backbone="b", input_size=0, seed=7)


def rows_and_labels(num_rows: int = 90) -> tuple[np.ndarray, Labels]:
    """Return rows whose class shows in `a/grid`, and a little in `pooled`."""
    draw = np.random.default_rng(0)
    classes = draw.permutation(np.arange(num_rows) % 3)
    x = draw.normal(size=(num_rows, 30)).astype(np.float32) * 5 + 3
    centres = np.random.default_rng(99).normal(size=(3, 26))
    x[:, 4:] += 6 * centres[classes].astype(np.float32)
    return x, Labels(NAMES, classes.astype(np.uint32))


def numbers(num_rows: int = 90) -> tuple[np.ndarray, Labels]:
    """Return rows, and numbers that follow from `a/grid`."""
    x, _ = rows_and_labels(num_rows)
    weights = np.random.default_rng(3).normal(size=(16, 2)).astype(np.float32)
    return x, Labels((), None, 40 * x[:, 4:20] @ weights + 1000)


def train(
    spec: JobSpec, x: np.ndarray, labels: Labels, groups: np.ndarray | None = None, views: int = 1, **more: Any
) -> TrainingResult:
    """Train a head as a job does."""
    keywords: dict[str, Any] = {"on_event": lambda event: None, "should_stop": lambda: False, **more}
    return train_head([Source("b", x, SLICES)], labels, spec, groups=groups, num_views=views, **keywords)
