"""The runtime that the cluster chose, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model as peer_model
import numpy as np
import numpy.typing as npt

# Shape suffix legend: B = rows, H = height, W = width, D = embedding columns

CUT = "input"
SLICE = "pooled"


def chosen_embed(data: Path, space: dict[str, Any], runtime: str, num_threads: int) -> peer_model.Embed:
    """Return the trunk in the runtime that the cluster chose, out of the cluster's own storage."""
    import torch
    from trunkline_worker.backbones.catalogue import load_backbone
    from trunkline_worker.engine.building import Builder
    from trunkline_worker.engine.torch_runtimes import place
    from trunkline_worker.engine.trunk_exports import TrunkExports
    from trunkline_worker.store.blobs import BlobStore

    torch.set_num_threads(num_threads)
    backbone = load_backbone(space["backbone"], allow_untrained=True)
    spec = backbone.describe(space["input_size"])
    cut = spec.cut(CUT)
    assert cut is not None
    device = torch.device("cpu")
    builder = Builder(
        place(backbone, device), device=device, num_threads=num_threads, most_rows=peer_model.MAX_BATCH_ROWS
    )
    onnx = TrunkExports(backbone, BlobStore(f"file://{data}")).get(spec, CUT)
    built = builder.build(runtime, cut, space["input_size"], onnx=onnx)
    (wanted,) = (one for one in spec.slices if one.name == SLICE)
    first = next(one for one in spec.slices if one.name in cut.slices).start

    def embed(images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        embedding_BD: npt.NDArray[np.float32] = built.run(images_BHWC).numpy()
        return embedding_BD[:, wanted.start - first : wanted.stop - first]

    return embed
