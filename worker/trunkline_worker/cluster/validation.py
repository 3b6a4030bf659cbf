"""What ``trunkline validate`` finds out about a backbone of one's own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from trunkline_worker.backbones.catalogue import register_own


def report(path: str, samples: str | None) -> dict[str, Any]:
    """Load a backbone of one's own, check it, and say what was found.

    Raises:
        WireError: See ``register_own``.
    """
    registration = register_own(path, samples=samples)
    spec = registration.backbone.describe()
    return {
        "name": spec.name,
        "weights": spec.weights,
        "weights_sha256": spec.weights_sha256,
        "num_parameters": spec.num_parameters,
        "macs": spec.macs,
        "resizable": spec.resizable,
        "preprocessing": asdict(spec.preprocessing),
        "num_classes": len(spec.class_names),
        "checks": [asdict(check) for check in registration.checks],
        "parity_error": registration.parity_error,
        "cuts": [
            {
                "name": cut.name,
                "feature_shape": list(cut.feature_shape),
                "is_stage": cut.is_stage,
                "share_of_macs": cut.stem_macs / spec.macs if spec.macs else 0.0,
            }
            for cut in spec.cuts
        ],
        "slices": [{"name": one.name, "width": one.width} for one in spec.slices],
    }


def text(answer: dict[str, Any]) -> str:
    """Return what ``report`` found, for people."""
    lines = [
        f"{answer['name']} may be served: {answer['num_parameters']:,} parameters, {answer['macs']:,} multiply-adds"
    ]
    width = max(len(check["name"]) for check in answer["checks"])
    lines += [f"ok  {check['name']:<{width}}  {check['detail']}" for check in answer["checks"]]
    lines += ["", f"largest parity error  {answer['parity_error']:.2g} of the largest output", ""]
    rows = [("CUT", "FEATURES", "MULTIPLY-ADDS", "")]
    rows += [
        (
            cut["name"],
            "x".join(map(str, cut["feature_shape"])),
            f"{cut['share_of_macs']:.1%}",
            "a stage ends" if cut["is_stage"] else "",
        )
        for cut in answer["cuts"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
