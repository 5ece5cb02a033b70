"""BatchNorm over the micro-batches of all ranks, on any device.

torch's SyncBatchNorm needs torch.distributed, and Horovod's needs a GPU. This one needs only a function that sums a
tensor over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# (tensor, name of the collective) -> the sum over the ranks.
AllReduce = Callable[[Tensor, str], Tensor]


class SyncBatchNorm(_BatchNorm):
    """BatchNorm that computes its statistics over the micro-batches of all ranks together.

    Parameters, buffers and evaluation are the same as in `torch.nn.BatchNorm2d`. During training, each forward pass
    and each backward pass makes one collective call. So every rank must run the same passes, with an empty batch if
    it has no samples.
    """

    def __init__(
        self, num_features: int, *, all_reduce: AllReduce, name: str, **options: Any
    ) -> None:
        """Build a layer.

        Args:
            num_features: Number of channels.
            all_reduce: AllReduces over the ranks.
            name: Distinguishes this layer's collectives from others.
            **options: Options of `torch.nn.BatchNorm2d`.
        """
        super().__init__(num_features, **options)
        self.all_reduce, self.name = all_reduce, name

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, variance, count = _Normalise.apply(
            x, self.weight, self.bias, self.eps, self.all_reduce, self.name
        )
        if self.track_running_stats:
            self._track(mean, variance * (count / (count - 1)))
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        share: Any = self.momentum
        if share is None:
            share = (1.0 / self.num_batches_tracked.double()).to(self.running_mean.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")


def synchronised(model: nn.Module, all_reduce: AllReduce) -> nn.Module:
    """Replace every BatchNorm of a model by a `SyncBatchNorm` with the same parameters and buffers."""
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(module, name, _like(child, all_reduce, f"{path}.{name}".lstrip(".")))
    return model


def _like(norm: _BatchNorm, all_reduce: AllReduce, name: str) -> SyncBatchNorm:
    own = SyncBatchNorm(
        norm.num_features,
        all_reduce=all_reduce,
        name=f"BatchNorm {name}",
        eps=norm.eps,
        momentum=norm.momentum,
        affine=norm.affine,
        track_running_stats=norm.track_running_stats,
    )
    own.weight, own.bias = norm.weight, norm.bias
    own.running_mean, own.running_var = norm.running_mean, norm.running_var
    own.num_batches_tracked = norm.num_batches_tracked
    return own.train(norm.training)


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / √(variance + eps) * weight + bias, with mean and variance over all ranks."""

    @staticmethod
    @torch.compiler.disable
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        all_reduce: AllReduce,
        name: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = _all_but_channels(x)
        channels, n = x.shape[1], x.numel() // x.shape[1]
        # In float64, Σx and Σx² give an accurate variance for any mean.
        sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
        if n:
            variance, mean = torch.var_mean(x.float() if _is_half(x) else x, dims, correction=0)
            mean, variance = mean.double(), variance.double()
            sums[:channels] = n * mean
            sums[channels:-1] = n * (variance + mean**2)
            sums[-1] = n
        sums = all_reduce(sums, f"{name} forward")
        count = sums[-1]
        mean = sums[:channels] / count
        variance = (sums[channels:-1] / count - mean**2).clamp(min=0)
        dtype = torch.float32 if _is_half(x) else x.dtype
        mean, variance = mean.to(dtype), variance.to(dtype)
        y = nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.all_reduce, ctx.name = all_reduce, name
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, dy: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        dims = _all_but_channels(x)
        dy_ = dy.to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(shape)) * inverse_std.view(shape)
        sum_dy, sum_dy_normal = dy_.sum(dims), (dy_ * normal).sum(dims)
        # Every rank needs the derivative of the sum of all ranks' losses with respect to the shared statistics. The
        # derivatives with respect to weight and bias are those of this rank, and the gradient exchange sums them.
        both = torch.cat([sum_dy, sum_dy_normal]).double()
        mean_dy, mean_dy_normal = (
            (ctx.all_reduce(both, f"{ctx.name} backward") / count).to(mean.dtype).chunk(2)
        )
        scale = inverse_std if weight is None else inverse_std * weight
        dx = dy_ - mean_dy.view(shape) - normal * mean_dy_normal.view(shape)
        dx = (dx * scale.view(shape)).to(x.dtype)
        own = (None, None) if weight is None else (sum_dy_normal, sum_dy)
        return dx, *own, None, None, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)
