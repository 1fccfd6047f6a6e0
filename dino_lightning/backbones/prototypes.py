"""The last layer of a projection head: weight-normalised prototypes, whose logits come in full precision."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino_lightning.losses.precision import without_autocast

# Elements of a temporary of the backward pass. On a CPU 4 MiB in float32; elsewhere 64 MiB keep a GPU busy.
_CPU_CHUNK, _CHUNK = 2**20, 2**24


class Prototypes(nn.Module):
    """Linear layer without bias whose rows are directions times gains: ``weight = g · v / ‖v‖``.

    Under autocast the product takes its factors in half precision and gives float32: the logits are divided by temperatures such
    as 0.04, which would blow up their rounding. (On a CPU, which has no such product, the factors are float32 too.)

    A module of ours, because torch's weight-norm utilities either forbid deep copies or rename the keys; here
    ``weight_g`` (K, 1) and ``weight_v`` (K, D) are plain parameters, as in the reference's checkpoints.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        # Uniform within 1 / sqrt(in_dim), the default of nn.Linear.
        nn.init.uniform_(self.weight_v, -(in_dim**-0.5), in_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) → (N, K)."""
        x = x.to(self.weight_v.dtype)
        return _Logits.apply(x, self.weight_v, self.weight_g, _factor_dtype(x))


class _Logits(torch.autograd.Function):
    """x · vᵀ, its columns scaled by g / ‖v‖. The matrix of unit rows, which is wider than everything else at K = 65,536, never exists.

    With G the gradient of the logits L and s = g / ‖v‖: dx = (G·s) v, dg = ΣG·L / g, dv = (G·s)ᵀ x − v · ΣG·L / ‖v‖², sums over rows.
    """

    @staticmethod
    def forward(ctx, x: Tensor, v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        norms = torch.linalg.vector_norm(v, dim=1, keepdim=True)  # (K, 1)
        logits = _product(x, v.t(), dtype).mul_((g / norms).t())
        ctx.save_for_backward(x, v, g, norms, logits)
        ctx.dtype = dtype
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, v, g, norms, logits = ctx.saved_tensors
        for_x, for_v, for_g = ctx.needs_input_grad[:3]
        dx = torch.zeros_like(x) if for_x else None
        dv = torch.empty_like(v) if for_v else None
        along = torch.empty_like(g)  # ΣG·L
        for columns in _chunks(*logits.shape, x.device):
            part = gradient[:, columns]
            if for_v or for_g:
                along[columns, 0] = (part * logits[:, columns]).sum(dim=0)
            scaled = part * (g[columns] / norms[columns]).t()
            if for_x:
                dx += _product(scaled, v[columns], ctx.dtype)
            if for_v:
                dv[columns] = _product(scaled.t(), x, ctx.dtype)
                dv[columns] -= v[columns] * (along[columns] / norms[columns] ** 2)
        return dx, dv, along / g if for_g else None, None


def _chunks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    step = max(1, (_CPU_CHUNK if device.type == "cpu" else _CHUNK) // max(1, rows))
    for start in range(0, columns, step):
        yield slice(start, min(start + step, columns))


def _factor_dtype(x: Tensor) -> torch.dtype:
    """What the factors of a product whose result is wide are rounded to."""
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return x.dtype


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a · b of factors in this type, in the type of a."""
    if dtype != a.dtype:
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=a.dtype)
    with without_autocast(a.device):
        return torch.mm(a, b)
