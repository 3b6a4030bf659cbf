"""Changed views of a picture: other crops, mirrored, turned, in other colours. With Pillow and NumPy alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageEnhance

from trunkline.errors import InvalidArgumentError

# Shape suffix legend: H = height, W = width, C = channels

_RANGES: dict[str, tuple[float, float]] = {
    "crop": (0.05, 1.0),
    "stretch": (1.0, 2.0),
    "flip": (0.0, 1.0),
    "rotate": (0.0, 180.0),
    "shear": (0.0, 45.0),
    "brightness": (0.0, 0.9),
    "contrast": (0.0, 0.9),
    "saturation": (0.0, 1.0),
    "hue": (0.0, 0.5),
}


@dataclass(frozen=True)
class Augment:
    """How views of a picture differ from it. The defaults suit photographs of things.

    They do not suit everything. Mirrored digits and letters are wrong, as is whatever has a left and a right: give
    ``flip=0`` there. Where colour decides, ``hue`` and ``saturation`` must stay small; where what is at the edge of the
    picture counts, ``crop=1``. ``Augment()(image, numpy.random.default_rng(0))`` makes a view to look at.

    Attributes:
        crop: Least share of the picture's area that is kept, 0.05 to 1. 1: the picture is not cropped.
        stretch: By how much width over height may grow or shrink, 1 to 2. 1: not at all.
        flip: How often it is mirrored, left to right, 0 to 1.
        rotate: Largest angle by which it is turned, either way, in degrees, 0 to 180. Beyond its edge a picture goes on
            as it ends there.
        shear: Largest angle by which it is slanted, either way, in degrees, 0 to 45.
        brightness: Largest change, 0 to 0.9: 0.2 makes pictures darker or brighter by up to a fifth.
        contrast: Likewise, 0 to 0.9.
        saturation: Likewise, 0 to 1.
        hue: Largest turn of the colour circle, 0 to 0.5, which is half of it.

    Raises:
        InvalidArgumentError: One of them is out of range.
    """

    crop: float = 0.6
    stretch: float = 1.15
    flip: float = 0.5
    rotate: float = 5.0
    shear: float = 0.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.0

    def __post_init__(self) -> None:
        """Check each range."""
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InvalidArgumentError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}")

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        """Return a view.

        Args:
            image: In RGB, upright.
            random: Where everything random is drawn from: equal draws, equal views.
        """
        return self._recoloured(self._moved(image, random), random)

    def numbers(self) -> dict[str, float]:
        """Return all that a view depends on beside the picture and what is drawn."""
        return {name: float(value) for name, value in asdict(self).items()}

    def _moved(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        """Return a part of the picture in its proportions, mirrored, turned and slanted in one step."""
        width, height = image.size
        area = random.uniform(self.crop, 1.0)
        stretch = math.exp(random.uniform(-1.0, 1.0) * math.log(self.stretch))
        across = min(1.0, math.sqrt(area * stretch)) * width
        down = min(1.0, math.sqrt(area / stretch)) * height
        left, top = random.uniform(0.0, width - across), random.uniform(0.0, height - down)
        is_mirrored = random.random() < self.flip
        turn = math.radians(random.uniform(-self.rotate, self.rotate))
        slant = math.tan(math.radians(random.uniform(-self.shear, self.shear)))
        # As many pixels as the part has: nothing is shrunk here, and nothing made up beyond its proportions.
        scale = max(across / width, down / height)
        size = max(1, round(scale * width)), max(1, round(scale * height))
        box = (left, top, left + across, top + down)
        if turn == 0.0 and slant == 0.0:
            part = image if (size, box) == (image.size, (0, 0, width, height)) else _part(image, size, box)
            return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_mirrored else part
        return _turned(image, size, box, -1.0 if is_mirrored else 1.0, turn, slant)

    def _recoloured(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        brightness, contrast, saturation, hue = random.uniform(-1.0, 1.0, size=4).tolist()
        for enhancer, change in (
            (ImageEnhance.Brightness, brightness * self.brightness),
            (ImageEnhance.Contrast, contrast * self.contrast),
            (ImageEnhance.Color, saturation * self.saturation),
        ):
            if change:
                image = enhancer(image).enhance(1.0 + change)
        steps = round(256 * hue * self.hue)
        if steps:
            hues, *others = image.convert("HSV").split()
            hues_HW = np.asarray(hues) + np.uint8(steps % 256)  # a circle: what runs over starts again
            image = Image.merge("HSV", (Image.fromarray(hues_HW), *others)).convert("RGB")
        return image


def _part(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC, box=box)


def _turned(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    mirror: float,
    turn: float,
    slant: float,
) -> Image.Image:
    """Return what lies in a turned and slanted box, the picture's edge drawn out where the box goes beyond it."""
    left, top, right, bottom = box
    cos, sin = math.cos(turn), math.sin(turn)
    across, down = mirror * (right - left) / size[0], (bottom - top) / size[1]
    # From a place in the view, about its centre, to one in the picture.
    xx, xy = cos * across, (cos * slant - sin) * down
    yx, yy = sin * across, (sin * slant + cos) * down
    centre_x, centre_y = (left + right) / 2, (top + bottom) / 2
    reach_x = (abs(xx) * size[0] + abs(xy) * size[1]) / 2
    reach_y = (abs(yx) * size[0] + abs(yy) * size[1]) / 2
    # Only the part that is needed is copied; a few pixels more for the resampling.
    first_x, last_x = math.floor(centre_x - reach_x) - 3, math.ceil(centre_x + reach_x) + 3
    first_y, last_y = math.floor(centre_y - reach_y) - 3, math.ceil(centre_y + reach_y) + 3
    inside = image.crop((max(0, first_x), max(0, first_y), min(image.width, last_x), min(image.height, last_y)))
    beyond_x = max(0, -first_x), max(0, last_x - image.width)
    beyond_y = max(0, -first_y), max(0, last_y - image.height)
    padded_HWC = np.pad(np.asarray(inside), (beyond_y, beyond_x, (0, 0)), mode="edge")
    centre_x, centre_y = centre_x - first_x, centre_y - first_y
    places = (
        *(xx, xy, centre_x - (xx * size[0] + xy * size[1]) / 2),
        *(yx, yy, centre_y - (yx * size[0] + yy * size[1]) / 2),
    )
    return Image.fromarray(padded_HWC).transform(size, Image.Transform.AFFINE, places, Image.Resampling.BICUBIC)
