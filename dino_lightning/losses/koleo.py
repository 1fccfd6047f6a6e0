"""KoLeo: the features of a batch keep apart, by Kozachenko and Leonenko's estimate of their entropy (Sablayrolles et al. 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.losses.precision import full, without_autocast


class KoLeoLoss(nn.Module):
    """−mean log of the distance of each feature to its nearest neighbour in the batch, on the unit sphere.

    Always in float32 (float64 stays) whatever the autocast, so that it is finite for equal images too: half precision rounds the
    1e-8 beside a distance of 0 away. Equal images add to the loss, but have no direction to part in, and so no gradient on each
    other (the 1e-8 would make one, of rounding, which overflows in half precision). The neighbours are those of this process.

    Attributes:
        distance: scalar, the mean distance to the nearest neighbour in the last call; None before it and where there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.distance: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        """The loss of features (B, D) of one view each of B images. A batch of one has no neighbour, and a loss of 0.

        Raises:
            ValueError: if the features are not (B, D).
        """
        if features.dim() != 2:
            raise ValueError(f"expected features (B, D) of one view, got {tuple(features.shape)}")
        if len(features) < 2:
            self.distance = None
            return 0 * full(features).sum()
        with without_autocast(features.device):
            x = F.normalize(full(features), eps=1e-8, dim=-1)
            with torch.no_grad():
                nearest = (x @ x.T).fill_diagonal_(-torch.inf).argmax(dim=1)
            neighbours = x.index_select(0, nearest)  # not detached: both ends of a pair move
            distances = F.pairwise_distance(x, neighbours, eps=1e-8)
            self.distance = distances.detach().mean()
            apart = (x != neighbours).any(dim=1)
            return -(torch.where(apart, distances, distances.detach()) + 1e-8).log().mean()
