"""From what a job asks for to what it will do: who reads the dataset, at which input size, which slices of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.fits import check_metric
from trunkline_wire.heads import CLASSIFICATION, CONV, MULTI_LABEL, ORDINAL, REGRESSION, invalid
from trunkline_wire.limits import MAX_INPUTS
from trunkline_wire.specs import INPUT_CUT, POOLED, BackboneSpec, CutSpec, FeatureSpace, map_slice

from trunkline_worker.serving.backends import Backends, TuningLimits
from trunkline_worker.store.records import BackboneChoice, DatasetRecord, JobSpec


@dataclass(frozen=True)
class _Reader:
    """A backbone that reads an input of the dataset, and the cut where the rows enter it."""

    name: str
    described: BackboneSpec
    cut: CutSpec

    @property
    def choice(self) -> BackboneChoice:
        return BackboneChoice(self.name, self.described.preprocessing.input_size)


async def resolve(spec: JobSpec, dataset: DatasetRecord, backends: Backends) -> JobSpec:
    """Fill in what a job leaves to the cluster, and check that it can work on this dataset.

    Raises:
        WireError: BAD_LABELS, INVALID_ARGUMENT; NOT_FOUND for a backbone, cut or slice that is not there; INCOMPATIBLE
            where the dataset's features are not those of its backbones now.
    """
    if not dataset.class_names and not dataset.num_targets:
        raise WireError(ErrorCode.BAD_LABELS, f"dataset {dataset.reference} has no labels to train on")
    _check_loss(spec, dataset)
    if dataset.space.is_local:
        _check_local_job(spec, dataset)
        return spec
    if not dataset.space.backbone:
        spec = replace(spec, backbone=spec.backbone or backends.default_backbone)
    _check_inputs(spec, dataset)
    readers = await _readers(spec, dataset, backends)
    first = readers[0]
    spec = replace(
        spec,
        backbone=first.name,
        input_size=first.choice.input_size,
        more_backbones=tuple(one.choice for one in readers[1 : 1 + len(spec.more_backbones)]),
    )
    if spec.head.kind == CONV:
        return _with_map(spec, readers)
    spec = replace(spec, slices=_slices(spec.slices, readers))
    return spec if spec.fine_tune is None else _with_tail(spec, dataset, first, backends.tuning)


def _check_loss(spec: JobSpec, dataset: DatasetRecord) -> None:
    """Check that what a job minimises, and chooses by, goes with the dataset's labels."""
    if not dataset.class_names:
        task = REGRESSION
    elif dataset.num_targets:
        task = MULTI_LABEL
    else:
        task = ORDINAL if spec.loss.class_order else CLASSIFICATION
    spec.loss.kind_for(task)
    check_metric(spec.select_by, task)
    names, order, num_weights = dataset.class_names, spec.loss.class_order, len(spec.loss.class_weights)
    if num_weights not in (0, len(names)):
        raise invalid(
            f"{num_weights} class weights for {len(names)} classes of {dataset.reference}; one each is needed"
        )
    if order and sorted(order) != sorted(names):
        raise invalid(
            f"the order names {', '.join(order)[:80]}; the classes of {dataset.reference} are {', '.join(names)[:80]}: "
            "name each of them once"
        )


def _check_local_job(spec: JobSpec, dataset: DatasetRecord) -> None:
    """Check that a job on local features alone asks for nothing that needs a backbone."""
    what = f"dataset {dataset.reference} holds local features alone"
    if spec.backbone or spec.input_size or spec.more_backbones:
        raise invalid(f"{what}: no backbone can read them; leave backbone and input size out")
    if spec.head.kind == CONV:
        raise invalid(f"{what}, which are vectors; a convolutional head needs a map at a cut of a backbone")
    if spec.embedding == "slices":
        raise invalid(f"{what}: there are no slices to name; leave the embedding out")
    if spec.fine_tune is not None:
        raise invalid(f"{what}: there is no backbone whose blocks could be fine-tuned")


def _check_inputs(spec: JobSpec, dataset: DatasetRecord) -> None:
    """Check that the job's backbones can read the dataset, and that the inputs of the model can be told apart."""
    space = dataset.space
    if space.backbone and spec.more_backbones:
        raise invalid(
            f"dataset {dataset.reference} holds features of {space.backbone}, which no other backbone can read; "
            "upload the images, or features of each backbone"
        )
    if space.backbone and (spec.backbone not in ("", space.backbone) or spec.input_size not in (0, space.input_size)):
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"dataset {dataset.reference} holds features of {space.backbone} at input size {space.input_size}; "
            f"{spec.backbone or space.backbone} at {spec.input_size or space.input_size} cannot read them. Upload the "
            "images again with a stem of that backbone",
        )
    sources = [space.backbone or spec.backbone, *(one.backbone for one in spec.more_backbones)]
    sources += [one.space.source for one in dataset.more_inputs]
    twice = next((one for one in sources if sources.count(one) > 1), None)
    if twice is not None:
        raise invalid(f"{twice[:80]!r} is named twice; backbones and local models of a job are all different")
    if len(sources) > MAX_INPUTS:
        raise invalid(f"{len(sources)} inputs; a model has at most {MAX_INPUTS}")


async def _readers(spec: JobSpec, dataset: DatasetRecord, backends: Backends) -> list[_Reader]:
    """Return who reads the first input, and then who reads others; local features are read by nobody."""
    features = [one.space for one in dataset.more_inputs if not one.space.is_local]
    if dataset.space.backbone:
        features.insert(0, dataset.space)
        choices = []
    else:
        choices = [BackboneChoice(spec.backbone, spec.input_size), *spec.more_backbones]
    return await asyncio.gather(
        *(_image_reader(one, backends) for one in choices),
        *(_feature_reader(one, dataset, backends) for one in features),
    )


async def _image_reader(choice: BackboneChoice, backends: Backends) -> _Reader:
    described = await backends.engine(choice.backbone).describe(choice.input_size)
    cut = described.cut(INPUT_CUT)
    if cut is None:
        raise WireError(ErrorCode.INCOMPATIBLE, f"{choice.backbone} does not read images")
    return _Reader(choice.backbone, described, cut)


async def _feature_reader(space: FeatureSpace, dataset: DatasetRecord, backends: Backends) -> _Reader:
    described = await backends.engine(space.backbone).describe(space.input_size)
    cut = described.cut(space.cut)
    if cut is None or cut.precision_in(space) is None:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"the features of dataset {dataset.reference} were made with other weights or preprocessing than "
            f"{space.backbone} has now; upload the images again",
        )
    return _Reader(space.backbone, described, cut)


def _with_map(spec: JobSpec, readers: Sequence[_Reader]) -> JobSpec:
    """Find the map that a convolutional head reads. Beside it stands the last layer of every other backbone."""
    first, *others = readers
    if spec.embedding == "slices":
        raise invalid("a convolutional head reads the map at its tap; name a tap, and no slices")
    cuts = first.described.cuts
    behind = cuts[cuts.index(first.cut) :]
    maps = [cut for cut in behind if cut.map_shape]
    if spec.head.tap:
        tap = first.described.cut(spec.head.tap)
        if tap is None:
            raise WireError(ErrorCode.NOT_FOUND, f"{first.name} has no cut {spec.head.tap[:80]!r} that could be a tap")
        if tap not in maps:
            why = "lies before the cut where the rows enter" if tap not in behind else "is no map"
            raise invalid(f"the tap {tap.name!r} of {first.name} {why}; {_stages(maps, first)}")
    else:
        tap = next((cut for cut in reversed(maps) if cut.is_stage), None)
        if tap is None:
            raise invalid(
                f"no stage of {first.name} behind the cut {first.cut.name!r} is a map; {_stages(maps, first)}"
            )
    slices = (map_slice(tap.name), *(f"{one.name}:{POOLED}" for one in others))
    return replace(spec, head=replace(spec.head, tap=tap.name), embedding="slices", slices=slices)


def _with_tail(spec: JobSpec, dataset: DatasetRecord, first: _Reader, limits: TuningLimits) -> JobSpec:
    """Find the cut behind which blocks are trained, and check that the cluster can do it."""
    wanted = spec.fine_tune
    assert wanted is not None
    if dataset.more_inputs:
        raise invalid("fine-tuning trains the last blocks of a single backbone; this dataset has further inputs")
    if not limits.max_workers:
        raise WireError(ErrorCode.UNSUPPORTED, "this cluster does not fine-tune; the operator's setting is tuning_runs")
    if wanted.max_workers > limits.max_workers:
        raise invalid(
            f"a fine-tuning run has at most {limits.max_workers} workers on this cluster; {wanted.max_workers} were "
            "asked for. The operator's setting is tuning_workers"
        )
    cuts = first.described.cuts
    behind = [cut for cut in cuts[cuts.index(first.cut) :] if cut.map_shape]
    if wanted.cut:
        cut = first.described.cut(wanted.cut)
        if cut is None:
            raise WireError(
                ErrorCode.NOT_FOUND, f"{first.name} has no cut {wanted.cut[:80]!r}; {_stages(behind, first)}"
            )
        if cut not in behind:
            why = "lies before the cut where the rows enter" if cut.map_shape else "is no map"
            raise invalid(f"the cut {cut.name!r} of {first.name} {why}; {_stages(behind, first)}")
    else:
        stages = [cut for cut in behind if cut.is_stage]
        if not stages:
            raise invalid(f"no stage of {first.name} behind the cut {first.cut.name!r} is a map; name a cut")
        cut = stages[max(0, len(stages) - 2)]
    missing = next((one for one in spec.slices if one not in cut.slices), None)
    if missing is not None:
        raise invalid(
            f"slice {missing!r} lies before the cut {cut.name!r}, behind which blocks are to be trained; there is "
            + ", ".join(cut.slices)
        )
    num_bytes = dataset.num_rows * math.prod(cut.whole_shape) * 4
    if num_bytes > limits.memory_mb * 2**20:
        raise invalid(
            f"the features of {dataset.num_rows} rows at {cut.name!r} need {num_bytes / 2**30:.1f} GiB in each worker; "
            f"{limits.memory_mb / 1024:.1f} GiB are allowed: name a later cut, a smaller input size or fewer rows. "
            "The operator's setting is tuning_memory_mb"
        )
    return replace(spec, fine_tune=replace(wanted, cut=cut.name))


def _stages(maps: Sequence[CutSpec], first: _Reader) -> str:
    names = [cut.name for cut in maps if cut.is_stage] or [cut.name for cut in maps]
    if not names:
        return f"there is none behind the cut {first.cut.name!r}: take a head of another kind"
    return f"among those that can be read behind the cut {first.cut.name!r} are {', '.join(names)}"


def _slices(names: Sequence[str], readers: Sequence[_Reader]) -> tuple[str, ...]:
    """Check the slices that a job names; those of the first backbone go without its name."""
    first = readers[0]
    by_name = {one.name: one for one in readers}
    resolved: list[str] = []
    named = set()
    for name in names:
        source, colon, rest = name.partition(":")
        reader = by_name.get(source) if colon else first
        if reader is None:
            raise WireError(
                ErrorCode.NOT_FOUND,
                f"no backbone {source[:80]!r} reads this dataset, for its slice {rest[:80]!r}; there is "
                + ", ".join(by_name),
            )
        one = rest if colon else name
        if one not in reader.cut.slices:
            raise WireError(
                ErrorCode.NOT_FOUND,
                f"no slice {one[:80]!r} behind the cut {reader.cut.name!r} of {reader.name}; there is "
                + ", ".join(reader.cut.slices),
            )
        resolved.append(one if reader is first else f"{reader.name}:{one}")
        named.add(reader.name)
    if len(set(resolved)) != len(resolved):
        raise invalid("a slice is named twice")
    left_out = [one.name for one in readers if one.name not in named]
    if names and left_out:
        raise invalid(f"no slice of {left_out[0]} is named; name one of each backbone, as 'BACKBONE:SLICE'")
    return tuple(resolved)
