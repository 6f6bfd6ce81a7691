"""One optimiser step on several processes: batch norm, averaging, FSDP."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dfn_fast.network.reference import ReferenceDFN
from dfn_fast.runtime.processes import World


class _Sum(torch.autograd.Function):
    """The sum over all processes. The gradient of each input is the sum of the gradients in all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the batches of all processes, which must be of equal size. ``[B, C, H, W]``.

    It is ``nn.SyncBatchNorm`` in plain PyTorch: that one refuses CPUs and cannot be compiled as one graph. Statistics
    are float32 or better.
    """

    is_batch_norm = True  # for dfn_fast.network.structure

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim != 4:
            raise ValueError(f"expected [B, C, H, W], got {list(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        rank, size = dist.get_rank(), dist.get_world_size()
        features = x if x.dtype == torch.float64 else x.float()
        own_variance, own_mean = torch.var_mean(features, (0, 2, 3), correction=0)
        # A row for each process. A mean of squares, minus the square of the mean, would lose digits.
        own = F.pad(torch.stack([own_mean, own_variance])[None], (0, 0, 0, 0, rank, size - 1 - rank))
        means, variances = _Sum.apply(own).unbind(1)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        count = size * x.numel() // x.shape[1]
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], features, scale[:, None, None]).to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.momentum is not None  # a cumulative average would wait for the device
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
            self.num_batches_tracked.add_(1)


def norm_layer(world: World, native: bool = False) -> Callable[[int], nn.Module]:
    """The norm layer of a network that trains in ``world``; ``native``: on a GPU, not compiled."""
    if world.size == 1:
        return nn.BatchNorm2d
    return nn.SyncBatchNorm if native else SyncBatchNorm


def valid_shares(world: World, labels: Tensor, targets: Tensor, ignore_index: int = 255) -> Tensor:
    """Factors for this process's means over the valid pixels of ``labels`` and of border ``targets``, ``[2]`` float32.

    With them the mean over processes is the mean over the valid pixels of all processes.
    """
    own = torch.stack([(x != ignore_index).sum() for x in (labels, targets)]).double()
    return (own * world.size / world.sum(own.clone()).clamp(min=1)).float()


def unused_parameters(model: ReferenceDFN) -> list[nn.Parameter]:
    """Parameters that no loss depends on. They never get a gradient, so nothing may wait for it."""
    if not model.has_border:
        return []
    whole: list[nn.Module] = [model.border_pre_rrbs, model.border_aft_rrbs, model.border_heads]
    modules = [model.border_aft_rrbs[0]] if model.alpha else whole
    return [parameter for module in modules for parameter in module.parameters()]


def data_parallel(loss: nn.Module, model: ReferenceDFN) -> DistributedDataParallel:
    """Wraps ``loss``, of ``model``, to average gradients over all processes while the backward pass runs."""
    unused = {id(parameter) for parameter in unused_parameters(model)}
    ignored = [name for name, parameter in loss.named_parameters() if id(parameter) in unused]
    # Buffers are running statistics of the whole batch and equal in all processes, so none are sent.
    ignored += [name for name, _ in loss.named_buffers()]
    # A 1x1 weight in channels_last has other strides than its gradient, but the same order in memory.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss, ignored)
    return DistributedDataParallel(loss, gradient_as_bucket_view=True)


def shard(model: ReferenceDFN) -> None:
    """Shards ``model`` in place with FSDP: each block of the backbone, and the rest, is whole only while it runs.

    The rest is one unit, because FastDFN reads the weights of RRBs and heads outside the ``forward`` of these modules,
    where nothing would gather them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backbone = model.backbone
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        for block in stage:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of ``whole``, which all processes hold; ``whole`` if ``parameter`` is not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor: its shard, or all of it."""
    return x.to_local() if hasattr(x, "to_local") else x


def gathered(value: Any, keep: bool = True) -> Any:
    """Replaces the shards in ``value`` by whole tensors on the CPU, or by None if not ``keep``.

    All processes must call it together.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    from torch.distributed.tensor import DTensor
    from torch.utils._pytree import tree_map_only

    def gather(shard: DTensor) -> Tensor | None:
        whole = shard.full_tensor()
        return whole.cpu() if keep else None

    return tree_map_only(DTensor, gather, value)


def sharded_state(model: nn.Module, everywhere: bool = False) -> dict[str, Any]:
    """The whole state dict of a sharded model. All processes must call it together.

    The first gets it on the CPU and the others nothing; with ``everywhere`` each gets it on its own device.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=not everywhere))


def load_sharded_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Loads a whole state dict, which all processes hold, into a sharded model."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
