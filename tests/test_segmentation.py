"""Pixels and objects found by patch features, against the definitions."""

import numpy as np
import pytest
import torch

from dino_lightning.evaluation.segmentation import Confusion, LinearSegmenter, box_iou, corloc, discover_object


def test_mean_iou_is_its_definition():
    random = torch.Generator().manual_seed(0)
    confusion, pairs = Confusion(5), []
    for _ in range(3):
        found, truth = torch.randint(0, 4, (7, 9), generator=random), torch.randint(0, 4, (7, 9), generator=random)
        truth[0] = 255
        confusion.update(found, truth)
        pairs += [(f, t) for f, t in zip(found.flatten().tolist(), truth.flatten().tolist()) if t != 255]
    expected = [sum(f == t == c for f, t in pairs) / sum(c in (f, t) for f, t in pairs) for c in range(4)]
    assert confusion.iou()[:4].tolist() == pytest.approx(expected) and confusion.iou()[4].isnan()
    assert confusion.mean_iou() == pytest.approx(np.mean(expected))
    with pytest.raises(ValueError, match="classes must be at least 1"):
        Confusion(0)


def test_a_linear_classifier_of_patches_learns_what_is_linear():
    random = torch.Generator().manual_seed(0)
    patches = torch.randn(8, 6, 4, 5, generator=random)
    truth = patches[:, :3].argmax(dim=1)
    network = LinearSegmenter(6, 3).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(patches, (4, 5)), truth).backward()
        optimizer.step()
    assert (network.eval()(patches, (4, 5)).argmax(dim=1) == truth).float().mean() > 0.95
    assert network(patches, (16, 20)).shape == (8, 3, 16, 20)


def test_the_object_is_what_differs_and_hangs_together():
    random = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 32, generator=random)
    truth = np.zeros((10, 12), bool)
    truth[3:7, 2:6] = True
    other = truth.copy()
    other[9, 11] = True  # alike, but elsewhere
    features = kinds[torch.from_numpy(other).long()].permute(2, 0, 1) + 0.05 * torch.randn(32, 10, 12, generator=random)
    found = discover_object(features)
    assert np.array_equal(found.mask, truth) or found.mask.sum() == 1, "unless the seed is the one elsewhere"
    assert np.array_equal(discover_object(features[:, :9]).mask, truth[:9]) and discover_object(features[:, :9]).box == (2, 3, 6, 7)
    with pytest.raises(ValueError, match="expected features"):
        discover_object(features[None])


def test_boxes():
    assert box_iou((0, 0, 4, 4), (2, 2, 6, 6)) == pytest.approx(4 / 28) and box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    found, truths = [(0, 0, 4, 4), (0, 0, 2, 2), (0, 0, 9, 9)], [[(9, 9, 12, 12), (0, 0, 4, 5)], [(0, 0, 4, 4)], []]
    assert corloc(found, truths) == 0.5
    with pytest.raises(ValueError, match="no image has a true box"):
        corloc(found[:1], [[]])
