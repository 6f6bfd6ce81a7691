"""Synthetic scenes: a coast seen from above, made from a seed, with what DFN is for. Nothing lies on disk.

- **Look-alike neighbours** (the paper's inter-class indistinction): ``rubble`` and ``masonry`` have the same colours
  and shapes and differ in their texture alone; they often touch.
- **Context** (its intra-class inconsistency): a ``house`` and a ``boat`` are drawn alike; the one stands on land, the
  other lies on water.
- **Uneven objects**: the colour of an ``awning`` changes from end to end, a ``tree`` is as green as the meadow, and a
  cloud's shadow crosses everything.
- Occlusion, noise, changing light, and regions of 255: rings around some objects, a rectangle somewhere.
"""

import cv2
import numpy as np

from dfn_fast.data.base import IGNORE, Sample, SegmentationDataset
from dfn_fast.errors import ConfigError

_CLASSES = (
    ("meadow", (124, 179, 66)),
    ("water", (66, 133, 200)),
    ("rubble", (141, 110, 99)),
    ("masonry", (229, 115, 70)),
    ("house", (198, 40, 40)),
    ("boat", (255, 235, 130)),
    ("awning", (171, 71, 188)),
    ("tree", (27, 94, 60)),
)
MEADOW, WATER, RUBBLE, MASONRY, HOUSE, BOAT, AWNING, TREE = range(len(_CLASSES))
LENGTHS = {"train": 480, "val": 96}


class SyntheticScenes(SegmentationDataset):
    """Scenes of ``size`` (height, width); scene ``i`` of a split follows from ``(seed, split, i)`` alone."""

    name = "synthetic"
    classes = tuple(name for name, _ in _CLASSES)
    palette = np.array([colour for _, colour in _CLASSES], np.uint8)

    def __init__(self, split: str, *, seed: int = 0, length: int | None = None, size: tuple[int, int] = (96, 96)):
        if split not in LENGTHS:
            raise ConfigError(f"data set 'synthetic' has the splits {', '.join(LENGTHS)}, not {split!r}")
        if min(size) < 32:
            raise ConfigError(f"synthetic scenes are at least 32 x 32 pixels, got {size[0]} x {size[1]}")
        self.pairs, self.split, self.where = [], split, "synthetic scenes"
        self.seed, self.size = seed, size
        self.length = LENGTHS[split] if length is None else length

    def __len__(self) -> int:
        return self.length

    def names(self) -> list[str]:
        return [f"{self.split}_{index:05d}" for index in range(self.length)]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        key = (tuple(LENGTHS).index(self.split), index)
        scene = Scene(np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key)), self.size)
        return Sample(*scene.make(), f"{self.split}_{index:05d}")


class Scene:
    """One scene in the making: an image in float32 and a label map, painted from back to front."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng = rng
        self.height, self.width = size
        self.scale = min(size) / 96
        self.image = np.empty((*size, 3), np.float32)
        self.label = np.empty(size, np.uint8)

    def make(self) -> tuple[np.ndarray, np.ndarray]:
        """The image ``[H, W, 3]`` and label ``[H, W]``, both uint8."""
        rng = self.rng
        self.ground()
        painters = [self.blocks, self.building, self.building, self.building, self.awning, self.tree, self.tree]
        painters += [self.blocks] * int(rng.integers(2)) + [self.tree] * int(rng.integers(3))
        for i in rng.permutation(len(painters)):
            painters[i]()
        self.light()
        if rng.random() < 0.3:
            y, x = (int(rng.integers(side)) for side in self.label.shape)
            self.label[y : y + self.px(14), x : x + self.px(20)] = IGNORE
        return np.clip(np.rint(self.image), 0, 255).astype(np.uint8), self.label

    def px(self, length: float) -> int:
        """A length for scenes of 96 pixels in those of this one."""
        return max(1, round(length * self.scale))

    def ground(self) -> None:
        """Meadow and water with a wavy coast between them."""
        rng = self.rng
        y, x = np.mgrid[: self.height, : self.width].astype(np.float32)
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        across = (x - self.width / 2) * np.cos(angle) + (y - self.height / 2) * np.sin(angle)
        along = (y - self.height / 2) * np.cos(angle) - (x - self.width / 2) * np.sin(angle)
        coast = across + self.px(7) * np.sin(along / self.px(11) + phase) + self.scale * rng.uniform(-10, 8)
        water = coast > 0
        self.label[:] = np.where(water, np.uint8(WATER), np.uint8(MEADOW))
        ripple = np.sin((x * np.sin(phase) + y * np.cos(phase)) / self.px(2))
        self.image[:] = np.array((96, 128, 74), np.float32)
        self.image += self.clouds(26)[..., None]
        sea = np.array((84, 118, 132), np.float32) + (9 * ripple + self.clouds(22))[..., None]
        self.image[water] = sea[water]

    def clouds(self, strength: float) -> np.ndarray:
        """``[H, W]`` float32: smooth random values of about +-strength."""
        coarse = self.rng.standard_normal((6, 6)).astype(np.float32)
        return strength * cv2.resize(coarse, (self.width, self.height), interpolation=cv2.INTER_CUBIC)

    def paint(self, points: np.ndarray, class_id: int, texture: np.ndarray) -> None:
        """Fills the polygon ``points`` ``[N, 2]`` (x, y) with the class and its texture ``[H, W, 3]``."""
        mask = np.zeros(self.label.shape, np.uint8)
        points = np.rint(points).astype(np.int32)
        cv2.fillPoly(mask, [points], 1)
        inside = mask.view(bool)
        self.image[inside] = texture[inside]
        self.label[inside] = class_id
        if self.rng.random() < 0.12:
            ring = np.zeros_like(mask)
            cv2.polylines(ring, [points], isClosed=True, color=1, thickness=2)
            self.label[ring.view(bool)] = IGNORE

    def place(self, on: int | None = None) -> np.ndarray:
        """A random point (x, y), on pixels of class ``on`` where there are some."""
        if on is not None:
            ys, xs = np.nonzero(self.label == on)
            if ys.size:
                i = self.rng.integers(ys.size)
                return np.array([xs[i], ys[i]], np.float32)
        return self.rng.uniform((0, 0), (self.width, self.height)).astype(np.float32)

    def outline(self, centre: np.ndarray, radii: tuple[float, float], corners: int, jitter: float) -> np.ndarray:
        """A rotated polygon about ``centre``: an ellipse of ``corners`` points whose radii vary by ``jitter``."""
        angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + self.rng.uniform(0, 2 * np.pi)
        reach = 1 + self.rng.uniform(-jitter, jitter, corners)
        turn = self.rng.uniform(0, np.pi)
        x, y = radii[0] * reach * np.cos(angles), radii[1] * reach * np.sin(angles)
        turned = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], axis=1)
        return centre + turned * self.scale

    def blocks(self) -> None:
        """Rubble and masonry side by side: the same two colours, in speckles or in courses."""
        rng = self.rng
        centre = self.place()
        colours = np.array((150, 126, 108), np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
        step = rng.uniform(0, 2 * np.pi)
        for class_id in rng.permutation((RUBBLE, MASONRY)):
            texture = self.speckles() if class_id == RUBBLE else self.courses()
            points = self.outline(centre, (rng.uniform(11, 17), rng.uniform(9, 14)), int(rng.integers(5, 9)), 0.2)
            self.paint(points, int(class_id), colours + 34 * texture[..., None])
            centre = centre + np.array((np.cos(step), np.sin(step)), np.float32) * self.px(20)

    def speckles(self) -> np.ndarray:
        """``[H, W]`` in +-1: random blots of about two pixels."""
        coarse = self.rng.standard_normal((self.height // 2, self.width // 2)).astype(np.float32)
        return np.sign(cv2.resize(coarse, (self.width, self.height), interpolation=cv2.INTER_LINEAR))

    def courses(self) -> np.ndarray:
        """``[H, W]`` in +-1: stripes of two pixels, in one of eight directions."""
        turn = self.rng.integers(8) * np.pi / 8
        y, x = np.mgrid[: self.height, : self.width].astype(np.float32)
        return np.sign(np.sin((x * np.cos(turn) + y * np.sin(turn)) * np.pi / 2 + 0.3)).astype(np.float32)

    def building(self) -> None:
        """A box with a bright ridge: a house on the meadow, a boat on the water."""
        rng = self.rng
        ground = (MEADOW, WATER)[int(rng.integers(2))]
        centre = self.place(on=ground)
        x, y = (int(min(max(v, 0), side - 1)) for v, side in zip(centre, (self.width, self.height), strict=True))
        if self.label[y, x] not in (MEADOW, WATER):
            return
        class_id = HOUSE if self.label[y, x] == MEADOW else BOAT
        colour = rng.uniform((120, 50, 40), (225, 130, 120)).astype(np.float32)
        texture = np.empty_like(self.image)
        texture[:] = colour
        length, width, turn = rng.uniform(9, 14), rng.uniform(5, 8), rng.uniform(0, np.pi)
        axis = np.array((np.cos(turn), np.sin(turn)), np.float32)
        side = np.array((-axis[1], axis[0]), np.float32)
        ends = [(1, 0.55), (1, -0.55), (-1, -1), (-1, 1)]
        points = np.array([centre + (a * length * axis + b * width * side) * self.scale for a, b in ends])
        tip, stern = (tuple(int(v) for v in centre + s * 0.7 * length * self.scale * axis) for s in (1, -1))
        cv2.line(texture, tip, stern, (colour + 50).tolist(), self.px(2))
        self.paint(points, class_id, texture)

    def awning(self) -> None:
        """A large object whose colour runs from one hue to another, with a dark fold."""
        rng = self.rng
        first, last = rng.uniform(40, 230, (2, 3)).astype(np.float32)
        y, x = np.mgrid[: self.height, : self.width].astype(np.float32)
        turn = rng.uniform(0, 2 * np.pi)
        centre = self.place()
        along = ((x - centre[0]) * np.cos(turn) + (y - centre[1]) * np.sin(turn)) / self.px(36) + 0.5
        along = np.clip(along, 0, 1)[..., None]
        texture = first * (1 - along) + last * along
        texture *= 1 - 0.25 * (np.sin(along * 18) > 0.2)
        self.paint(self.outline(centre, (rng.uniform(15, 23), rng.uniform(10, 15)), 24, 0.04), AWNING, texture)

    def tree(self) -> None:
        """A round crown, green as the meadow but curly."""
        rng = self.rng
        texture = np.array((88, 118, 66), np.float32) + 22 * self.speckles()[..., None] + rng.uniform(-10, 10)
        self.paint(self.outline(self.place(on=MEADOW), (rng.uniform(6, 10),) * 2, 16, 0.15), TREE, texture)

    def light(self) -> None:
        """A cloud's shadow, sunlight from one side, exposure, and noise."""
        rng = self.rng
        y, x = np.mgrid[: self.height, : self.width].astype(np.float32)
        turn = rng.uniform(0, 2 * np.pi)
        along = (x / self.width - 0.5) * np.cos(turn) + (y / self.height - 0.5) * np.sin(turn)
        gain = rng.uniform(0.8, 1.2) * (1 + rng.uniform(0, 0.5) * along)
        if rng.random() < 0.6:
            gain = gain * np.where(along + self.clouds(0.08) > rng.uniform(-0.3, 0.3), np.float32(0.6), np.float32(1))
        self.image *= gain[..., None]
        self.image += rng.normal(0, 7, self.image.shape)
