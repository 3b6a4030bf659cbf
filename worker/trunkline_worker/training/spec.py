"""Checks what a job asks for. No torch: the gateway refuses a bad job before it is queued."""

from __future__ import annotations

from trunkline_worker.heads.config import HeadConfig, invalid
from trunkline_worker.store.records import JobSpec

EMBEDDINGS = ("pooled", "auto", "slices")
SOLVERS = ("lbfgs", "adam")
DEFAULT_HIDDEN = (256,)
MAX_EPOCHS = 100_000
MAX_BATCH_SIZE = 2**20


def check_spec(spec: JobSpec) -> HeadConfig:
    """Check what a spec says about head, solver and embedding, before any data is touched.

    Raises:
        WireError: INVALID_ARGUMENT.
    """
    if spec.embedding not in EMBEDDINGS:
        raise invalid(f"embedding {spec.embedding[:40]!r} is not known; one of {', '.join(EMBEDDINGS)} is needed")
    if (spec.embedding == "slices") != bool(spec.slices):
        raise invalid("slices are named if, and only if, the embedding is 'slices'")
    if len(set(spec.slices)) != len(spec.slices):
        raise invalid("a slice is named twice")
    if spec.solver not in SOLVERS:
        raise invalid(f"solver {spec.solver[:40]!r} is not known; one of {', '.join(SOLVERS)} is needed")
    if spec.solver == "lbfgs" and spec.head_kind == "mlp":
        raise invalid("solver 'lbfgs' is for linear heads; train an MLP with solver 'adam'")
    if not 0.0 <= spec.validation_fraction < 1.0:
        raise invalid(f"the validation fraction is at least 0 and below 1; got {spec.validation_fraction}")
    if not 0 <= spec.epochs <= MAX_EPOCHS or not 0 <= spec.batch_size <= MAX_BATCH_SIZE:
        raise invalid(f"epochs are 0 to {MAX_EPOCHS}, the batch size 0 to {MAX_BATCH_SIZE}; 0 leaves it to us")
    if not 0.0 <= spec.learning_rate <= 10.0:
        raise invalid(f"the learning rate is above 0 and at most 10, or 0 to leave it to us; got {spec.learning_rate}")
    if not -1e12 < spec.l2 < 1e12:
        raise invalid(f"the L2 strength is a number of at least 0, or negative to have it chosen; got {spec.l2}")
    hidden = spec.hidden or (DEFAULT_HIDDEN if spec.head_kind == "mlp" else ())
    return HeadConfig(spec.head_kind, hidden, spec.dropout)
