"""Backbones of one's own: a factory and a file of weights, checked in every way that would show only later."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from trunkline_wire.errors import ErrorCode, WireError
from trunkline_wire.specs import INPUT_CUT, Preprocessing

from trunkline_worker.backbones.backbone import MAX_INPUT_SIZE, Backbone, Normalise, WeightsInfo, sha256_of
from trunkline_worker.backbones.factory import build_network, import_leaf, kind_of, quoted
from trunkline_worker.backbones.manifest import Manifest
from trunkline_worker.backbones.samples import BUNDLED, Samples
from trunkline_worker.backbones.timm_models import TracingRules, tracing_rules
from trunkline_worker.backbones.weights import fit_by_name, float32, read_safetensors

# Shape suffix legend: B = rows, H = height, W = width, C = channels, K = outputs

PARITY_TOLERANCE = 1e-4
"""What is taken for rounding between two ways to compute the outputs, relative to the largest output."""

MAX_PARITY_CUTS = 24
"""Cuts at which stem and trunk are compared with the uncut network: every end of a stage, and others between them."""

_NUM_PICTURES = 2
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class Check:
    """One thing that was checked, and what was found."""

    name: str
    detail: str


@dataclass(frozen=True)
class Registration:
    """A backbone that may be served, and what was checked.

    Attributes:
        backbone: Ready to use.
        checks: In the order in which they were made.
        parity_error: Largest difference between stem and trunk and the uncut network, relative to the largest output.
    """

    backbone: Backbone
    checks: tuple[Check, ...]
    parity_error: float


def load_own(manifest: Manifest, *, samples: Samples = BUNDLED) -> Backbone:
    """Build a backbone of one's own and check it.

    Raises:
        WireError: See ``register``.
    """
    return register(manifest, samples=samples).backbone


def register(manifest: Manifest, *, samples: Samples = BUNDLED) -> Registration:
    """Build a backbone of one's own, and check all that could otherwise be wrong without a word.

    Args:
        manifest: Says how it is built.
        samples: Pictures to check it with.

    Raises:
        WireError: INVALID_ARGUMENT where the factory cannot be found, fails or reaches for the network; NOT_FOUND,
            UNSUPPORTED, CORRUPT_DATA or INCOMPATIBLE for its weights; INCOMPATIBLE where labels and outputs differ in
            number; NOT_FINITE where outputs or embedding are not; UNSUPPORTED where the network cannot be traced, does
            not return (rows, outputs), or gives something else when it is traced or cut than it does by itself.
    """
    network = build_network(manifest)
    checks = [Check("factory", f"{manifest.factory} builds {kind_of(network)} without going online")]
    state = float32(read_safetensors(manifest.weights))
    fit_by_name(network, state, manifest.weights.name)
    checks.append(Check("weights", f"all {len(state)} tensors of {manifest.weights.name} fit"))
    network.eval().requires_grad_(False)
    pictures_BHWC = _pictures(samples, manifest.preprocessing)
    reference_BK = _reference(network, manifest.preprocessing, pictures_BHWC)
    num_outputs = reference_BK.shape[1]
    checks.append(Check("outputs", f"{num_outputs} finite numbers a row, the same every time, no row touches another"))
    if manifest.labels and len(manifest.labels) != num_outputs:
        raise WireError(
            ErrorCode.INCOMPATIBLE,
            f"{manifest.name} returns {num_outputs} outputs a row; its manifest names {len(manifest.labels)} labels",
        )
    if manifest.labels:
        checks.append(Check("labels", f"{len(manifest.labels)}, one for each output"))
    larger = _larger(manifest)
    resized = _resized_reference(network, larger, samples) if larger is not None else None
    backbone = _traced(manifest, network, samples)
    error = _relative_error(_whole(backbone, pictures_BHWC), reference_BK)
    _check_error(error, f"the graph that was traced of {manifest.name}", "does something that tracing does not see")
    checks.append(
        Check("trace", f"{len(backbone.cut_names)} cuts, {len(backbone.stage_names)} stages; error {error:.1g}")
    )
    parity_error, cuts = _parity(backbone, pictures_BHWC, reference_BK)
    checks.append(Check("parity", f"stem and trunk at {len(cuts)} cuts; largest error {parity_error:.1g}"))
    _check_embedding(backbone, pictures_BHWC)
    checks.append(Check("embedding", f"{backbone.describe().slices[-1].stop} finite columns"))
    if resized is not None and larger is not None:
        checks.append(_check_resizable(backbone, larger, resized))
    return Registration(backbone, tuple(checks), parity_error)


def _pictures(samples: Samples, preprocessing: Preprocessing) -> torch.Tensor:
    """Return a few pictures and their mirror images: two rows or more, whatever the folder holds."""
    pictures_BHWC = samples.pictures(preprocessing, _NUM_PICTURES)
    return torch.from_numpy(np.concatenate([pictures_BHWC, pictures_BHWC[:, :, ::-1]]))


def _reference(network: nn.Module, preprocessing: Preprocessing, pictures_BHWC: torch.Tensor) -> torch.Tensor:
    """Return the outputs of the network as it was built, before anything was done to it.

    Raises:
        WireError: UNSUPPORTED or NOT_FINITE.
    """
    x_BCHW = Normalise(preprocessing)(pictures_BHWC)
    first_BK = _outputs(network, x_BCHW)
    if _relative_error(_outputs(network, x_BCHW), first_BK) > PARITY_TOLERANCE:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            "the network gives other outputs when it is run again on the same pictures: something in it is random or "
            "remembers. In forward, ask self.training before dropout and the like",
        )
    if _relative_error(_outputs(network, x_BCHW[:1]), first_BK[:1]) > PARITY_TOLERANCE:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            "the outputs for a picture depend on the other pictures of its batch: rows must be independent in "
            "evaluation mode",
        )
    return first_BK


def _outputs(network: nn.Module, x_BCHW: torch.Tensor) -> torch.Tensor:
    expected = "one float tensor of shape (rows, outputs) is expected"
    try:
        with torch.inference_mode():
            outputs = network(x_BCHW)
    except Exception as error:  # whatever the network's own code raises
        raise WireError(
            ErrorCode.UNSUPPORTED,
            f"the network does not take pictures of {x_BCHW.shape[-1]} pixels as {tuple(x_BCHW.shape)}, float32: "
            f"{quoted(error)}",
        ) from error
    if not isinstance(outputs, torch.Tensor):
        raise WireError(ErrorCode.UNSUPPORTED, f"the network returns {kind_of(outputs)}; {expected}")
    if outputs.ndim != 2 or len(outputs) != len(x_BCHW) or not outputs.is_floating_point() or outputs.shape[1] == 0:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            f"the network returns {tuple(outputs.shape)} of {outputs.dtype} for {len(x_BCHW)} rows; {expected}",
        )
    if not outputs.isfinite().all():
        raise WireError(
            ErrorCode.NOT_FINITE,
            f"{int((~outputs.isfinite()).sum())} of {outputs.numel()} outputs of the network are not finite on sample "
            "pictures: look at its weights, and at mean and std in the manifest",
        )
    return outputs.clone()


def _larger(manifest: Manifest) -> Preprocessing | None:
    """Return the preprocessing at another size than the network's own, to try it at; None where it has but one."""
    own = manifest.preprocessing.input_size
    other = 2 * own if 2 * own <= MAX_INPUT_SIZE else own // 2
    return replace(manifest.preprocessing, input_size=other) if manifest.resizable else None


def _resized_reference(network: nn.Module, preprocessing: Preprocessing, samples: Samples) -> torch.Tensor:
    try:
        return _reference(network, preprocessing, _pictures(samples, preprocessing))
    except WireError as error:
        raise WireError(error.code, f"{error.message}. The manifest says resizable = true; say false") from error


def _traced(manifest: Manifest, network: nn.Module, samples: Samples) -> Backbone:
    leaves = [import_leaf(manifest, reference) for reference in manifest.leaves]
    # A network may be made of timm's parts.
    rules = tracing_rules() if "timm" in sys.modules else TracingRules((), ())
    structure = repr(network)
    try:
        backbone = Backbone(
            manifest.name,
            network,
            manifest.preprocessing,
            WeightsInfo(f"file {manifest.weights.name}", pretrained=True),
            sha256_of(network),
            resizable=manifest.resizable,
            leaves=(*leaves, *rules.leaves),
            functions=rules.functions,
            class_names=manifest.labels,
            samples=samples,
        )
    except WireError as error:
        if error.code is not ErrorCode.UNSUPPORTED:
            raise
        raise WireError(
            error.code,
            f"{error.message}. Where it depends on sizes only, its class may be named in the leaves",
        ) from error
    # Code can change where weights do not: features of another graph must not pass for comparable.
    backbone.weights_sha256 = _digest(backbone, structure)
    return backbone


def _digest(backbone: Backbone, structure: str) -> str:
    """Return the hex SHA-256 over the weights and over what is computed with them."""
    graphs = [str(one.graph) for one in backbone.modules() if isinstance(one, torch.fx.GraphModule)]
    text = "\0".join(["own-v1", backbone.weights_sha256, structure, *graphs])
    return hashlib.sha256(_ADDRESS.sub("", text).encode()).hexdigest()


def _whole(backbone: Backbone, pictures_BHWC: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        outputs: torch.Tensor = backbone.whole()(pictures_BHWC)
    return outputs


def _parity(backbone: Backbone, pictures_BHWC: torch.Tensor, reference_BK: torch.Tensor) -> tuple[float, list[str]]:
    """Return the largest error of stem and trunk against the uncut network, and the cuts that were tried."""
    largest = 0.0
    cuts = _spread([one for one in backbone.cut_names if one != INPUT_CUT], backbone.stage_names)
    for cut in cuts:
        with torch.inference_mode():
            error = _relative_error(backbone.rest(cut)(backbone.stem(cut)(pictures_BHWC)), reference_BK)
        _check_error(error, f"{backbone.name} cut at {cut!r}", "keeps something between its layers")
        largest = max(largest, error)
    return largest, cuts


def _spread(cuts: Sequence[str], stages: Sequence[str]) -> list[str]:
    """Return every end of a stage, the last cut, and others evenly between them."""
    kept = {*stages, *cuts[-1:]}
    others = [one for one in cuts if one not in kept]
    num = min(len(others), max(0, MAX_PARITY_CUTS - len(kept)))
    kept.update(others[index * len(others) // num] for index in range(num))
    return [one for one in cuts if one in kept]


def _check_error(error: float, what: str, why: str) -> None:
    if not error <= PARITY_TOLERANCE:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            f"{what} gives other outputs than the network itself: they differ by {error:.2g} of the largest, and "
            f"{PARITY_TOLERANCE:g} is allowed. The network {why}",
        )


def _check_embedding(backbone: Backbone, pictures_BHWC: torch.Tensor) -> None:
    with torch.inference_mode():
        embedding_BD = backbone.trunk(INPUT_CUT)(pictures_BHWC)
    if not embedding_BD.isfinite().all():
        bad = [
            one.name for one in backbone.describe().slices if not embedding_BD[:, one.start : one.stop].isfinite().all()
        ]
        raise WireError(
            ErrorCode.NOT_FINITE,
            f"the embedding of {backbone.name} is not finite on sample pictures, in {', '.join(bad)}",
        )


def _check_resizable(backbone: Backbone, preprocessing: Preprocessing, reference_BK: torch.Tensor) -> Check:
    size = preprocessing.input_size
    if not backbone.resizable:
        raise WireError(
            ErrorCode.UNSUPPORTED,
            f"{backbone.name} could be traced at its own input size only, for its forward decides on sizes or values: "
            "say resizable = false in the manifest, or decide such things when the modules are built",
        )
    try:
        backbone.describe(size)
    except WireError as error:
        raise WireError(error.code, f"{error.message}. The manifest says resizable = true; say false") from error
    outputs_BK = _whole(backbone, _pictures(backbone.samples, preprocessing))
    difference = _relative_error(outputs_BK, reference_BK)
    _check_error(difference, f"{backbone.name} at {size} pixels", "decides on its input size: say resizable = false")
    return Check("resizable", f"tried at {size} pixels; error {difference:.1g}")


def _relative_error(outputs: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference relative to the largest number; infinity where shapes differ."""
    if outputs.shape != reference.shape:
        return float("inf")
    largest = max(float(reference.abs().max()), torch.finfo(torch.float32).tiny)
    return float((outputs - reference).abs().max()) / largest
