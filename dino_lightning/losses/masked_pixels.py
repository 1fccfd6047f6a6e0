"""The loss of MAE: the pixels of the patches that were not seen (He et al. 2022, section 3)."""

import torch
from torch import Tensor, nn

from dino_lightning.losses.precision import full, without_autocast


class MaskedPixelsLoss(nn.Module):
    """Mean squared error of the masked patches' pixels, each patch normalised to mean 0 and variance 1 (unbiased) where ``normalize``."""

    def __init__(self, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, predictions: Tensor, images: Tensor, masks: Tensor) -> Tensor:
        """The mean over all masked patches, a scalar.

        Args:
            predictions: (B, N, p·p·C), of every patch, row by row; a patch's pixels are in the order (row, column, channel).
            images: (B, C, H, W), of N patches.
            masks: bool (B, N), true where a patch was not seen; each image has the same number of them, at least one.

        Raises:
            ValueError: if the numbers of patches or pixels do not fit.
        """
        patch = round((predictions.shape[-1] / images.shape[1]) ** 0.5)
        height, width = images.shape[-2:]
        are_pixels = patch > 0 and patch**2 * images.shape[1] == predictions.shape[-1] and not height % patch and not width % patch
        if not are_pixels or predictions.shape[:2] != masks.shape or predictions.shape[1] != (height // patch) * (width // patch):
            raise ValueError(
                f"predictions {tuple(predictions.shape)}, images {tuple(images.shape)} and masks {tuple(masks.shape)} do not fit; "
                "expected (B, N, p·p·C), (B, C, H, W) and (B, N)"
            )
        with without_autocast(predictions.device):
            targets = patches_of(full(images), patch)
            if self.normalize:
                variance, mean = torch.var_mean(targets, dim=-1, keepdim=True)
                targets = (targets - mean) / (variance + 1e-6).sqrt()
            errors = (full(predictions) - targets).square().mean(dim=-1)  # (B, N)
            return (errors * masks).sum() / masks.sum()


def patches_of(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) → (B, N, p·p·C): patches row by row, and within one (row, column, channel)."""
    return images.unflatten(2, (-1, patch)).unflatten(4, (-1, patch)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
