"""The arguments that decide a result: scales, mirror images, windows and the rule that makes one score map of them.

Let ``z(x, size)`` be the network's stride-4 scores of ``x`` resized to ``size`` (bilinear, ``align_corners=True``).
Rule ``"mean"`` is, over scales ``s`` and, with flip, over the scaled image ``I_s`` and its mirror image::

    probabilities = mean of softmax(z(I_s, image's size))             mirrored scores are mirrored back

With windows, the scores ``z(tile, tile's size)`` of all tiles that hold a pixel are averaged at the scaled size and
then resized to the image's. A scaled image that fits into the window is seen as a whole, as without windows.

Rule ``"torchseg"`` is the evaluator of DFN's authors: window 512, stride 2/3 of it, and::

    sum over s of resize(sum over tiles of softmax(z(tile)) * mirrored back softmax(z(mirrored tile)))

Its products and sums are not normalised, so pixels of several tiles weigh more if scales differ, and its last resize
takes half pixels as centres. Its padding is black, unless the whole scaled image fits in a window.
"""

from dataclasses import dataclass
from typing import Any

from dfn_fast.errors import ConfigError, brief, listed
from dfn_fast.inference.windows import WEIGHTS
from dfn_fast.network.backbone import MIN_SIZE

RULES = ("mean", "torchseg")
TORCHSEG_WINDOW = 512
MOST_SCALES, MAX_SCALE = 32, 16.0
MAX_OVERLAP = 0.95  # each pixel is then in 400 windows
MAX_WINDOW, MAX_BUCKET, MAX_BATCH = 1 << 16, 1 << 12, 1 << 16


@dataclass(frozen=True)
class Settings:
    """The arguments of a Predictor that decide its result; see :class:`dfn_fast.inference.predictor.Predictor`.

    Raises :class:`ConfigError` for a value that is out of range.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: tuple[int, int] | None = None  # height, width
    overlap: float = 1 / 3
    window_weight: str = "count"
    rule: str = "mean"
    bucket: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.scales) <= MOST_SCALES or not all(0 < scale <= MAX_SCALE for scale in self.scales):
            raise ConfigError(
                f"scales {listed(map(str, self.scales))}: expected 1 to {MOST_SCALES} numbers above 0 and up to "
                f"{MAX_SCALE:g}, such as 0.5 1 1.5"
            )
        require_choice("rule", self.rule, RULES)
        require_choice("window_weight", self.window_weight, WEIGHTS)
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise ConfigError(f"overlap {self.overlap}: expected a share of the window from 0 to {MAX_OVERLAP}")
        require_positive("bucket", self.bucket, MAX_BUCKET)
        if self.window is None and self.rule == "torchseg":
            object.__setattr__(self, "window", (TORCHSEG_WINDOW, TORCHSEG_WINDOW))
        if self.window is not None and not MIN_SIZE <= min(self.window) <= max(self.window) <= MAX_WINDOW:
            height, width = map(brief, self.window)
            raise ConfigError(
                f"window {height}x{width}: expected at least {MIN_SIZE}, the network's largest stride, and at most "
                f"{MAX_WINDOW}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. The rule's key is ``preset``, its name when the first such files were written."""
        return {
            "scales": list(self.scales),
            "flip": self.flip,
            "window": self.window and list(self.window),
            "overlap": self.window and self.overlap,
            "window_weight": self.window and self.window_weight,
            "preset": self.rule,
            "bucket": self.bucket,
        }

    def describe(self, amp: str) -> str:
        """Scales, flip and window in words, and ``amp`` if it was chosen, to be reported with every number."""
        window = "whole image"
        if self.window is not None:
            window = f"window {self.window[0]}x{self.window[1]} overlap {self.overlap:.2f}"
            window += f" {self.window_weight}" if self.window_weight != "count" else ""
        scales = f"scale{'s' if len(self.scales) > 1 else ''} {' '.join(f'{scale:g}' for scale in self.scales)}"
        rest = ", torchseg rule" if self.rule == "torchseg" else ""
        rest += f", {amp}" if amp not in ("off", "auto") else ""
        rest += f", padded to multiples of {self.bucket}" if self.bucket else ""
        return f"{scales}, {'flip' if self.flip else 'no flip'}, {window}{rest}"


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises :class:`ConfigError` unless the argument ``name`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(f"{name} {value!r}: expected one of {', '.join(choices)}")


def require_positive(name: str, value: int | None, most: int) -> None:
    """Raises :class:`ConfigError` unless the argument ``name`` is None or from 1 to ``most``."""
    if value is not None and not 1 <= value <= most:
        raise ConfigError(f"{name} {brief(value)}: expected a positive number of at most {most}")
