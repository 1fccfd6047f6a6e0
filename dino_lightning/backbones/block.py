"""A block of a vision transformer: attention, then an MLP, each on normalised tokens and added to them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm block, with stochastic depth (Huang et al. 2016) in training.

    In training it drops a branch for whole samples at the rate ``drop_path`` and scales the others to keep the mean. Each sample is drawn
    by itself; with ``drop_path_by_subset`` exactly as many are kept as ``drop_path_subset`` says. The branch is computed for the kept ones
    alone where they are known beforehand.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp: nn.Module,
        drop_path: float,
        layer_scale: float | None,
        norm_eps: float,
        drop_path_by_subset: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = _Attention(dim, num_heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = mlp
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path, self.drop_path_by_subset = drop_path, drop_path_by_subset

    def forward(self, x: Tensor, n_tokens: int | None = None) -> Tensor:
        """(B, T, D) → the first ``n_tokens`` tokens, or all (B, T, D). Less is computed for fewer, with the same numbers."""
        x = self._with_branch(x, lambda x: self.ls1(self.attn(self.norm1(x), n_tokens)), n_tokens)
        return self._with_branch(x, lambda x: self.ls2(self.mlp(self.norm2(x))))

    def attention(self, x: Tensor, n_queries: int | None) -> Tensor:
        """(B, T, D) → this block's attention of the first ``n_queries`` tokens, or of all (B, heads, n_queries, T)."""
        return self.attn.attention(self.norm1(x), n_queries)

    def _with_branch(self, x: Tensor, branch: Callable[[Tensor], Tensor], n_tokens: int | None = None) -> Tensor:
        """The first ``n_tokens`` of x, or all, with what the branch, which sees all of x, gives for them added."""
        first = x[:, :n_tokens]
        if self.drop_path == 0 or not self.training:
            return first + branch(x)
        if self.drop_path_by_subset:
            count, factor = drop_path_subset(len(x), self.drop_path)
            kept = drawn_samples(len(x), count, x.device)
        elif x.device.type == "cpu" and not torch.compiler.is_compiling():
            # The draw is known before the branch, which then need not be computed for what is dropped.
            kept, factor = (torch.rand(len(x)) >= self.drop_path).nonzero()[:, 0], 1 / (1 - self.drop_path)
        else:
            return first + self._drop(branch(x))
        found = branch(x.index_select(0, kept)).to(x.dtype)  # autocast gives branches of lower precision
        return first.index_add(0, kept, found, alpha=factor)

    def _drop(self, branch: Tensor) -> Tensor:
        keep = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - self.drop_path)
        return branch * keep.div_(1 - self.drop_path)


def drop_path_subset(batch: int, rate: float) -> tuple[int, float]:
    """How many samples of a batch a branch keeps at a drop rate, at least one, and the factor that keeps the mean (Oquab et al. 2023)."""
    kept = max(int(batch * (1 - rate)), 1)
    return kept, batch / kept


def drawn_samples(batch: int, count: int, device: torch.device) -> Tensor:
    """``count`` different samples of a batch, their numbers in random order (count,), by torch's default generator."""
    return torch.randperm(batch, device=device)[:count]


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, n_tokens: int | None = None) -> Tensor:
        """(B, T, D) → what the first ``n_tokens`` tokens, or all, gather from all (B, n_tokens, D)."""
        q, k, v = self._heads(x)
        q = q[:, :, :n_tokens]
        if x.device.type == "cpu" and q.dtype == torch.bfloat16:
            x = _softmax_scores(q, k) @ v  # the backward pass of torch's fused attention is slow in bfloat16 on a CPU
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def attention(self, x: Tensor, n_queries: int | None) -> Tensor:
        """(B, T, D) → (B, heads, n_queries, T)."""
        q, k, _ = self._heads(x)
        return _softmax_scores(q[:, :, :n_queries], k)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, heads, T, D / heads)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, T, heads, D / heads); one copy in the backward pass
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class _SwiGLU(nn.Module):
    """Shazeer 2020, with the widths and keys of DINOv2."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        hidden_dim = (int(hidden_dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        gate, hidden = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * hidden)


class LayerScale(nn.Module):
    """A learned factor for each channel, ``value`` at first (Touvron et al. 2021)."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to ``value``."""
        nn.init.constant_(self.gamma, self.value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


FFNS = {"mlp": _Mlp, "swiglu": _SwiGLU}


def _softmax_scores(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q·kᵀ / √d); q is scaled before the product, which could overflow float16."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
