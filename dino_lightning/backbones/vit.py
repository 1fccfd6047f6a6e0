"""Vision transformer with a class token and learned positions that are interpolated to any input size.

State-dict keys, initialisation and numerics are those of the reference (and of timm): pre-norm, LayerNorm eps 1e-6,
exact GELU, no LayerScale. Paper: Dosovitskiy et al. 2021; positions at other sizes as in Caron et al. 2021.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# name → width, depth, heads (MLP ratio 4)
VIT_SIZES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant": (1536, 40, 24),
}


class VisionTransformer(nn.Module):
    """Images (B, C, H, W) → class-token features (B, ``embed_dim``), for any H and W that the patch size divides.

    Args:
        img_size: pixels, int or (H, W): the size whose grid the learned positions have. Set it to the global crop size.
        patch_size: pixels of a patch's side.
        in_chans: channels of the images.
        embed_dim: width D.
        depth: number of blocks.
        num_heads: attention heads; must divide ``embed_dim``.
        mlp_ratio: hidden width of a block's MLP over ``embed_dim``.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), got {drop_path_rate}")
        self.embed_dim, self.patch_size = embed_dim, patch_size
        sides = (img_size,) if isinstance(img_size, int) else tuple(img_size)
        self.grid = _grid(sides[0], sides[-1], patch_size)
        self.patch_embed = _PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList([_Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights of the blocks, positions and class token anew."""
        # The patch embedding keeps torch's default, as in the reference.
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) → the class token after the final norm (B, D)."""
        x = self._tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """All tokens of the last ``n`` blocks, oldest first, each after the final norm: n tensors (B, T, D)."""
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"n must lie between 1 and the depth {len(self.blocks)}, got {n}")
        x = self._tokens(x)
        layers = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                layers.append(self.norm(x))
        return layers

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention of the last block after its softmax (B, heads, T, T); token 0 is the class token."""
        return self._last_attention(x, n_queries=None)

    def get_cls_attention(self, x: Tensor) -> Tensor:
        """Attention of the class token to the patches in the last block (B, heads, h, w), without what it pays to itself.

        Its memory grows with the number of patches, not with its square.
        """
        rows = self._last_attention(x, n_queries=1)[:, :, 0, 1:]
        return rows.unflatten(-1, _grid(*x.shape[-2:], self.patch_size))

    def _last_attention(self, x: Tensor, n_queries: int | None) -> Tensor:
        x = self._tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attention(x, n_queries)

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, 1 + h·w, D) with positions added."""
        grid = _grid(*x.shape[-2:], self.patch_size)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        return x + self._positions(*grid)

    def _positions(self, h: int, w: int) -> Tensor:
        """Learned positions for a grid of h × w patches (1, 1 + h·w, D)."""
        if (h, w) == self.grid:
            return self.pos_embed
        cls_position, positions = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        positions = positions.unflatten(1, self.grid).permute(0, 3, 1, 2)  # (1, D, grid)
        # The reference scales by (n + 0.1) / grid and samples at that scale, which differs from a resize to n by up to 28 %.
        scale = ((h + 0.1) / self.grid[0], (w + 0.1) / self.grid[1])
        positions = F.interpolate(positions, scale_factor=scale, mode="bicubic")
        return torch.cat([cls_position, positions.flatten(2).transpose(1, 2)], dim=1)


class _PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, h·w, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def attention(self, x: Tensor, n_queries: int | None) -> Tensor:
        """(B, T, D) → this block's attention of the first ``n_queries`` tokens, or of all (B, heads, n_queries, T)."""
        return self.attn.attention(self.norm1(x), n_queries)

    def _drop(self, branch: Tensor) -> Tensor:
        """Stochastic depth (Huang et al. 2016): drops the branch of whole samples, and scales the others to keep the mean."""
        if self.drop_path == 0 or not self.training:
            return branch
        keep = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - self.drop_path)
        return branch * keep.div_(1 - self.drop_path)


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        q, k, v = self._heads(x)
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
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


def _softmax_scores(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q·kᵀ / √d); q is scaled before the product, which could overflow float16."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)


def _grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    if height % patch_size or width % patch_size or not height or not width:
        near = tuple(max(1, round(side / patch_size)) * patch_size for side in (height, width))
        raise ValueError(
            f"the patch size {patch_size} does not divide the image size {height}×{width}; "
            f"the nearest that fits is {near[0]}×{near[1]}"
        )
    return height // patch_size, width // patch_size
