"""What patch tokens know of objects: a linear classifier on those of frozen backbones segments generated scenes it never saw.

    python benchmarks/patches.py CHECKPOINT...

For each checkpoint a line: mean IoU of the object over 512 scenes, with a logistic regression (L-BFGS, L2 1e-4) on the normalised patch
tokens of the last block of 512 other scenes, shown at twice their size (16×16 patches of 8 pixels); beside it the same of the
untrained network and, without any, the k-NN accuracy of the class token (1,024 scenes vote, k 20) and the overlap of its attention.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_lightning import load_backbone
from dino_lightning.backbones import redrawn
from dino_lightning.data import Scenes
from dino_lightning.data.painting import IMAGENET_MEAN, IMAGENET_STD, normalize
from dino_lightning.evaluation import knn_accuracy
from dino_lightning.evaluation.attention import best_head_iou

TRAIN, TEST, BANK = (512, 10**6), (512, 2 * 10**6), (1024, 0)  # count and first scene


@torch.no_grad()
def chunks(images: Tensor, scale: int) -> list[Tensor]:
    large = F.interpolate(images.float(), scale_factor=scale, mode="bicubic", antialias=True).clamp(0, 255).round().byte()
    return [normalize(chunk, IMAGENET_MEAN, IMAGENET_STD) for chunk in large.split(128)]


@torch.no_grad()
def patch_tokens(backbone: nn.Module, images: Tensor) -> Tensor:
    """(N, D, h, w)."""
    return torch.cat([backbone.forward_features(chunk)[0].patches for chunk in chunks(images, 2)])


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


@torch.no_grad()
def class_token(backbone: nn.Module, bank: tuple[Tensor, ...], test: tuple[Tensor, ...]) -> tuple[float, float]:
    """k-NN accuracy, and overlap of the best head's attention."""
    features = [torch.cat([backbone(chunk) for chunk in chunks(images, 1)]) for images in (bank[0], test[0])]
    accuracy, _ = knn_accuracy(features[0], bank[1], features[1], test[1], k=20)
    attention = torch.cat([backbone.get_cls_attention(chunk) for chunk in chunks(test[0], 2)])
    return accuracy, best_head_iou(attention, test[2]).mean().item()


if __name__ == "__main__":
    train, test, bank = (Scenes(count, first).tensors() for count, first in (TRAIN, TEST, BANK))
    print(f"{'patch IoU':>10}{'untrained':>10}{'k-NN':>8}{'attention IoU':>15}  checkpoint")
    for checkpoint in sys.argv[1:]:
        backbone = load_backbone(checkpoint)
        accuracy, attention = class_token(backbone, bank, test)
        patches, untrained = segmentation_iou(backbone, train, test), segmentation_iou(redrawn(backbone), train, test)
        print(f"{patches:10.3f}{untrained:10.3f}{accuracy:8.3f}{attention:15.3f}  {checkpoint}", flush=True)
