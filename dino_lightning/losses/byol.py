"""The loss of BYOL (Grill et al. 2020, equation 2)."""

import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.losses.precision import full, without_autocast


class BYOLLoss(nn.Module):
    """The squared distance of predictions and targets on the unit sphere, 2 − 2·cos: 0 if they agree, 4 if they are opposite."""

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Predictions (B, D) of the student, targets (B, D) of the teacher, which get no gradient → the mean over the batch.

        Raises:
            ValueError: if they are not (B, D), both.
        """
        if predictions.dim() != 2 or predictions.shape != targets.shape:
            raise ValueError(f"expected predictions and targets (B, D), got {(*predictions.shape,)} and {(*targets.shape,)}")
        with without_autocast(predictions.device):
            return 2 - 2 * F.cosine_similarity(full(predictions), full(targets.detach()), dim=1).mean()
