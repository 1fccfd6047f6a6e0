"""InfoNCE between queries and keys of one batch, the loss of MoCo v3 (Chen et al. 2021, section 3 and algorithm 1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.losses.precision import full, without_autocast
from dino_lightning.losses.ranks import gather, rank


class InfoNCELoss(nn.Module):
    """The key of an image's other view is to be told from those of all other images, over all ranks.

    In float32 whatever the autocast. The cross-entropy is multiplied by twice the temperature, as in the paper: the gradient does
    not grow as the temperature falls.

    Args:
        temperature: of the softmax over cosines.
    """

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The mean loss of queries (B, D) of one view and keys (B, D) of the other, not normalised; keys get no gradient.

        Raises:
            ValueError: if they are not (B, D), both.
        """
        if queries.dim() != 2 or queries.shape != keys.shape:
            raise ValueError(f"expected queries and keys (B, D), got {tuple(queries.shape)} and {tuple(keys.shape)}")
        with without_autocast(queries.device):
            queries, keys = F.normalize(full(queries), dim=1), F.normalize(full(keys.detach()), dim=1)
            logits = queries @ gather(keys).T / self.temperature  # (B, n·B)
            own = rank() * len(queries) + torch.arange(len(queries), device=queries.device)
            return 2 * self.temperature * F.cross_entropy(logits, own)
