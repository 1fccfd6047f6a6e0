"""NT-Xent, the loss of SimCLR (Chen et al. 2020, equation 1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.losses.precision import full, without_autocast
from dino_lightning.losses.ranks import gather, rank


class NTXentLoss(nn.Module):
    """An image's other view must be picked out of all other views of the batch, over all ranks.

    In float32 whatever the autocast. On n ranks the mean of the losses, and its gradient as DistributedDataParallel averages it,
    are those of one process with the n batches.

    Args:
        temperature: of the softmax over cosines.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The mean cross-entropy of projections (B, D) of two views each of B images, not normalised.

        Raises:
            ValueError: if they are not (B, D), both.
        """
        if first.dim() != 2 or first.shape != second.shape:
            raise ValueError(f"expected the projections (B, D) of two views, got {tuple(first.shape)} and {tuple(second.shape)}")
        with without_autocast(first.device):
            first, second = (F.normalize(full(view), dim=1) for view in (first, second))
            views = torch.cat([gather(first), gather(second)])  # (2·n·B, D)
            logits = torch.cat([first, second]) @ views.T / self.temperature  # (2·B, 2·n·B)
            own = rank() * len(first) + torch.arange(len(first), device=first.device)
            own = torch.cat([own, own + len(views) // 2])  # where each view is among all
            itself = own[:, None] == torch.arange(len(views), device=first.device)
            return F.cross_entropy(logits.masked_fill(itself, -torch.inf), own.roll(len(first)))
