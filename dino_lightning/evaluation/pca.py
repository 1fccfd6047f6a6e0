"""Principal components of patch features as colours: places with similar features look similar, in all images."""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

_COMPONENTS = 3
_DARK, _BRIGHT = 2, 98  # percentiles of a component over all patches


def pca_rgb(features: Sequence[Tensor]) -> list[Tensor]:
    """The first three principal components of the patches of all images together, as red, green and blue.

    So equal features get equal colours in all images. The first component alone, as a map, is ``[..., 0]``. A component
    runs from 0 at its 2nd percentile over all patches to 1 at its 98th; one that does not vary is 0.5 everywhere.

    Principal components have no sign of their own. Here the first is greater in the middle of the images than towards
    their borders (by a Gaussian around the centre), since objects stand there more often; the side of the fewer patches,
    by the skewness, is the bright one of the others.

    Args:
        features: of each image (D, h, w), of any h and w; also a tensor (B, D, h, w). They are gone through one by one;
            beside them at most D × D numbers are kept.

    Returns:
        Of each image (h, w, 3) in [0, 1], float32.

    Raises:
        ValueError: if there are none, or they are not finite.
    """
    if not len(features):
        raise ValueError("there are no features to find principal components of; give those of at least one image")
    count = sum(image[0].numel() for image in features)
    mean = reduce(torch.add, (image.float().sum(dim=(1, 2)) for image in features)) / count
    axes = _axes(features, mean, count)
    components = [torch.einsum("dhw,dc->hwc", image.float() - mean[:, None, None], axes) for image in features]
    values = torch.cat([image.flatten(0, 1) for image in components])
    middle = torch.cat([_centre_weight(*image.shape[:2]).flatten() for image in components]).to(values)
    toward = (values**3).sum(dim=0)
    toward[0] = values[:, 0] @ (middle - middle.mean())
    signs = torch.where(toward < 0, -1.0, 1.0)
    dark, bright = torch.from_numpy(np.percentile((values * signs).cpu().numpy(), (_DARK, _BRIGHT), axis=0)).to(values)
    # What is left of equal features by rounding is no component.
    varies = bright - dark > 1e-5 * mean.norm()
    span = torch.where(varies, bright - dark, 1.0)
    return [torch.where(varies, ((image * signs - dark) / span).clamp(0, 1), 0.5) for image in components]


def _axes(features: Sequence[Tensor], mean: Tensor, count: int) -> Tensor:
    """The directions of the greatest variance (D, 3), greatest first; zeros where there are fewer."""
    centered = (image.float().flatten(1) - mean[:, None] for image in features)  # (D, patches)
    if count <= len(mean):
        together = torch.cat(list(centered), dim=1)
        axes = together @ _leading(together.T @ together)  # the smaller problem with the same variances
        axes = axes / axes.norm(dim=0).clamp(min=1e-12)
    else:
        axes = _leading(reduce(torch.add, (patches @ patches.T for patches in centered)))
    return torch.nn.functional.pad(axes, (0, _COMPONENTS - axes.shape[1]))


def _leading(gram: Tensor) -> Tensor:
    """The eigenvectors (n, ≤ 3) of a symmetric matrix (n, n) that belong to its greatest eigenvalues, in falling order."""
    if not gram.isfinite().all():
        raise ValueError("the features are not finite, or too large to be squared: the weights are damaged, or of a run that diverged")
    return torch.linalg.eigh(gram.cpu()).eigenvectors[:, -_COMPONENTS:].flip(1).to(gram.device)


def _centre_weight(height: int, width: int) -> Tensor:
    """(h, w), 1 in the middle and less towards the borders."""
    y, x = (2 * (torch.arange(side) + 0.5) / side - 1 for side in (height, width))
    return torch.exp(-(y[:, None] ** 2) - x**2)
