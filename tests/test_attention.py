"""Attention maps, masks and overlaps; generated scenes; features."""

import numpy as np
import pytest
import torch

from dino_lightning import VisionTransformer
from dino_lightning.data import Scenes
from dino_lightning.evaluation.attention import best_head_iou, mass_mask
from dino_lightning.evaluation.features import extract_features, raw_pixels


def test_attention_of_the_class_token_at_any_size():
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2).eval()
    images = torch.randn(3, 3, 32, 48)
    maps = vit.get_cls_attention(images)
    assert maps.shape == (3, 2, 4, 6)
    whole = vit.get_last_selfattention(images)  # (B, heads, T, T), products of another shape, rounded otherwise
    torch.testing.assert_close(maps, whole[:, :, 0, 1:].unflatten(-1, (4, 6)), rtol=1e-5, atol=1e-7)


def test_mask_is_the_fewest_patches_with_the_mass():
    attention = torch.tensor([[0.4, 0.1], [0.3, 0.2]])
    assert mass_mask(attention, 0.6).tolist() == [[True, False], [True, False]]
    assert mass_mask(attention, 0.4).tolist() == [[True, False], [False, False]]
    assert mass_mask(attention * 7, 0.71).tolist() == [[True, False], [True, True]], "maps need not sum to one"
    assert mass_mask(attention, 1.0).all()
    random = torch.rand(5, 3, 6, 7)
    masks = mass_mask(random, 0.6)
    held = (random * masks).sum(dim=(-2, -1)) / random.sum(dim=(-2, -1))
    assert (held >= 0.6).all() and masks.float().mean() < 0.6
    with pytest.raises(ValueError, match="mass must lie in"):
        mass_mask(attention, 0.0)


def test_best_head_iou():
    attention = torch.zeros(2, 2, 4, 4)
    attention[0, 0, :2, :2] = 1.0  # a quarter of the image
    attention[0, 1, 2:, 2:] = 1.0
    attention[1, :, 0, 0] = 1.0
    truth = torch.zeros(2, 8, 8, dtype=torch.bool)
    truth[:, :4, :4] = True
    assert best_head_iou(attention, truth, mass=1.0).tolist()[0] == 1.0
    assert best_head_iou(attention, truth, mass=0.5).tolist() == [0.5, 0.25]
    with pytest.raises(ValueError, match="at least one pixel"):
        best_head_iou(attention, torch.zeros(2, 8, 8, dtype=torch.bool))


def test_scenes_are_a_function_of_their_index():
    scenes, later = Scenes(50), Scenes(10, first=40)
    assert len(scenes) == 50
    for i in (0, 41, 49):
        image, label = scenes[i]
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and 0 <= label < Scenes.n_classes
    assert np.array_equal(scenes[41][0], later[1][0]) and not np.array_equal(scenes[0][0], scenes[1][0])
    assert {Scenes(400)[i][1] for i in range(400)} == set(range(16)), "all classes appear"
    with pytest.raises(IndexError, match="scene 50 of 50"):
        scenes[50]


def test_the_mask_of_a_scene_is_where_its_colour_is():
    scenes = Scenes(30)
    for i in range(30):
        image, mask = scenes[i][0].astype(int), scenes.mask(i)
        assert 0.1 < mask.mean() < 0.4
        colour = image.max(axis=2) - image.min(axis=2)
        assert np.median(colour[mask]) > 2 * np.median(colour[~mask])


def test_features_of_a_source_in_order():
    scenes = Scenes(10, side=32)
    features, labels = extract_features(raw_pixels, scenes, size=(32, 32), batch_size=4)
    assert features.shape == (10, 3 * 32 * 32) and labels.tolist() == [scenes[i][1] for i in range(10)]
    again, _ = extract_features(raw_pixels, scenes, size=(32, 32), batch_size=3, num_workers=2)
    assert torch.equal(features, again)


def test_scenes_as_tensors():
    scenes = Scenes(3, first=7, side=32)
    images, labels, masks = scenes.tensors()
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8 and masks.shape == (3, 32, 32)
    for i in range(3):
        assert np.array_equal(images[i].permute(1, 2, 0).numpy(), scenes[i][0]) and labels[i] == scenes[i][1]
        assert np.array_equal(masks[i].numpy(), scenes.mask(i))
