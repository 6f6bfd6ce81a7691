"""Block sizes: plain tables, found offline, a pure function of shape and architecture.

Not measured on a GPU yet: the entries are chosen from the compiler's report (no spills, 16-byte accesses, shared
memory within the limit). The search that replaces them is ``python -m benchmarks.search_blocks``.
"""

import math
from typing import Any, NamedTuple

# upsample_add and channel_attention


class UpsampleTile(NamedTuple):
    """Pixels and channels of one program. Forward: full-size pixels; backward: full-size rows at a time, small
    columns."""

    rows: int
    columns: int
    channels: int
    num_warps: int


def launch_options(tile: Any) -> dict[str, int]:
    """A tile as keyword arguments of a launch: ``rows`` is the kernel's ``ROWS``, ``num_warps`` Triton's own."""
    return {name if name == "num_warps" else name.upper(): value for name, value in tile._asdict().items()}


# By block of channels. 1: they move one by one, each with an address and a mask of its own, so a thread takes fewer.
# Backward also by the largest number of full-size rows between two small ones.
UPSAMPLE_ADD_FWD = {1: UpsampleTile(4, 16, 32, 16), 32: UpsampleTile(4, 16, 32, 4), 64: UpsampleTile(4, 16, 64, 4)}
UPSAMPLE_ADD_BWD = {
    1: {2: UpsampleTile(2, 8, 32, 4), 4: UpsampleTile(4, 8, 32, 8), 8: UpsampleTile(8, 4, 32, 8)},
    32: {2: UpsampleTile(2, 16, 32, 4), 4: UpsampleTile(4, 16, 32, 8), 8: UpsampleTile(8, 8, 32, 8)},
    64: {2: UpsampleTile(2, 16, 64, 4), 4: UpsampleTile(4, 8, 64, 4), 8: UpsampleTile(8, 4, 64, 4)},
}
PROGRAMS = 2048  # enough to fill a large GPU several times over


def vector_width(channels: int, element_size: int) -> int:
    """Channels of one access: 16 bytes if their number allows it."""
    return math.gcd(channels, 16 // element_size)


def channel_block(channels: int, element_size: int) -> int:
    """Key of the tables: a program's channels, 128 bytes (a cache line) if there are that many; 1: see above."""
    if vector_width(channels, element_size) <= 2:
        return 1
    return 64 if element_size == 2 and channels > 32 else 32


def upsample_add_fwd_tile(channels: int, element_size: int) -> UpsampleTile:
    return UPSAMPLE_ADD_FWD[channel_block(channels, element_size)]


def upsample_add_bwd_tile(channels: int, element_size: int, height: int, small_height: int) -> UpsampleTile:
    factor = height if small_height == 1 else (height - 1) // (small_height - 1)
    table = UPSAMPLE_ADD_BWD[channel_block(channels, element_size)]
    return table[max((rows for rows in table if rows <= factor), default=min(table))]


def upsample_add_bwd_run(programs: int, small_height: int) -> int:
    """Small rows that one program walks down; ``programs`` is how many one row of each image makes. Long runs reread
    less (one row in ``run`` is read twice), short ones fill the GPU."""
    return max(1, min(8, small_height, programs * small_height // PROGRAMS))


class PoolTile(NamedTuple):
    """Pixels and channels that one program of a pooling pass adds at a time."""

    pixels: int
    channels: int
    num_warps: int


POOL = {1: PoolTile(32, 32, 8), 32: PoolTile(32, 32, 2), 64: PoolTile(32, 64, 8)}  # as above


def pool_tile(channels: int, element_size: int) -> PoolTile:
    return POOL[channel_block(channels, element_size)]


def pool_parts(batch: int, pixels: int, channels: int, tile: PoolTile) -> int:
    """Partial sums per image: enough to fill the GPU, each over at least four tiles of pixels."""
    wanted = -(-PROGRAMS // (batch * -(-channels // tile.channels)))
    return max(1, min(wanted, pixels // (4 * tile.pixels)))


class SumTile(NamedTuple):
    """Partial sums and channels that one program adds at a time."""

    parts: int
    channels: int
    num_warps: int


SUM_PARTS = SumTile(32, 64, 4)


class LinearTile(NamedTuple):
    """Rows of the batch, outputs and inputs of a linear layer that one program takes at a time."""

    batch: int
    outputs: int
    inputs: int
    num_warps: int


# By whether inputs (forward) or outputs (backward) are contiguous in the weights.
LINEAR = {True: LinearTile(4, 4, 256, 4), False: LinearTile(4, 32, 32, 4)}
LINEAR_WEIGHT_BWD = LinearTile(4, 16, 64, 4)


# the losses


class LossTile(NamedTuple):
    """One program's small columns, and its classes as registers of a lane times lanes of a column."""

    registers: int
    columns: int
    lanes: int
    num_warps: int


# By classes, up to the key: the lanes of a column lie in one warp.
LOSS_SOFTMAX = {
    2: LossTile(2, 32, 1, 1),
    4: LossTile(4, 32, 1, 1),
    8: LossTile(8, 32, 1, 1),
    16: LossTile(8, 64, 2, 4),
    32: LossTile(8, 32, 4, 4),
    64: LossTile(8, 16, 8, 4),
    128: LossTile(8, 8, 16, 4),
    256: LossTile(8, 4, 32, 4),
}
# By channels: more registers a channel and no sum over channels, so one channel a lane. With one column, the column's
# values are scalars. With 2 to 8 columns, 32 channels spill registers under some Triton version (3.7 to 3.9 tried), and
# so do 256 channels with 2 columns and 16 warps.
LOSS_SIGMOID = {
    1: LossTile(1, 32, 1, 1),
    2: LossTile(1, 32, 2, 2),
    4: LossTile(1, 32, 4, 4),
    8: LossTile(1, 16, 8, 4),
    16: LossTile(1, 8, 16, 4),
    32: LossTile(1, 1, 32, 1),
    64: LossTile(1, 2, 64, 4),
    128: LossTile(1, 2, 128, 8),
    256: LossTile(1, 1, 256, 8),
}


def loss_tile(classes: int, small_width: int, sigmoid: bool) -> LossTile:
    """The table's entry, with no more columns than the image has."""
    table = LOSS_SIGMOID if sigmoid else LOSS_SOFTMAX
    registers, columns, lanes, num_warps = table[power_of_two(classes)]
    while columns > 1 and columns // 2 >= small_width:
        columns, num_warps = columns // 2, max(1, num_warps // 2)
    return LossTile(registers, columns, lanes, num_warps)


class LossBands(NamedTuple):
    """Small rows that a program walks down, and programs that share the full-size rows between two of them."""

    bands: int
    splits: int


# By the largest number of full-size rows between two small ones: 8 to 16 of them a program.
LOSS_BANDS = {4: LossBands(4, 1), 8: LossBands(2, 1), 16: LossBands(1, 2), 32: LossBands(1, 4)}
LOSS_TOTAL_BLOCK = 1024  # programs whose sums are added at a time


def loss_collect_warps(block: int) -> int:
    """Warps of a program that adds ``block`` elements: eight a lane."""
    return max(1, min(8, block // 256))


def loss_bands(small_height: int, height: int) -> LossBands:
    factor = height // small_height
    return next((bands for limit, bands in LOSS_BANDS.items() if factor <= limit), LOSS_BANDS[max(LOSS_BANDS)])


def power_of_two(n: int) -> int:
    """The smallest power of two that is not less than n."""
    power = 1
    while power < n:
        power *= 2
    return power


# multiscale_argmax and resize_normalize


class DecisionTile(NamedTuple):
    """Pixels of one program, which holds all classes of each."""

    pixels: int
    num_warps: int


# By classes, rounded up to a power of two: at most 32 of them a thread, 16 if there are many.
MULTISCALE_ARGMAX = {
    32: DecisionTile(128, 4),
    64: DecisionTile(64, 8),
    128: DecisionTile(32, 8),
    256: DecisionTile(16, 8),
}


def multiscale_argmax_tile(classes: int, element_size: int) -> DecisionTile:
    """A quarter of the numbers a thread if sums are float64: each takes two registers, and its exponential more."""
    tile = next(tile for limit, tile in MULTISCALE_ARGMAX.items() if classes <= limit)
    return tile._replace(pixels=tile.pixels // 2, num_warps=2 * tile.num_warps) if element_size == 8 else tile


class StreamTile(NamedTuple):
    """Rows and columns of one program, which computes the source columns once."""

    rows: int
    pixels: int
    num_warps: int


RESIZE_NORMALIZE = {256: StreamTile(4, 256, 4), 512: StreamTile(4, 512, 4)}  # by columns


def resize_normalize_tile(width: int) -> StreamTile:
    """The wider tile if it fits: fewer programs, each with more loads in flight."""
    return RESIZE_NORMALIZE[512 if width % 512 == 0 or width > 2048 else 256]


class WinogradTile(NamedTuple):
    """When Winograd's algorithm with tiles of ``side`` pixels pays on a CPU.

    ``channels``: the least harmonic mean of input and output channels, halved (256 for 512 and 512): arithmetic grows
    with their product, the transforms with their sum. ``pixels_ahead``, ``pixels``: the fewest pixels, B * H * W, with
    the weight transformed ahead (inference) or in each call (training).
    """

    side: int
    channels: int
    pixels_ahead: int
    pixels: int


# Found on two cores of a Zen 4 with torch 2.13, in alternation with oneDNN's direct convolution: at 512 channels and
# 64 x 64 pixels it is 2.2 times as fast in float32 and 1.6 times in bfloat16.
WINOGRAD = {
    "float32": WinogradTile(4, 120, 512, 1024),
    "float64": WinogradTile(4, 120, 512, 1024),
    "bfloat16": WinogradTile(2, 160, 512, 1024),  # tiles of 4 would round too much
}


def winograd_tile(
    shape: tuple[int, ...], out_channels: int, dtype: str, *, ahead: bool = False, matrix_units: bool = False
) -> int:
    """The side of the tiles for ``[B, I, H, W]``, or 0 if a direct convolution is faster. ``matrix_units``: the CPU has
    AMX, whose bfloat16 products are too fast for the transforms to pay."""
    tile = WINOGRAD.get(dtype)
    if tile is None or (matrix_units and dtype == "bfloat16"):
        return 0
    batch, channels, height, width = shape
    pixels = batch * height * width
    meeting = channels * out_channels // (channels + out_channels)
    return tile.side if meeting >= tile.channels and pixels >= (tile.pixels_ahead if ahead else tile.pixels) else 0
