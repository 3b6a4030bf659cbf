"""Checks what a job asks for. No torch: the gateway refuses a bad job before it is queued."""

from __future__ import annotations

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import AUTO, CROSS_ENTROPY, FOCAL, MSE, QUANTILE, check_sweep, is_metric
from trunkline_wire.heads import CONCAT, LINEAR, PROTOTYPE, TAIL, HeadConfig, invalid

from trunkline_worker.store.records import JobSpec

EMBEDDINGS = ("pooled", "auto", "slices")
SOLVERS = ("lbfgs", "adamw")
MAX_EPOCHS = 100_000
MAX_BATCH_SIZE = 2**20


def check_spec(spec: JobSpec) -> HeadConfig:
    """Check what a spec says about head, solver and embedding, before any data is touched.

    Raises:
        WireError: INVALID_ARGUMENT, UNSUPPORTED.
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
        raise invalid(f"solver 'lbfgs' is for linear heads; train one of kind {spec.head.kind!r} with solver 'adamw'")
    if spec.solver == "lbfgs" and spec.head.fuse != CONCAT:
        raise invalid(
            f"solver 'lbfgs' is for inputs side by side; fusion {spec.head.fuse!r} has layers of its own: train it "
            "with solver 'adamw'"
        )
    if spec.solver == "adamw" and spec.head.kind == PROTOTYPE:
        raise invalid("a prototype head is made in closed form; leave the solver to us, or say 'lbfgs'")
    if spec.head.batch_norm and spec.batch_size == 1:
        raise invalid("batch normalisation needs batches of at least 2 rows; got a batch size of 1")
    if spec.solver == "lbfgs" and spec.loss.kind in (FOCAL, QUANTILE):
        raise invalid(f"loss {spec.loss.kind!r} is not one that 'lbfgs' can solve; train with solver 'adamw'")
    if spec.head.kind == PROTOTYPE and (
        spec.loss.kind not in (AUTO, CROSS_ENTROPY, MSE) or spec.loss.is_weighted or spec.loss.label_smoothing
    ):
        raise invalid("a prototype head is what its rows have in common: it has no loss or weights; leave them out")
    if spec.optimiser.mixup:
        _check_mixup(spec)
    if spec.loss.class_order and (spec.head.kind != LINEAR or spec.solver != "lbfgs"):
        raise invalid("classes in order are learnt by linear heads with solver 'lbfgs'; leave head and solver out")
    if spec.select_by and not is_metric(spec.select_by):
        raise invalid(f"there is no metric {spec.select_by[:40]!r} to choose by")
    if not 0.0 <= spec.validation_fraction < 1.0:
        raise invalid(f"the validation fraction is at least 0 and below 1; got {spec.validation_fraction}")
    if not 0 <= spec.epochs <= MAX_EPOCHS or not 0 <= spec.batch_size <= MAX_BATCH_SIZE:
        raise invalid(f"epochs are 0 to {MAX_EPOCHS}, the batch size 0 to {MAX_BATCH_SIZE}; 0 leaves it to us")
    if not 0.0 <= spec.learning_rate <= 10.0:
        raise invalid(f"the learning rate is above 0 and at most 10, or 0 to leave it to us; got {spec.learning_rate}")
    if not -1e12 < spec.l2 < 1e12:
        raise invalid(f"the L2 strength is a number of at least 0, or negative to have it chosen; got {spec.l2}")
    _check_sweep(spec)
    _check_fine_tune(spec)
    return spec.head


def _check_fine_tune(spec: JobSpec) -> None:
    """Check that a job asks for nothing that the blocks behind its head could not heed."""
    if spec.head.kind == TAIL:
        raise invalid("a head of kind 'tail' is what fine-tuning makes; ask for fine-tuning instead")
    if spec.fine_tune is None:
        return
    if spec.head.kind != LINEAR:
        raise invalid(f"fine-tuning goes on from a linear head; leave the head of kind {spec.head.kind!r} out")
    if spec.sweep is not None:
        raise invalid("a sweep tries heads on the backbone as it is; fine-tune with what it found, in a job of its own")
    if spec.more_backbones:
        raise invalid("fine-tuning trains the last blocks of a single backbone; leave the others out")
    if spec.loss.class_order:
        raise WireError(ErrorCode.UNSUPPORTED, "fine-tuning cannot learn classes in order; leave the order out")
    if spec.validation_fraction == 0.0:
        raise invalid(
            "fine-tuned blocks are kept only where held-out rows say that they help; hold some out: a validation "
            "fraction above 0"
        )


def _check_mixup(spec: JobSpec) -> None:
    """Check that rows can be mixed: in minibatches, where what lies between two labels means something."""
    if spec.loss.class_order:
        raise invalid("classes in order are not mixed: between two of them lie others; leave mixup out")
    if spec.head.kind == PROTOTYPE:
        raise invalid("a prototype head is made in closed form: nothing is learnt in minibatches; leave mixup out")
    if spec.sweep is not None:
        raise invalid("a sweep does not mix rows; leave mixup out")
    if spec.solver == "lbfgs":
        raise invalid("solver 'lbfgs' takes all rows at once, as they are; for mixup train with solver 'adamw'")


def _check_sweep(spec: JobSpec) -> None:
    """Check that a job has nothing that a search could not heed."""
    if spec.sweep is None:
        return
    check_sweep(spec.sweep, spec.head, spec.loss)
    if spec.sweep.embeddings and spec.more_backbones:
        raise invalid("a sweep tries slices of a single backbone; leave the embeddings out, or the other backbones")
    if spec.sweep.embeddings and spec.embedding == "slices":
        raise invalid("slices are named, and slices to try as well; leave one of them out")
