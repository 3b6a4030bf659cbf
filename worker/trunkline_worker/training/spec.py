"""Checks what a job asks for. No torch: the gateway refuses a bad job before it is queued."""

from __future__ import annotations

from trunkline_wire.heads import CONCAT, HUBER, LINEAR, LOSSES, PROTOTYPE, HeadConfig, invalid

from trunkline_worker.store.records import JobSpec

EMBEDDINGS = ("pooled", "auto", "slices")
SOLVERS = ("lbfgs", "adam")
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
    if spec.solver == "lbfgs" and spec.head.kind not in (LINEAR, PROTOTYPE):
        raise invalid(f"solver 'lbfgs' is for linear heads; train one of kind {spec.head.kind!r} with solver 'adam'")
    if spec.solver == "lbfgs" and spec.head.fuse != CONCAT:
        raise invalid(
            f"solver 'lbfgs' is for inputs side by side; fusion {spec.head.fuse!r} has layers of its own: train it "
            "with solver 'adam'"
        )
    if spec.solver == "adam" and spec.head.kind == PROTOTYPE:
        raise invalid("a prototype head is made in closed form; leave the solver to us, or say 'lbfgs'")
    if spec.head.batch_norm and spec.batch_size == 1:
        raise invalid("batch normalisation needs batches of at least 2 rows; got a batch size of 1")
    if spec.loss not in LOSSES:
        raise invalid(f"loss {spec.loss[:40]!r} is not known; one of {', '.join(LOSSES)} is needed")
    if not 0.0 < spec.huber_delta < 1e6:
        raise invalid(f"the delta of Huber's loss is above 0, in standard deviations; got {spec.huber_delta}")
    if spec.loss == HUBER and spec.head.kind == PROTOTYPE:
        raise invalid("a prototype head minimises squared errors; use loss 'mse', or a linear head")
    if not 0.0 <= spec.validation_fraction < 1.0:
        raise invalid(f"the validation fraction is at least 0 and below 1; got {spec.validation_fraction}")
    if not 0 <= spec.epochs <= MAX_EPOCHS or not 0 <= spec.batch_size <= MAX_BATCH_SIZE:
        raise invalid(f"epochs are 0 to {MAX_EPOCHS}, the batch size 0 to {MAX_BATCH_SIZE}; 0 leaves it to us")
    if not 0.0 <= spec.learning_rate <= 10.0:
        raise invalid(f"the learning rate is above 0 and at most 10, or 0 to leave it to us; got {spec.learning_rate}")
    if not -1e12 < spec.l2 < 1e12:
        raise invalid(f"the L2 strength is a number of at least 0, or negative to have it chosen; got {spec.l2}")
    return spec.head
