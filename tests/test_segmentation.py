"""Pixels and objects found by patch features, against the definitions."""

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lightning.evaluation.segmentation import Confusion, LinearSegmenter, box_iou, corloc, discover_object
from dino_lightning.tools import segment


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
    assert np.array_equal(discover_object(features[:, :9]).mask, truth[:9]) and discover_object(features[:, :9]).box == (2, 3, 6, 7)
    with pytest.raises(ValueError, match="expected features"):
        discover_object(features[None])


def test_boxes():
    assert box_iou((0, 0, 4, 4), (2, 2, 6, 6)) == pytest.approx(4 / 28) and box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    found, truths = [(0, 0, 4, 4), (0, 0, 2, 2), (0, 0, 9, 9)], [[(9, 9, 12, 12), (0, 0, 4, 5)], [(0, 0, 4, 4)], []]
    assert corloc(found, truths) == 0.5
    with pytest.raises(ValueError, match="no image has a true box"):
        corloc(found[:1], [[]])


def write_set(root, images, masks, shift=0):
    """Left halves of one colour, right halves of another, with a border that does not count."""
    rng = np.random.default_rng(0)
    for split in range(2):
        images[split].mkdir(parents=True, exist_ok=True), masks[split].mkdir(parents=True, exist_ok=True)
        for i in range(8 - 3 * split):
            edge = int(rng.integers(12, 36))
            pixels, mask = np.zeros((32, 48, 3), np.uint8), np.zeros((32, 48), np.uint8)
            pixels[:, :edge], pixels[:, edge:], mask[:, edge:] = (200, 30, 30), (30, 60, 220), 1
            mask[:, edge - 1 : edge + 1] = 255
            Image.fromarray(pixels).save(images[split] / f"{split}{i}.jpg", quality=95)
            mask += np.uint8(shift)  # of ADE20K, whose 255 became 0; neither counts
            mask[:, edge] = 255
            Image.fromarray(mask).save(masks[split] / f"{split}{i}.png")
    return root


def test_segmentation_of_the_usual_layouts(tmp_path, small_checkpoint, capsys):
    voc = write_set(tmp_path / "voc", [tmp_path / "voc/JPEGImages"] * 2, [tmp_path / "voc/SegmentationClass"] * 2)
    lists = voc / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, name in enumerate(("train", "val")):
        (lists / f"{name}.txt").write_text("\n".join(sorted(p.stem for p in (voc / "JPEGImages").glob(f"{split}*.jpg"))))
    ade, own = tmp_path / "ade", tmp_path / "own"
    write_set(ade, *([ade / part / split for split in ("training", "validation")] for part in ("images", "annotations")), shift=1)
    write_set(own, *([own / part / split for split in ("train", "val")] for part in ("images", "masks")))
    found = [segment(small_checkpoint, str(root), lr=0.05, batch_size=3, seed=2)["trained"] for root in (voc, ade, own)]
    assert found[0] == found[1] == found[2] and len(found[0][1]) == 2
    assert found[0][0] == pytest.approx(np.mean(found[0][1])) and found[0][0] > 0.7, "colours alone tell the halves"
    said = capsys.readouterr().out
    assert "Pascal VOC: 8 images to learn from, 5 to measure, 2 classes, 64×64 pixels" in said and "ADE20K" in said
    (own / "masks" / "val" / "10.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 images or masks are missing, such as .*10.png"):
        segment(small_checkpoint, str(own))
    with pytest.raises(FileNotFoundError, match="has none of the layouts"):
        segment(small_checkpoint, str(tmp_path))
