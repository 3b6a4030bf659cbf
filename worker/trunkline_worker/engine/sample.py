"""The pictures on which runtimes, codecs and stems are compared."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from trunkline_wire.specs import Preprocessing

from trunkline_worker.backbones.samples import Samples

NUM_PICTURES = 8
"""Most pictures that something is measured on."""

_SIZES_KEPT = 2


@functools.lru_cache(_SIZES_KEPT)
def sample_pictures(samples: Samples, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Return pictures, none of those that quantised stems are calibrated on. The last ones are kept in memory.

    Shape:
        returns (B, H, W, C): (at most ``NUM_PICTURES``, input_size, input_size, 3), uint8, not to be written to.

    Raises:
        WireError: Where the operator's own pictures are gone or have changed.
    """
    pictures_BHWC = samples.held_out(preprocessing, NUM_PICTURES)
    pictures_BHWC.flags.writeable = False
    return pictures_BHWC
