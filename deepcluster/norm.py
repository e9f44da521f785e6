"""Batch normalisation over the rows of all processes, for any module that calls torch's ``batch_norm`` in training.

torch's SyncBatchNorm does the same on accelerators only, and replaces modules; here the network is left as it is.

Shapes: B rows of this rank, C channels.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from deepcluster import dist


class Shared(nn.Module):
    """Calls ``network``, whose batch norms in training use the rows of all ranks; in evaluation nothing is changed."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any) -> Any:
        with _OverRanks():
            return self.network(*inputs)


class _OverRanks(TorchFunctionMode):
    """Within, ``F.batch_norm`` is the one below: also in norms that are not torch's own (timm's)."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` of (B, C, ...) rows that are sharded over ranks; B may differ between them.

    Statistics are float32 or wider; they and the gradients are those of the rows of all ranks, as are the running ones.
    """
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    count, mean, variance = moments(x)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean), momentum)
        unbiased = variance * count / (count - 1).clamp_min(1)
        running_var.lerp_(unbiased.to(running_var), momentum)
    return _Normalise.apply(x, weight, bias, mean, (variance + eps).rsqrt(), count)


@torch.no_grad()
def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values a channel (), and (C,) mean and variance, float64, of the (B, C, ...) rows of all ranks.

    Ranks give their counts, means and squares about these, so that nothing is lost where the mean is far from 0.
    """
    wide, over = _wide(x), [0, *range(2, x.ndim)]
    n = x.numel() // x.shape[1]
    near = wide.sum(over) / max(1, n)
    centred = wide - _a_channel(near, x)
    rest = centred.sum(over).double() / max(1, n)  # what the rounding of the mean left
    mean, squares = near.double() + rest, centred.square().sum(over).double() - n * rest.square()
    parts = dist.all_stack(torch.cat([rest.new_tensor([n]), mean, squares]))
    counts, means, squares = parts.split([1, len(mean), len(mean)], 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (squares + counts * (means - mean).square()).sum(0) / total
    return total, mean, variance


def deviation(x: Tensor) -> Tensor:
    """Standard deviation of each channel over the (B, C, ...) rows of all ranks, float32, as (1, C, 1, ...)."""
    if dist.world() == 1:
        return x.float().std([0, *range(2, x.ndim)], keepdim=True, correction=0)
    return _a_channel(moments(x)[2].sqrt().float(), x)


class _Normalise(torch.autograd.Function):
    """(x - mean) * scale * weight + bias, where mean and scale are functions of the x of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, count: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, scale, count)
        factor = scale if weight is None else scale * weight
        out = (_wide(x) - _a_channel(mean, x)) * _a_channel(factor, x)
        return (out if bias is None else out + _a_channel(bias, x)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        grad, over = _wide(grads[0]), [0, *range(2, x.ndim)]
        unit = (_wide(x) - _a_channel(mean, x)) * _a_channel(scale, x)
        to_weight, to_bias = (grad * unit).sum(over), grad.sum(over)  # of this rank's rows, as of any other parameter
        along, level = dist.all_sum(torch.stack([to_weight, to_bias]).double()) / count
        rest = grad - _a_channel(level, x) - unit * _a_channel(along, x)
        to_x = (rest * _a_channel(scale if weight is None else scale * weight, x)).to(x.dtype)
        own = (to_weight.to(weight), to_bias.to(weight)) if weight is not None else (None, None)
        return to_x, own[0], own[1] if ctx.needs_input_grad[2] else None, None, None, None


def _wide(x: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _a_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, ...), in the precision that x is computed in."""
    return values.to(torch.promote_types(x.dtype, torch.float32)).view(1, -1, *[1] * (x.ndim - 2))
