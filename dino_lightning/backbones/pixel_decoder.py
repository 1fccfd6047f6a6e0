"""MAE's decoder: from the tokens of the patches that were seen to the pixels of all (He et al. 2022, section 3)."""

import torch
from torch import Tensor, nn

from dino_lightning.backbones.block import FFNS, Block
from dino_lightning.backbones.positions import sincos_positions


class PixelDecoder(nn.Module):
    """Tokens (B, R + n, D) of R others and of n patches → pixels of all N patches (B, N, p·p·C). A shared token stands for those
    that are missing.

    Args:
        in_dim: width D of the encoder's tokens.
        pixels: p·p·C of a patch.
        grid: (h, w) patches of an image, N = h·w.
        dim: width of the decoder.
        depth: its blocks.
        num_heads: attention heads of a block; must divide ``dim``.
    """

    def __init__(self, in_dim: int, pixels: int, grid: tuple[int, int], dim: int = 512, depth: int = 8, num_heads: int = 16) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"decoder_heads={num_heads} does not divide decoder_dim={dim}")
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions(grid, dim)[:, 1:], persistent=False)
        self.blocks = nn.Sequential(*[Block(dim, num_heads, FFNS["mlp"](dim, 4 * dim), 0.0, None, 1e-6) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, pixels)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """
        Args:
            tokens: (B, R + n, D): R tokens that are no patches, then those of the patches ``kept``.
            kept: (B, n), which patches these are.
        """
        x = self.embed(tokens)
        others, patches = x.split([x.shape[1] - kept.shape[1], kept.shape[1]], dim=1)
        every = self.mask_token.to(x.dtype).expand(len(x), self.positions.shape[1], -1)
        every = every.scatter(1, kept[..., None].expand_as(patches), patches) + self.positions
        x = self.blocks(torch.cat([others.to(every.dtype), every], dim=1))
        return self.predict(self.norm(x[:, others.shape[1] :]))
