"""Pictures by rule: discs that cover one another, with the statistics of photographs.

The "dead leaves" model (Lee, Mumford and Huang, 2001): discs of every size, small ones far more often, each hiding
what lies below. It gives the edges, flat areas and fine detail of photographs without anybody's pictures.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Shape suffix legend: H = height, W = width, C = channels, N = discs

LEAVES_VERSION = 1
"""Changes whenever the pictures do: quantised stems and measurements made with other ones are then made again."""

LEAVES_SIDE = 448
"""Height and width in pixels."""

_NUM_DISCS = 2500
_LEAST_RADIUS, _LARGEST_RADIUS = (4.0, 32.0), 180.0
"""In pixels. Pictures differ in how small their smallest discs are: some are busy, some calm."""


def dead_leaves(index: int) -> npt.NDArray[np.uint8]:
    """Return the picture of that number, the same one every time.

    Shape:
        returns (H, W, C): (LEAVES_SIDE, LEAVES_SIDE, 3), uint8.
    """
    # The old generator: its numbers are the same in every version of numpy.
    random = np.random.RandomState(index)
    side = LEAVES_SIDE
    labels_HW, centres_N2, radii_N = _discs(random)
    num = len(radii_N)
    contrast = random.uniform(0.4, 1.1)
    luma_N = 255 * (random.uniform(0.35, 0.65) + contrast * (random.uniform(size=num) - 0.5))
    tint_C = random.normal(scale=12, size=3)
    colour_NC = luma_N[:, None] + tint_C + random.normal(scale=random.uniform(8, 40), size=(num, 3))
    roughness_N = random.uniform(size=num) ** 4 * random.uniform(10, 50)
    slope_N2 = random.normal(scale=25, size=(num, 2)) / np.maximum(radii_N, 20)[:, None]
    places = np.arange(side)
    down_HW = places[:, None] - centres_N2[labels_HW, 0]
    across_HW = places[None, :] - centres_N2[labels_HW, 1]
    light_HW = slope_N2[labels_HW, 0] * down_HW + slope_N2[labels_HW, 1] * across_HW
    light_HW += roughness_N[labels_HW] * _noise(random)
    picture_HWC = colour_NC[labels_HW] + light_HW[:, :, None]
    return picture_HWC.round().clip(0, 255).astype(np.uint8)


def _discs(
    random: np.random.RandomState,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return which disc is on top at each pixel, and the centres (down, across) and radii of all, in pixels."""
    side = LEAVES_SIDE
    # Density of radii as radius**-3: every octave of sizes covers as much of the picture.
    finest, coarsest = _LEAST_RADIUS
    least, largest = (finest * (coarsest / finest) ** random.uniform()) ** -2, _LARGEST_RADIUS**-2
    radii_N = (least + random.uniform(size=_NUM_DISCS) * (largest - least)) ** -0.5
    radii_N[0] = 2 * side  # the ground
    centres_N2 = random.uniform(-_LARGEST_RADIUS / 2, side + _LARGEST_RADIUS / 2, size=(_NUM_DISCS, 2))
    centres_N2[0] = side / 2
    labels_HW = np.zeros((side, side), np.int32)
    places = np.arange(side)
    for label in range(1, _NUM_DISCS):
        (down, across), radius = centres_N2[label], radii_N[label]
        top, bottom = max(int(down - radius), 0), min(int(down + radius) + 2, side)
        left, right = max(int(across - radius), 0), min(int(across + radius) + 2, side)
        if top < bottom and left < right:
            inside = (places[top:bottom, None] - down) ** 2 + (places[left:right] - across) ** 2 <= radius**2
            labels_HW[top:bottom, left:right][inside] = label
    return labels_HW, centres_N2, radii_N


def _noise(random: np.random.RandomState) -> npt.NDArray[np.float64]:
    """Return a field whose amplitude falls as 1 over the frequency, of mean 0 and standard deviation 1."""
    side = LEAVES_SIDE
    spectrum = np.fft.rfft2(random.normal(size=(side, side)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = np.inf
    field_HW = np.fft.irfft2(spectrum / frequency, s=(side, side))
    return field_HW / field_HW.std()
