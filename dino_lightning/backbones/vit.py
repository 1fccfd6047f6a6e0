"""Vision transformer with a class token and learned positions that are interpolated to any input size.

State-dict keys, initialisation and numerics are those of the reference (and of timm): pre-norm, LayerNorm eps 1e-6,
exact GELU. Paper: Dosovitskiy et al. 2021; positions at other sizes as in Caron et al. 2021. What DINOv2's networks have
beyond that (Oquab et al. 2023, Darcet et al. 2023) are options: LayerScale, SwiGLU, registers, a mask token.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_lightning.backbones.block import FFNS, Block, LayerScale
from dino_lightning.backbones.positions import height_width, interpolate_positions

# name → width, depth, heads (MLP ratio 4)
VIT_SIZES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant": (1536, 40, 24),
}


class Tokens(NamedTuple):
    """What a block gives, after the final norm: ``cls`` (B, D), ``patches`` (B, D, h, w) and ``registers`` (B, R, D)."""

    cls: Tensor
    patches: Tensor
    registers: Tensor


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
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first. See ``drop_path_uniform``.
        registers: tokens beside the class token and the patches, without a position and without a meaning of their own.
        layer_scale: gain of each block's branches at the start, learned for each channel; None for none.
        ffn: the blocks' MLP, with GELU, or gated by SiLU ("swiglu", whose hidden width is two thirds of it).
        position_offset: patches by which a grid is taken too large where positions are interpolated; the reference's habit.
        position_antialias: antialias positions where they are interpolated to a smaller grid.
        norm_eps: of the layer norms.
        mask_token: have a token that stands for masked patches; ``forward_features`` then takes ``masks``.
        drop_path_uniform: drop paths as DINOv2 does: at the full rate in every block, and always the same number of samples.
        activation_checkpointing: keep of each block its input alone, and compute the rest anew in the backward pass, with the same numbers:
            a fraction of the memory for a third more operations (Chen et al. 2016).
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
        registers: int = 0,
        layer_scale: float | None = None,
        ffn: Literal["mlp", "swiglu"] = "mlp",
        position_offset: float = 0.1,
        position_antialias: bool = False,
        norm_eps: float = 1e-6,
        mask_token: bool = False,
        drop_path_uniform: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if ffn not in FFNS:
            raise ValueError(f"ffn must be one of {', '.join(FFNS)}, got {ffn!r}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), got {drop_path_rate}")
        self.embed_dim, self.patch_size, self.layer_scale = embed_dim, patch_size, layer_scale
        self.position_offset, self.position_antialias = position_offset, position_antialias
        self.drop_path_uniform = drop_path_uniform
        self.grid = patch_grid(*height_width(img_size), patch_size)
        self.patch_embed = _PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim)) if mask_token else None
        rates = [drop_path_rate * (1 if drop_path_uniform else i / max(1, depth - 1)) for i in range(depth)]
        hidden_dim = int(embed_dim * mlp_ratio)
        blocks = [
            Block(embed_dim, num_heads, FFNS[ffn](embed_dim, hidden_dim), rate, layer_scale, norm_eps, drop_path_uniform) for rate in rates
        ]
        self.blocks = _Blocks(blocks)
        self.activation_checkpointing = activation_checkpointing
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights of the blocks, positions and tokens anew."""
        # The patch embedding keeps torch's default, as in the reference.
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02 if self.mask_token is None else 1e-6)  # DINO's, DINOv2's
        if self.register_tokens is not None:
            nn.init.trunc_normal_(self.register_tokens, std=1e-6)
        if self.mask_token is not None:
            nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            if isinstance(module, LayerScale):
                module.reset_parameters()

    @property
    def prefix_tokens(self) -> int:
        """How many tokens stand before those of the patches: the class token and the registers."""
        return 1 if self.register_tokens is None else 1 + self.register_tokens.shape[1]

    @property
    def activation_checkpointing(self) -> bool:
        """Whether blocks keep their input alone for the backward pass."""
        return self.blocks.recomputed

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        self.blocks.recomputed = value

    def compile(self, **options: Any) -> None:
        """Compiles the blocks in place, whatever is asked of them; options of ``torch.compile``."""
        self.blocks.compile(**options)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) → the class token after the final norm (B, D)."""
        # The class token is all that leaves the last block: three quarters of its work, the other tokens', is left out.
        return self.norm(self.blocks(self._tokens(x), n_tokens=1)[-1][:, 0])

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """All tokens of the last ``n`` blocks, oldest first, each after the final norm: n tensors (B, T, D)."""
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"n must lie between 1 and the depth {len(self.blocks)}, got {n}")
        return [self.norm(tokens) for tokens in self.blocks(self._tokens(x), n)]

    def forward_features(self, x: Tensor, blocks: Sequence[int] = (-1,), masks: Tensor | None = None) -> list[Tokens]:
        """Images (B, C, H, W) → the tokens of ``blocks``, numbered as in Python: (-1,) is the last alone.

        Where ``masks`` (B, h·w; bool) is true, the mask token stands in for the patch; its position is added as usual.

        Raises:
            ValueError: for a block that there is not, for masks of another shape, or if there is no mask token.
        """
        depth = len(self.blocks)
        if not blocks or any(not -depth <= block < depth for block in blocks):
            raise ValueError(f"blocks must be numbers from {-depth} to {depth - 1}, got {tuple(blocks)}")
        grid = patch_grid(*x.shape[-2:], self.patch_size)
        indices = [block % depth for block in blocks]
        layers = self.blocks(self._tokens(x, masks), depth - min(indices))
        found = [self.norm(layers[index - depth]) for index in indices]
        patches = [tokens[:, self.prefix_tokens :].transpose(1, 2).unflatten(-1, grid) for tokens in found]
        return [Tokens(tokens[:, 0], places, tokens[:, 1 : self.prefix_tokens]) for tokens, places in zip(found, patches)]

    def forward_kept(self, x: Tensor, kept: Tensor) -> Tensor:
        """Images (B, C, H, W) of which only the patches ``kept`` (B, n), by their numbers, are seen → all tokens after the final norm
        (B, 1 + R + n, D): the class token, registers, and these patches in the order of ``kept``.
        """
        prefix, patches = self._tokens(x).tensor_split([self.prefix_tokens], dim=1)
        patches = patches.gather(1, kept[..., None].expand(-1, -1, self.embed_dim))
        return self.norm(self.blocks(torch.cat([prefix, patches], dim=1))[-1])

    def set_grid(self, img_size: int | Sequence[int]) -> None:
        """Interpolates the learned positions to the grid of another image size once and for all."""
        grid = patch_grid(*height_width(img_size), self.patch_size)
        with torch.no_grad():
            self.pos_embed = nn.Parameter(self._positions(*grid).clone(), self.pos_embed.requires_grad)
        self.grid = grid

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention of the last block after its softmax (B, heads, T, T); token 0 is the class token."""
        return self._last_attention(x, n_queries=None)

    def get_cls_attention(self, x: Tensor) -> Tensor:
        """Attention of the class token to the patches in the last block (B, heads, h, w), without what it pays to itself
        and to registers.

        Its memory grows with the number of patches, not with its square.
        """
        rows = self._last_attention(x, n_queries=1)[:, :, 0, self.prefix_tokens :]
        return rows.unflatten(-1, patch_grid(*x.shape[-2:], self.patch_size))

    def _last_attention(self, x: Tensor, n_queries: int | None) -> Tensor:
        x = self._tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attention(x, n_queries)

    def _tokens(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """(B, C, H, W) → (B, T, D) with positions added: class token, registers, h·w patches."""
        grid = patch_grid(*x.shape[-2:], self.patch_size)
        batch = x.shape[0]  # not len(x), which torch.export would take for a constant
        patches = self.patch_embed(x) if masks is None else self._masked(self.patch_embed(x), masks)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), patches], dim=1)
        x = x + self._positions(*grid)
        if self.register_tokens is None:
            return x
        return torch.cat([x[:, :1], self.register_tokens.expand(batch, -1, -1), x[:, 1:]], dim=1)

    def _masked(self, patches: Tensor, masks: Tensor) -> Tensor:
        """Patches (B, N, D) with the mask token where ``masks`` (B, N) is true."""
        if self.mask_token is None:
            raise ValueError("there are masks, but this VisionTransformer has no mask token; build it with mask_token=True")
        if masks.shape != patches.shape[:2] or masks.dtype != torch.bool:
            raise ValueError(
                f"masks must be bool of shape (images, patches), here {tuple(patches.shape[:2])}, got {masks.dtype} {tuple(masks.shape)}"
            )
        return torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)

    def _positions(self, h: int, w: int) -> Tensor:
        """Learned positions for a grid of h × w patches (1, 1 + h·w, D)."""
        if (h, w) == self.grid:
            return self.pos_embed
        return interpolate_positions(self.pos_embed, self.grid, (h, w), self.position_offset, self.position_antialias)


class _Blocks(nn.ModuleList):
    """The transformer's blocks, one after the other."""

    recomputed = False

    def forward(self, x: Tensor, n: int = 1, n_tokens: int | None = None) -> list[Tensor]:
        """(B, T, D) → what the last ``n`` blocks give, oldest first; the last one only for the first ``n_tokens``, or for all."""
        layers = []
        for i, block in enumerate(self, start=1):
            asked = n_tokens if i == len(self) else None
            if self.recomputed and torch.is_grad_enabled():
                x = checkpoint(block, x, asked, use_reentrant=False)  # with the random numbers of its first pass
            else:
                x = block(x, asked)
            if i > len(self) - n:
                layers.append(x)
        return layers


class _PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, h·w, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """(h, w) patches of an image of this size in pixels.

    Raises:
        ValueError: if the patches do not divide it, with the nearest size that they do.
    """
    if height % patch_size or width % patch_size or not height or not width:
        near = tuple(max(1, round(side / patch_size)) * patch_size for side in (height, width))
        raise ValueError(
            f"the patch size {patch_size} does not divide the image size {height}×{width}; the nearest that fits is {near[0]}×{near[1]}"
        )
    return height // patch_size, width // patch_size
