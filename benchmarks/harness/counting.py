"""Operations and bytes of DFN, layer by layer, and the least time that a machine needs for them.

A floor is the sum over layers of the larger of two times: the layer's arithmetic at the machine's peak, and its bytes
at the machine's bandwidth, with everything between two convolutions (norm, ReLU, additions, attention, resizes) fused
into them: each reads its input and weights once and writes its output once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dfn_fast.network.backbone import LAYERS, STEMS, Bottleneck


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer at the sizes at which it runs; counts are for one forward pass of the batch."""

    part: str  # such as "backbone 1/4" or "smooth 1/8"
    name: str
    inputs: int
    outputs: int
    kernel: int
    pixels_in: int  # of the whole batch
    pixels_out: int

    @property
    def flops(self) -> int:
        """A multiplication and an addition count two."""
        return 2 * self.inputs * self.outputs * self.kernel**2 * self.pixels_out

    def bytes(self, element_size: int) -> int:
        weights = self.inputs * self.outputs * self.kernel**2
        return element_size * (self.inputs * self.pixels_in + weights + self.outputs * self.pixels_out)


@dataclass(frozen=True)
class Network:
    """The network to count: its constructor arguments, its batch, and how it runs.

    ``savings`` counts FastDFN's composed convolutions; ``one_head`` only the segmentation's head, as in inference.
    """

    batch: int = 1
    height: int = 512
    width: int = 512
    num_classes: int = 21
    backbone: str = "resnet101"
    stem: str = "deep"
    channels: int = 512
    border_channels: int = 21
    border: bool = False
    one_head: bool = True
    savings: bool = False

    def layers(self) -> list[Layer]:
        return [*self._backbone(), *self._smooth(), *(self._border() if self.border else [])]

    def _size(self, stride: int) -> int:
        """Pixels of the batch at a stride; each halving rounds up."""
        height, width = self.height, self.width
        while stride > 1:
            height, width, stride = -(-height // 2), -(-width // 2), stride // 2
        return self.batch * height * width

    def _conv(self, part: str, name: str, inputs: int, outputs: int, kernel: int, stride: int, step: int = 1) -> Layer:
        """A convolution whose output is at ``stride`` and whose input at ``stride / step``."""
        return Layer(part, name, inputs, outputs, kernel, self._size(stride // step), self._size(stride))

    @property
    def stages(self) -> list[int]:
        """The backbone's channels at strides 4, 8, 16 and 32."""
        return [width * LAYERS[self.backbone][0].expansion for width in (64, 128, 256, 512)]

    def _backbone(self) -> Iterator[Layer]:
        block, counts = LAYERS[self.backbone]
        if self.stem == STEMS[0]:
            yield self._conv("backbone stem", "conv1.0", 3, 64, 3, 2, 2)
            yield self._conv("backbone stem", "conv1.3", 64, 64, 3, 2)
            yield self._conv("backbone stem", "conv1.6", 64, 128, 3, 2)
            inputs = 128
        else:
            yield self._conv("backbone stem", "conv1", 3, 64, 7, 2, 2)
            inputs = 64
        for i, (width, count) in enumerate(zip((64, 128, 256, 512), counts, strict=True)):
            stride, part, outputs = 4 << i, f"backbone 1/{4 << i}", width * block.expansion
            for j in range(count):
                step = 2 if i and not j else 1
                name = f"layer{i + 1}.{j}"
                if block is Bottleneck:
                    yield self._conv(part, f"{name}.conv1", inputs, width, 1, stride // step)
                    yield self._conv(part, f"{name}.conv2", width, width, 3, stride, step)
                    yield self._conv(part, f"{name}.conv3", width, outputs, 1, stride)
                else:
                    yield self._conv(part, f"{name}.conv1", inputs, width, 3, stride, step)
                    yield self._conv(part, f"{name}.conv2", width, width, 3, stride)
                if step > 1 or inputs != outputs:
                    yield self._conv(part, f"{name}.downsample", inputs, outputs, 1, stride, step)
                inputs = outputs

    def _rrb(self, part: str, name: str, inputs: int, width: int, stride: int) -> Iterator[Layer]:
        yield self._conv(part, f"{name}.conv_1x1", inputs, width, 1, stride)
        composed = self.savings and inputs < width
        yield self._conv(part, f"{name}.cbr", inputs if composed else width, width, 3, stride)
        yield self._conv(part, f"{name}.conv_refine", width, width, 3, stride)

    def _head(self, part: str, inputs: int, scores: int, stride: int) -> Iterator[Layer]:
        *first, refine = self._rrb(part, "head.rrb", inputs, 9 * scores, stride)
        yield from first
        yield self._conv(part, refine.name, 9 * scores, scores if self.savings else 9 * scores, 3, stride)
        yield self._conv(part, "head.conv", 9 * scores, scores, 1, stride)

    def _smooth(self) -> Iterator[Layer]:
        C, B = self.channels, self.batch
        yield Layer("smooth 1/32", "global_context", self.stages[3], C, 1, B, B)
        for i, stage in enumerate(reversed(self.stages)):
            stride = 32 >> i
            part = f"smooth 1/{stride}"
            yield from self._rrb(part, f"smooth_pre_rrbs.{i}", stage, C, stride)
            yield Layer(part, f"cabs.{i}.fc.0", 2 * C, C, 1, B, B)
            yield Layer(part, f"cabs.{i}.fc.2", C, C, 1, B, B)
            yield from self._rrb(part, f"smooth_aft_rrbs.{i}", C, C, stride)
            if i == 3 or not self.one_head:
                yield from self._head(part, C, self.num_classes, stride)

    def _border(self) -> Iterator[Layer]:
        width = self.border_channels
        for i, stage in enumerate(self.stages):
            part = f"border 1/{4 << i}"
            yield from self._rrb(part, f"border_pre_rrbs.{i}", stage, width, 4 << i)
            if i:
                yield from self._rrb(part, f"border_aft_rrbs.{i}", width, width, 4)
            yield from self._head(part, width, 1, 4)


@dataclass(frozen=True)
class Machine:
    """A machine's measured peaks: operations and bytes a second."""

    flops: float
    bandwidth: float


H200 = Machine(788e12, 4.3e12)  # bf16, as DESIGN measured it


def passes(layer: Layer, training: bool) -> int:
    """How often a layer's arithmetic is done. Backward adds the gradients of weight and input; images have none."""
    return 1 if not training else 2 if layer.inputs == 3 else 3


def total_flops(network: Network, training: bool = False) -> int:
    return sum(layer.flops * passes(layer, training) for layer in network.layers())


def total_bytes(network: Network, element_size: int, training: bool = False) -> int:
    return sum(layer.bytes(element_size) * passes(layer, training) for layer in network.layers())


def floor(network: Network, machine: Machine, training: bool = False, element_size: int = 2) -> float:
    """Seconds, each layer at the larger of its two limits."""
    return sum(
        passes(layer, training) * max(layer.flops / machine.flops, layer.bytes(element_size) / machine.bandwidth)
        for layer in network.layers()
    )
