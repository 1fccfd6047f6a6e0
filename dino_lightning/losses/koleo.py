"""KoLeo: spreads the features of a batch by their distance to the nearest neighbour (Sablayrolles et al. 2019; DINOv2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPS = 1e-8


class KoLeoLoss(nn.Module):
    """−mean log of the distance between each L2-normalised feature and its nearest neighbour, within the batch of this process.

    In float32 whatever the autocast: in half precision its epsilon would be 0. So it is finite for equal features (about 16), whose
    gradient then is large, as the reference's is. A single feature has no neighbour: the loss is 0, and so is its gradient.

    Attributes:
        distance: scalar, the mean distance in the last call, at most 2; None before it, and without neighbours.
    """

    def __init__(self) -> None:
        super().__init__()
        self.distance: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) of one view → scalar. Views of one image must not meet here: they would repel each other."""
        self.distance = None
        if len(features) < 2:
            return 0 * features.float().sum()
        with torch.autocast(features.device.type, enabled=False):
            features = features if features.dtype == torch.float64 else features.float()
            x = F.normalize(features, eps=_EPS)
            with torch.no_grad():
                nearest = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
            distances = F.pairwise_distance(x, x[nearest], eps=_EPS)
            self.distance = distances.detach().mean()
            return -(distances + _EPS).log().mean()
