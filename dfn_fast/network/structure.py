"""Whether a block is still what our constructors built: the fast paths ask before they read its weights.

FastDFN and FusedDFN compute a block from its weights and assume everything else: kernel sizes, padding, activations. A
block may have been changed since: a dilated or wrapped convolution, another activation, a forward hook, spectral norm,
pruning, LoRA. Such a block runs its own ``forward`` instead. Only plain attributes are read, so that torch.compile can
trace every check.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfn_fast.network.backbone import BasicBlock, Bottleneck, ResNet
from dfn_fast.network.blocks import ChannelAttentionBlock, ConvBnRelu, Head, RefinementResidualBlock, SqueezeGate

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def unchanged(block: Any) -> bool:
    """Whether ``block``, an RRB, CAB, head or backbone block, is as built; False for a block of any other type."""
    if type(block) is RefinementResidualBlock:
        return (
            _is(block, RefinementResidualBlock)
            and _conv(block.conv_1x1, 1)
            and _conv_bn_relu(block.cbr, 3)
            and _conv(block.conv_refine, 3)
        )
    if type(block) is ChannelAttentionBlock:
        return _is(block, ChannelAttentionBlock) and _gate(block.channel_attention)
    if type(block) is Head:
        return _is(block, Head) and unchanged(block.rrb) and _conv(block.conv, 1, bias=True)
    if type(block) in (BasicBlock, Bottleneck):
        kernels = (3, 3) if type(block) is BasicBlock else (1, 3, 1)
        convs = all(_conv(getattr(block, f"conv{i}"), kernel, block_stride=True) for i, kernel in enumerate(kernels, 1))
        norms = all(_untouched(getattr(block, f"bn{i}")) for i in range(1, len(kernels) + 1))
        return (
            _is(block, type(block)) and convs and norms and _is(block.relu, nn.ReLU) and _projection(block.downsample)
        )
    return False


def unchanged_stem(backbone: nn.Module) -> bool:
    """Whether everything before the backbone's stages is as built."""
    conv1: Any = backbone.conv1
    pool: Any = backbone.maxpool
    pool_is = _is(pool, nn.MaxPool2d) and (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
    plain_pool = pool_is and pool.dilation == 1 and not pool.ceil_mode and not pool.return_indices
    ends = _untouched(backbone.bn1) and _is(backbone.relu, nn.ReLU) and plain_pool
    if type(conv1) is not nn.Sequential:
        return ends and _conv(conv1, 7, block_stride=True)
    layers = list(conv1)
    convs, norms, relus = layers[::3], layers[1::3], layers[2::3]
    return (
        ends
        and _is(conv1, nn.Sequential)
        and len(layers) == 7
        and all(_conv(conv, 3, block_stride=True) for conv in convs)
        and all(_untouched(norm) for norm in norms)
        and all(_is(relu, nn.ReLU) for relu in relus)
    )


def unchanged_stage(stage: Any) -> bool:
    """Whether a stage of the backbone only runs its blocks one after another."""
    return _is(stage, nn.Sequential)


def unchanged_backbone(backbone: Any) -> bool:
    """Whether the backbone only runs its stem and its stages one after another."""
    return isinstance(backbone, ResNet) and type(backbone).forward is ResNet.forward and _untouched(backbone)


def unchanged_context(context: Any) -> bool:
    """Whether the global context is average pooling, a 1x1 convolution, norm and ReLU."""
    if not (_is(context, nn.Sequential) and len(context) == 2):
        return False
    return (
        _is(context[0], nn.AdaptiveAvgPool2d) and context[0].output_size in (1, (1, 1)) and _conv_bn_relu(context[1], 1)
    )


def is_batch_norm(layer: Any) -> TypeGuard[_BatchNorm]:
    """Whether a norm layer is batch norm: its channels do not mix, and its statistics fold into a convolution.

    A class of its own may say so with an attribute ``is_batch_norm = True``. Other subclasses may compute anything.
    """
    return type(layer) in BATCH_NORMS or getattr(type(layer), "is_batch_norm", False)


def _untouched(module: Any) -> bool:
    """Whether a module has no hooks, no ``forward`` of its own and no parametrisation."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "parametrizations" in module._modules
    )


def _is(module: Any, kind: type) -> bool:
    """Whether a module is of exactly this type, and untouched."""
    return type(module) is kind and _untouched(module)


def _plain(parameter: Any) -> bool:
    """Whether a parameter is a tensor of numbers: not absent, pruned, quantised or wrapped by another package."""
    if not isinstance(parameter, Tensor) or parameter.is_quantized or not parameter.is_floating_point():
        return False
    # A tensor class of another package. torch.compile cannot trace the question.
    return torch.compiler.is_compiling() or type(parameter).__module__.partition(".")[0] == "torch"


def _conv(conv: Any, kernel: int, *, bias: bool = False, block_stride: bool = False) -> bool:
    """Whether ``conv`` is a plain convolution that keeps the size, except for the stride of a backbone block."""
    return (
        _is(conv, nn.Conv2d)
        and conv.kernel_size == (kernel, kernel)
        and conv.padding == (kernel // 2, kernel // 2)
        and (conv.stride == (1, 1) or (block_stride and conv.stride[0] == conv.stride[1]))
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and _plain(conv._parameters.get("weight"))
        and (_plain(conv._parameters.get("bias")) if bias else conv._parameters.get("bias") is None)
    )


def _conv_bn_relu(block: Any, kernel: int) -> bool:
    return _is(block, ConvBnRelu) and _conv(block.conv, kernel) and _untouched(block.bn) and _is(block.relu, nn.ReLU)


def _gate(gate: Any) -> bool:
    if not (_is(gate, SqueezeGate) and _is(gate.fc, nn.Sequential) and len(gate.fc) == 4):
        return False
    first, relu, second, sigmoid = gate.fc
    linears = all(
        _is(layer, nn.Linear) and _plain(layer._parameters.get("weight")) and _plain(layer._parameters.get("bias"))
        for layer in (first, second)
    )
    return linears and _is(relu, nn.ReLU) and _is(sigmoid, nn.Sigmoid)


def _projection(downsample: Any) -> bool:
    if downsample is None:
        return True
    if not (_is(downsample, nn.Sequential) and len(downsample) == 2):
        return False
    return _conv(downsample[0], 1, block_stride=True) and _untouched(downsample[1])
