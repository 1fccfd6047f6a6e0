"""What patch tokens know of objects: a linear classifier on those of frozen backbones segments generated scenes it never saw.

    python benchmarks/patches.py CHECKPOINT...

For each checkpoint a line: mean IoU of the object over 512 scenes, with a logistic regression (L-BFGS, L2 1e-4) on the normalised patch
tokens of the last block of 512 other scenes, shown at twice their size (16×16 patches of 8 pixels), beside the same of the untrained
network. (What its class token knows, the quickstarts print.)
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_lightning import load_backbone
from dino_lightning.backbones import redrawn
from dino_lightning.data import Scenes
from dino_lightning.data.painting import IMAGENET_MEAN, IMAGENET_STD, normalize

TRAIN, TEST = (512, 10**6), (512, 2 * 10**6)  # count and first scene


@torch.no_grad()
def patch_tokens(backbone: nn.Module, images: Tensor) -> Tensor:
    """Of scenes at twice their size (N, D, h, w)."""
    large = F.interpolate(images, scale_factor=2, mode="bicubic", antialias=True)
    chunks = [normalize(chunk, IMAGENET_MEAN, IMAGENET_STD) for chunk in large.split(128)]
    return torch.cat([backbone.forward_features(chunk)[0].patches for chunk in chunks])


def segmentation_iou(backbone: nn.Module, train: tuple[Tensor, ...], test: tuple[Tensor, ...]) -> float:
    tokens, masks = patch_tokens(backbone, train[0]), train[2]
    targets = F.adaptive_avg_pool2d(masks.float()[:, None], tokens.shape[-2:]).flatten()  # share of a patch that is the object
    rows = tokens.permute(0, 2, 3, 1).flatten(0, 2)
    mean, std = rows.mean(dim=0), rows.std(dim=0) + 1e-6
    rows = (rows - mean) / std
    weight, bias = torch.zeros(rows.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(rows @ weight + bias, targets) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        tokens = (patch_tokens(backbone, test[0]) - mean[:, None, None]) / std[:, None, None]
        logits = torch.einsum("ndhw,d->nhw", tokens, weight) + bias
        found = F.interpolate(logits[:, None], test[2].shape[-2:], mode="bilinear")[:, 0] > 0
    return ((found & test[2]).sum(dim=(1, 2)) / (found | test[2]).sum(dim=(1, 2))).mean().item()


if __name__ == "__main__":
    train, test = (Scenes(count, first).tensors() for count, first in (TRAIN, TEST))
    print(f"{'patch IoU':>10}{'untrained':>10}  checkpoint")
    for checkpoint in sys.argv[1:]:
        backbone = load_backbone(checkpoint)
        patches, untrained = (segmentation_iou(network, train, test) for network in (backbone, redrawn(backbone)))
        print(f"{patches:10.3f}{untrained:10.3f}  {checkpoint}", flush=True)
