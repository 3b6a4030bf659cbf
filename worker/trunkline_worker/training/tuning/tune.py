"""Fine-tuning as a step of a training job: from a fitted head, by way of a run, to a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import AUTO, FOCAL, QUANTILE
from trunkline_wire.heads import LINEAR, HeadConfig, invalid
from trunkline_wire.specs import POOLED, CutSpec, SliceSpec

from trunkline_worker.heads.artefact import load_own_state
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head
from trunkline_worker.store.records import FineTuning, JobSpec
from trunkline_worker.training.choose import choose_l2, choose_slices
from trunkline_worker.training.fit import Rows, fit_head, quantile_of
from trunkline_worker.training.metrics import measure
from trunkline_worker.training.pictures import Pictures
from trunkline_worker.training.progress import Progress
from trunkline_worker.training.sources import Source
from trunkline_worker.training.split import TRUST, Indices, random_stream
from trunkline_worker.training.tuning.compare import compare
from trunkline_worker.training.tuning.work import StartHead, TailTrainer, TuningOutcome, TuningWork, filled_in

# Shape suffix legend: N = pictures of the dataset, K = outputs

PHASE = "tune"
MEASURE, REFIT = "measure", "refit"
"""Names of the two runs of a job: on the training rows, to be judged, and then on all of them."""


@dataclass(frozen=True)
class TailSource:
    """Where a tail begins, and who trains it.

    Attributes:
        cut: Where, in the backbone of the first input; its features are a map, or a map and tokens beside it.
        trainer: Does the work.
    """

    cut: CutSpec
    trainer: TailTrainer

    @property
    def input(self) -> HeadInput:
        """What the blocks read: all of the features."""
        return HeadInput((self.cut.whole_slice,), (math.prod(self.cut.whole_shape),), self.cut.whole_shape)


@dataclass(frozen=True)
class Tuned:
    """A head on trained blocks, and whether it is to be kept.

    Attributes:
        record: For whoever asks why.
        head: On the CPU. Only if it is kept.
        outputs_NK: Its outputs for all pictures, as it was when it was judged. Only if it is kept.
        curves: By epoch.
    """

    record: FineTuning
    head: Head | None
    outputs_NK: Tensor | None
    curves: dict[str, list[float]]


def check_tuning(spec: JobSpec, tail: TailSource | None) -> None:
    """Check that a job's blocks can be trained, beside what ``check_spec`` does.

    Raises:
        WireError: INVALID_ARGUMENT, UNSUPPORTED.
    """
    if spec.fine_tune is None:
        return
    if tail is None:
        raise WireError(
            ErrorCode.UNSUPPORTED, "fine-tuning needs a backbone and somebody who trains it; neither is here"
        )
    if spec.embedding == "slices" and not set(spec.slices) <= set(tail.cut.slices):
        missing = sorted(set(spec.slices) - set(tail.cut.slices))
        raise invalid(
            f"slice {missing[0]!r} lies before the cut {tail.cut.name!r}, behind which blocks are to be trained; there "
            f"is {', '.join(tail.cut.slices)}"
        )


def fine_tune(
    spec: JobSpec,
    task: str,
    num_outputs: int,
    source: Source,
    tail: TailSource,
    truth: Tensor,
    classes_N: Indices | None,
    training_index: Indices,
    validation_index: Indices,
    before_NK: Tensor,
    progress: Progress,
    pictures: Pictures,
) -> Tuned:
    """Train the last blocks behind a head that is fitted first, and say whether that helped.

    Source: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution": first
    the head, then everything.

    Args:
        spec: The job.
        task: One of ``heads.TASKS``.
        num_outputs: Of the head.
        source: The first input, with its embedding.
        tail: Where blocks begin.
        truth: Of all pictures.
        classes_N: Class of each picture, or None.
        training_index: Pictures to learn from.
        validation_index: Held-out ones.
        before_NK: What the head alone says of these.
        progress: Told how far it is; may raise to stop.
        pictures: How the rows belong together.
    """
    assert spec.fine_tune is not None
    config = filled_in(replace(spec.fine_tune, cut=tail.cut.name), len(training_index) * pictures.num_views)
    progress.tell(PHASE, 0.0)
    # One solution, found to the end, is the best start there is, whatever is minimised then.
    loss = replace(spec.loss, kind=AUTO) if spec.loss.kind in (FOCAL, QUANTILE) else spec.loss
    linear = replace(spec, head=HeadConfig(LINEAR), solver="lbfgs", loss=loss)
    slices = _slices(spec, source, tail, task, truth, classes_N, training_index, progress, pictures)
    names = tuple(one.name for one in slices)
    everything = Rows(source.columns(slices), pictures.spread(truth))

    def work_on(name: str, index: Indices) -> TuningWork:
        row_index = pictures.views(index)
        rows = everything.take(torch.from_numpy(row_index).to(truth.device))
        own_classes_N = None if classes_N is None else classes_N[index]
        l2 = spec.l2
        if l2 < 0:
            widths = [one.width for one in slices]
            l2 = choose_l2(linear, task, rows, own_classes_N, widths, _quiet(progress), pictures.take(index))
        inputs = [source.head_input(slices)]
        start = fit_head(linear, task, num_outputs, inputs, rows, None, l2, _quiet(progress), span=(0.0, 1.0)).head
        return TuningWork(
            *(name, config, spec, task, names, tail.input, StartHead.of(start)),
            truth=everything.truth.cpu().numpy(),
            training_index=row_index,
            # Of the pictures themselves: changed views are for training alone.
            wanted_index=np.arange(pictures.count) * pictures.num_views if name == MEASURE else index[:0],
        )

    def run(work: TuningWork, start: float, stop: float) -> TuningOutcome:
        def tell(done: float, metrics: Mapping[str, float], message: str) -> None:
            progress.tell(PHASE, start + (stop - start) * done, metrics, message, always=bool(message))

        return tail.trainer.run(work, tell=tell, should_stop=progress.should_stop)

    work = work_on(MEASURE, training_index)
    measured = run(work, 0.0, 0.6 if spec.refit else 0.95)
    outputs_NK = torch.from_numpy(measured.outputs_WK)
    held_out = torch.from_numpy(validation_index)
    own_truth = truth.cpu()[held_out]
    generator = random_stream(spec.seed, TRUST)
    verdict = compare(task, spec.select_by, before_NK.cpu(), outputs_NK[held_out], own_truth, generator)
    last, runs = measured, [measured]
    if verdict.is_better and spec.refit:
        last = run(work_on(REFIT, np.arange(pictures.count)), 0.6, 0.95)
        runs.append(last)
    quantile = quantile_of(spec)
    record = FineTuning(
        kept=verdict.is_better,
        reason=verdict.reason,
        cut=tail.cut.name,
        metric=verdict.metric,
        gain=verdict.gain,
        low=verdict.low,
        high=verdict.high,
        before=measure(task, before_NK.cpu(), own_truth, quantile=quantile),
        after=measure(task, outputs_NK[held_out], own_truth, quantile=quantile),
        num_trained=measured.num_trained,
        epochs=config.epochs,
        num_workers=max(one.num_workers for one in runs),
        num_resumed=sum(one.num_resumed for one in runs),
        seconds=sum(one.seconds for one in runs),
    )
    message = f"the blocks behind {tail.cut.name} are {verdict.reason}"
    progress.tell(PHASE, 1.0, {"gain": verdict.gain}, message, always=True)
    if not verdict.is_better:
        return Tuned(record, None, None, measured.curves)
    return Tuned(record, _head(last, work, tail), outputs_NK, measured.curves)


def _slices(
    spec: JobSpec,
    source: Source,
    tail: TailSource,
    task: str,
    truth: Tensor,
    classes_N: Indices | None,
    training_index: Indices,
    progress: Progress,
    pictures: Pictures,
) -> list[SliceSpec]:
    """Return what the tail is to make: the best slices behind the cut, and the last layer, so that all of it learns."""
    behind = [one for one in source.slices if one.name in tail.cut.slices]
    if spec.embedding == "slices":
        chosen: Sequence[str] = spec.slices
    elif spec.embedding == POOLED:
        chosen = (POOLED,)
    else:
        found = choose_slices(
            *(pictures.firsts(source.tensor), behind, task, truth, classes_N, training_index, spec.seed),
            *(_quiet(progress), pictures.groups_P),
        )
        chosen = (*found[0].slices, POOLED)
    return source.take(tuple(dict.fromkeys(chosen)))


def _head(outcome: TuningOutcome, work: TuningWork, tail: TailSource) -> Head:
    """Put the head together from what a run sent back."""
    head = work.make_head(tail.trainer.make_tail(work.head_config))
    other = WireError(ErrorCode.INTERNAL, "a fine-tuning run came back with another model than it was sent")
    load_own_state(head, outcome.tensors, other)
    return head.eval().requires_grad_(False)


def _quiet(progress: Progress) -> Progress:
    """Return a progress that stops with the given one, and tells nothing: these are steps of a step."""
    return Progress(lambda event: None, progress.should_stop)
