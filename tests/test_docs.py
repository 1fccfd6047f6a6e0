"""What the documentation shows works."""

import runpy
from pathlib import Path

import torch
from torch import nn

DOCS = Path(__file__).parents[1] / "docs"


def test_a_segmentation_head_learns_on_the_frozen_backbone(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(DOCS / "segmentation.py"))
    assert 0 <= example["main"](small_checkpoint, epochs=1) <= 1
    assert not list(tmp_path.iterdir())


def test_its_segments_are_where_the_patches_say_so():
    """A backbone whose only channel is the brightness of a patch: the object can be told by it."""
    example = runpy.run_path(str(DOCS / "segmentation.py"))

    class Brightness(nn.Module):
        embed_dim = 1

        def forward_features(self, images, blocks):
            patches = nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 8)
            return [type("Tokens", (), {"patches": patches}) for _ in blocks]

    segmenter = example["Segmenter"](Brightness())
    nn.init.ones_(segmenter.head.weight)
    nn.init.zeros_(segmenter.head.bias)
    images = torch.full((1, 3, 32, 32), -1.0)
    images[..., :16, :16] = 1.0
    found = segmenter(images)[0, 0] > 0
    assert found[:14, :14].all() and not found[18:].any() and not found[:, 18:].any()
