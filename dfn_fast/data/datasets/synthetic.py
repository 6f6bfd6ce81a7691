"""Countryside scenes generated from a seed: the data set that needs no download.

They need the strengths of DFN (sections 1 and 3 of the paper). Look-alike neighbours (inter-class indistinction): water
has the sky's colours and only its ripples differ, a crop has the meadow's colours and only its rows differ, a house's
windows show the sky. Classes that only context tells apart (intra-class inconsistency): the same craft is a boat on
water and a wagon on land. A house is large and partly sunlit, partly shaded. Objects hide each other, the light changes
from scene to scene, the images are noisy, and some pixels are 255: outlines, and a patch without content.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from dfn_fast.data.base import IGNORE, Sample, SegmentationDataset
from dfn_fast.errors import ConfigError

SKY, WATER, MEADOW, CROP, HOUSE, TREE, BOAT, WAGON = range(8)
LENGTHS = {"train": 640, "val": 96}  # split -> scenes

SKIES = np.array(  # colour at the top, colour at the horizon
    [[[104, 158, 214], [186, 210, 230]], [[122, 118, 168], [232, 184, 156]], [[146, 156, 168], [204, 207, 209]]],
    np.float32,
)
GREENS = np.array([[98, 140, 66], [158, 152, 84], [122, 160, 84], [84, 122, 78]], np.float32)
LEAVES = np.array([[58, 96, 48], [84, 108, 52], [128, 92, 44]], np.float32)
WALLS = np.array([[214, 196, 168], [176, 92, 76], [150, 164, 180], [188, 178, 96], [128, 150, 104]], np.float32)
ROOFS = np.array([[122, 62, 52], [82, 80, 92], [146, 110, 72]], np.float32)
HULLS = np.array([[196, 62, 54], [62, 92, 164], [232, 226, 214], [54, 128, 118], [226, 168, 60]], np.float32)
BARK = np.array([86, 64, 46], np.float32)
DARK = np.array([44, 40, 42], np.float32)


class SyntheticScenes(SegmentationDataset):
    """``length`` scenes of ``size`` (height, width); a scene depends only on ``(seed, split, index)``.

    Raises :class:`ConfigError` for a split other than ``"train"`` and ``"val"``, a length below 1, a negative seed and
    a size below 64.
    """

    name = "synthetic"
    classes = ("sky", "water", "meadow", "crop", "house", "tree", "boat", "wagon")
    palette = np.array(
        [
            [158, 206, 235],
            [38, 104, 168],
            [160, 200, 96],
            [232, 190, 84],
            [196, 88, 80],
            [44, 110, 66],
            [244, 140, 66],
            [128, 84, 160],
        ],
        np.uint8,
    )

    def __init__(
        self, split: str = "train", *, seed: int = 0, length: int | None = None, size: tuple[int, int] = (96, 96)
    ):
        if split not in LENGTHS:
            raise ConfigError(f"split {split!r} of data set 'synthetic': expected one of {', '.join(LENGTHS)}")
        if seed < 0:
            raise ConfigError(f"seed: expected 0 or more, got {seed}")
        if min(size) < 64:
            raise ConfigError(f"size {size[0]}x{size[1]} of synthetic scenes: expected at least 64x64")
        self.length = LENGTHS[split] if length is None else length
        if self.length < 1:
            raise ConfigError(f"length {self.length} of data set 'synthetic': expected 1 scene or more")
        self.pairs, self.split, self.where = [], split, self.name
        self.seed, self.size = seed, size

    def __len__(self) -> int:
        return self.length

    def names(self) -> list[str]:
        return [self._name(index) for index in range(self.length)]

    def _name(self, index: int) -> str:
        return f"{self.split}_{index:05d}"

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        stream = (list(LENGTHS).index(self.split), index)
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=stream))
        return Sample(*_make_scene(self.size, rng), self._name(index))


def _make_scene(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image ``[H, W, 3]`` and label ``[H, W]``, both uint8."""
    canvas = Canvas(*_paint_land(size, rng), rng)
    for place in _choose_places(canvas.label, rng):
        PAINTERS[place.kind](canvas, place)
    if rng.random() < 0.3:
        canvas.blank()
    return _photograph(canvas.image, rng), canvas.label


def _paint_land(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sky, and below the horizon regions of water, meadow and crop: float32 image in 0..255, and label."""
    height, width = size
    label = _land_classes(size, rng)
    grain = rng.standard_normal(size, dtype=np.float32)
    # Both mirror images of one gradient, so that neither colour nor brightness tells water from sky.
    top, low = rng.permutation(SKIES[rng.integers(len(SKIES))]) + rng.uniform(-12, 12, 3).astype(np.float32)
    fall = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    blue = top + (low - top) * fall + 10 * _smooth_noise(size, (4, 4), rng)[..., None]
    ripples = _smooth_noise(size, (height // 2, width // 12), rng)
    image = blue + np.where(label == WATER, 11 * ripples, 0)[..., None]
    green = GREENS[rng.integers(len(GREENS))] + rng.uniform(-12, 12, 3).astype(np.float32)
    angle, wave = rng.uniform(0, math.pi), 2 * math.pi / rng.uniform(5, 7)
    y, x = np.indices(size, dtype=np.float32)
    rows = np.sin(x * (wave * math.cos(angle)) + y * (wave * math.sin(angle)))
    tufts = cv2.GaussianBlur(grain, (3, 3), 0.8) * 2.2  # as strong as the rows
    texture = np.where(label == CROP, 2.2 * rows, tufts) + _smooth_noise(size, (5, 5), rng)
    on_land = (label == MEADOW) | (label == CROP)
    np.copyto(image, green + 12 * texture[..., None], where=on_land[..., None])
    return image, label


def _land_classes(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The label without objects."""
    height, width = size
    y, x = np.indices(size, dtype=np.float32)
    horizon = height * rng.uniform(0.24, 0.48)
    hills = horizon - height * np.float32(rng.uniform(0.03, 0.1)) * abs(_smooth_noise((1, width), (1, 5), rng))
    kinds = rng.permutation([WATER, MEADOW, CROP]).astype(np.uint8)
    bend = 0.1 * width * _smooth_noise(size, (5, 5), rng)
    sites = rng.random((len(kinds), 2), dtype=np.float32) * np.array([width, height - horizon], np.float32)
    label, nearest = np.zeros(size, np.uint8), np.full(size, np.inf, np.float32)
    for kind, (site_x, site_y) in zip(kinds, sites.tolist(), strict=True):
        distance = (x + (bend - site_x)) ** 2 + (1.6 * (y + (bend - horizon - site_y))) ** 2
        label[distance < nearest] = kind
        nearest = np.minimum(nearest, distance)
    label[y < np.where(label == WATER, horizon, hills)] = SKY
    return label


def _smooth_noise(size: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Standard normal values on a grid of ``cells``, resized to ``size``."""
    return cv2.resize(rng.standard_normal(cells, dtype=np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)


class Place(NamedTuple):
    """An object to paint."""

    kind: int
    x: int  # its foot, in pixels
    y: int
    size: float  # in pixels; each kind has its share of it


def _choose_places(land: np.ndarray, rng: np.random.Generator) -> list[Place]:
    """Objects on the land, the farthest first."""
    height, width = land.shape
    top = int(np.argmax((land != SKY).any(axis=1)))
    # An object needs a stretch of its own ground that is wide enough to tell what it is.
    stretch = np.ones((height // 24, width // 6), np.uint8)
    grounds = land == WATER, (land == MEADOW) | (land == CROP)
    water, dry = (np.flatnonzero(cv2.erode(ground.astype(np.uint8), stretch)) for ground in grounds)
    places = []
    kinds = [HOUSE] + [TREE] * rng.integers(1, 3) + [BOAT, WAGON] + [BOAT, WAGON][: rng.integers(2)]
    for kind in kinds:
        spots = water if kind == BOAT else dry
        if not len(spots):
            continue
        y, x = divmod(int(spots[rng.integers(len(spots))]), width)
        near = (y - top) / max(height - top, 1)
        places.append(Place(kind, x, y, height * (0.8 + 0.4 * near) * rng.uniform(0.85, 1.15)))
    return sorted(places, key=lambda place: place.y)


class Canvas:
    """Image and label, and the mask of the object that is being painted."""

    def __init__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator):
        self.image, self.label, self.rng = image, label, rng
        self.mask = np.zeros_like(label)

    def polygon(self, points: Sequence[tuple[float, float]], colour: np.ndarray) -> None:
        corners = np.rint(points).astype(np.int32)
        cv2.fillConvexPoly(self.image, corners, colour.tolist())
        cv2.fillConvexPoly(self.mask, corners, 1)

    def box(self, left: float, top: float, right: float, bottom: float, colour: np.ndarray) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def disc(self, x: float, y: float, radius: float, colour: np.ndarray) -> None:
        for target, value in ((self.image, colour.tolist()), (self.mask, 1)):
            cv2.circle(target, (round(x), round(y)), max(1, round(radius)), value, -1)

    def colour(self, choices: np.ndarray) -> np.ndarray:
        return self.rng.choice(choices) + self.rng.uniform(-14, 14, 3).astype(np.float32)

    def region(self) -> tuple[slice, slice]:
        """The rows and columns that the object takes."""
        x, y, width, height = cv2.boundingRect(self.mask)
        return slice(y, y + height), slice(x, x + width)

    def finish(self, kind: int, shade: np.ndarray) -> None:
        """Multiplies the object by its region's ``shade`` and labels it; about one in three gets an ignored outline."""
        region = self.region()
        inside = self.mask[region] > 0
        self.image[region] *= np.where(inside, shade, np.float32(1))[..., None]
        self.label[region][inside] = kind
        if self.rng.random() < 0.33:
            cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
            self.label[cv2.morphologyEx(self.mask, cv2.MORPH_GRADIENT, cross) > 0] = IGNORE
        self.mask[:] = 0

    def blank(self) -> None:
        """Paints an ignored patch of one colour."""
        height, width = self.label.shape
        tall, wide = self.rng.integers(height // 12, height // 5), self.rng.integers(width // 12, width // 4)
        y, x = self.rng.integers(height - tall), self.rng.integers(width - wide)
        part = slice(y, y + tall), slice(x, x + wide)
        self.image[part], self.label[part] = self.rng.uniform(0, 255, 3), IGNORE


def _paint_house(canvas: Canvas, place: Place) -> None:
    """Paints a front, a side, a roof and windows that mirror the sky, in light that falls off across the house."""
    rng, (kind, x, y, size) = canvas.rng, place
    width, tall = size * rng.uniform(0.3, 0.45), size * rng.uniform(0.2, 0.36)
    side, rise = width * rng.uniform(0.3, 0.6) * rng.choice([-1, 1]), size * rng.uniform(0.1, 0.16)
    wall, roof, glass = canvas.colour(WALLS), canvas.colour(ROOFS), canvas.colour(SKIES.reshape(-1, 3))
    left, right, top = x - width / 2, x + width / 2, y - tall
    corner = right if side > 0 else left
    canvas.polygon([(corner, y), (corner + side, y - 3), (corner + side, top - 1), (corner, top)], 0.72 * wall)
    canvas.box(left, top, right, y, wall)
    peak, back = (x, top - rise), (x + side, top - rise)
    canvas.polygon([(corner, top), (corner + side, top - 1), back, peak], 0.85 * roof)
    canvas.polygon([(left - 1, top), (right + 1, top), peak], roof)
    pane = width / 5
    for column in (0, 1):
        for row in range(max(1, int(tall / (pane * 2.2)))):
            at, down = left + pane * (1 + 2 * column), top + pane * (0.7 + 2 * row)
            canvas.box(at, down, at + pane, min(down + 1.2 * pane, y), glass)
    rows, columns = np.ogrid[canvas.region()]
    angle = rng.uniform(0, 2 * math.pi)
    across = ((columns - x) * math.cos(angle) + (rows - y + tall / 2) * math.sin(angle)) / width
    light = np.clip(1 + 0.6 * across, 0.45, 1.5)
    canvas.finish(kind, np.where(across > rng.uniform(-0.3, 0.4), light, 0.7 * light))


def _paint_tree(canvas: Canvas, place: Place) -> None:
    """Paints a trunk under a heap of leafy discs."""
    rng, (kind, x, y, size) = canvas.rng, place
    tall, leaf = size * rng.uniform(0.32, 0.45), canvas.colour(LEAVES)
    canvas.box(x - tall / 9, y - tall / 2, x + tall / 9, y, BARK)
    for _ in range(7):
        at = x + tall * rng.uniform(-0.28, 0.28), y - tall * rng.uniform(0.45, 0.9)
        canvas.disc(*at, tall * rng.uniform(0.18, 0.26), leaf * np.float32(rng.uniform(0.85, 1.15)))
    height, width = canvas.mask[canvas.region()].shape
    leaves = _smooth_noise((height, width), (height // 3 + 1, width // 3 + 1), rng)
    canvas.finish(kind, np.clip(1 + 0.4 * leaves, 0.4, 1.7))


def _paint_craft(canvas: Canvas, place: Place) -> None:
    """Paints a hull on two rolls with a cabin: a boat or a wagon, depending on where it stands."""
    rng, (kind, x, y, size) = canvas.rng, place
    half, tall = size * rng.uniform(0.17, 0.22), size * rng.uniform(0.13, 0.16)
    hull, cabin, ahead = canvas.colour(HULLS), canvas.colour(HULLS), rng.choice([-1, 1])
    roll = tall * 0.4
    deck, keel = y - roll - tall, y - roll
    bow = x + ahead * half * 1.3
    canvas.polygon(
        [(x - ahead * half, deck), (bow, deck), (x + ahead * 0.8 * half, keel), (x - ahead * half, keel)], hull
    )
    at = x - ahead * half * 0.3
    canvas.box(at - 0.5 * half, deck - tall, at + 0.5 * half, deck, cabin)
    canvas.box(at - 0.25 * half, deck - 0.75 * tall, at + 0.25 * half, deck - 0.3 * tall, DARK)
    canvas.box(x - 0.9 * half, deck + 0.4 * tall, x + 0.9 * half, deck + 0.6 * tall, 0.6 * hull)
    for wheel in (-0.55, 0.45):
        canvas.disc(x + ahead * wheel * half, keel, roll, DARK)
    stains = _smooth_noise(canvas.mask[canvas.region()].shape, (3, 5), rng)
    canvas.finish(kind, np.clip(1 + 0.15 * stains, 0.6, 1.4))


def _photograph(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The painting in a random light, softened and with a camera's noise, as uint8."""
    size = image.shape[:2]
    light = np.clip(rng.uniform(0.75, 1.1) + 0.12 * _smooth_noise(size, (3, 3), rng), 0.5, 1.35)
    tint = rng.uniform(0.9, 1.1, 3).astype(np.float32)
    lit = cv2.GaussianBlur(image, (3, 3), 0.6) * (light[..., None] * tint)
    noise = rng.uniform(3, 8) * rng.standard_normal(image.shape, dtype=np.float32)
    return cv2.add(lit, noise, dtype=cv2.CV_8U)  # rounds, and stays within 0..255


PAINTERS = {HOUSE: _paint_house, TREE: _paint_tree, BOAT: _paint_craft, WAGON: _paint_craft}
