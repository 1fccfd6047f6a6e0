"""Features on the grid of an image and maps of them, of any backbone; their principal components as colours."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from dino_lightning import VisionTransformer
from dino_lightning.backbones import build
from dino_lightning.evaluation.pca import pca_rgb
from dino_lightning.evaluation.spatial import NoSpatialMapError, last_feature_map, spatial_features, spatial_maps


def two_kinds(*grids, width=8):
    """Features of images (D, h, w): a square of one kind in the middle, another kind around it, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, width, generator=generator)
    images, insides = [], []
    for h, w in grids:
        inside = torch.zeros(h, w, dtype=torch.bool)
        inside[h // 3 : -(h // 3), w // 3 : -(w // 3)] = True
        noise = 0.05 * torch.randn(width, h, w, generator=generator)
        images.append(torch.where(inside, kinds[0][:, None, None], kinds[1][:, None, None]) + noise)
        insides.append(inside)
    return images, insides


@pytest.mark.parametrize("width", [8, 300])  # fewer and more than there are patches
def test_the_first_component_is_bright_in_the_middle_and_colours_are_equal_across_images(width):
    images, insides = two_kinds((9, 9), (6, 12), width=width)
    for turned in (1, -1):  # no sign of the features changes what is bright
        colors = pca_rgb([turned * image for image in images])
        for rgb, inside in zip(colors, insides):
            assert rgb.shape == (*inside.shape, 3) and rgb.dtype == torch.float32 and 0 <= rgb.min() <= rgb.max() <= 1
            first = rgb[..., 0]
            assert first[inside].min() > 0.8 > 0.2 > first[~inside].max()
        assert (colors[0][insides[0]][:, 0].mean() - colors[1][insides[1]][:, 0].mean()).abs() < 0.02


def test_components_are_those_of_all_patches_together():
    """Against the singular value decomposition of all patches, up to the sign and the scale of the picture."""
    images = [torch.randn(6, 5, 4) * torch.tensor([5.0, 3, 2, 1, 1, 1])[:, None, None] + 10 for _ in range(3)]
    patches = torch.cat([image.flatten(1).T for image in images])
    expected = (patches - patches.mean(dim=0)) @ torch.linalg.svd(patches - patches.mean(dim=0)).Vh[:3].T
    for chunks in (images, torch.stack(images), [torch.cat(images, dim=1)]):
        found = torch.cat([rgb.flatten(0, 1) for rgb in pca_rgb(chunks)])
        for component in range(3):
            inner = (found[:, component] > 0) & (found[:, component] < 1)  # the rest is beyond the percentiles
            pair = torch.stack([found[inner, component], expected[inner, component]])
            assert torch.corrcoef(pair)[0, 1].abs() > 0.99999 and inner.float().mean() > 0.9


def test_the_brighter_side_of_the_other_components_is_the_smaller_one():
    features = torch.zeros(3, 10, 10)
    features[0, 2:8, 2:8] = 10  # in the middle
    for value in (1.0, -1.0):
        features[1] = 0
        features[1, :, :2] = value  # the fewer patches
        assert (pca_rgb([features])[0][:, 0, 1] > pca_rgb([features])[0][:, 5, 1]).all()


def test_a_single_outlier_does_not_darken_the_rest():
    (image,), (inside,) = two_kinds((12, 12))
    image[:, 6, 6] *= 3
    first = pca_rgb([image])[0][..., 0]
    assert first[inside].median() - first[~inside].median() > 0.7


@pytest.mark.parametrize("shape", [(5, 4, 4), (5, 1, 1), (1, 3, 3), (40, 2, 2)])
def test_equal_patches_are_gray(shape):
    for value in (0.0, 0.1, 1e4):
        (rgb,) = pca_rgb([torch.full(shape, value)])
        assert rgb.shape == (*shape[1:], 3) and (rgb == 0.5).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_features_of_damaged_weights_are_named(value):
    with pytest.raises(ValueError, match="not finite, or too large"):
        pca_rgb(torch.randn(2, 8, 3, 3) * value)


def test_two_kinds_of_patches_have_one_component():
    features = torch.zeros(2, 8, 4, 4)
    features[:, :, 1:3, 1:3] = 1.3
    rgb = torch.stack(pca_rgb(features))
    assert (rgb[..., 1:] == 0.5).all() and (rgb[:, 1:3, 1:3, 0] == 1).all() and (rgb[:, 0, :, 0] == 0).all()
    with pytest.raises(ValueError, match="at least one image"):
        pca_rgb([])


def test_maps_and_features_of_a_vit():
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2).eval()
    images = torch.randn(2, 3, 32, 48)
    maps, names, _ = spatial_maps(vit, images)
    assert torch.equal(maps, vit.get_cls_attention(images)) and names == ["head 1", "head 2"]
    features = spatial_features(vit, images)
    (tokens,) = vit.get_intermediate_layers(images)
    assert features.shape == (2, 24, 4, 6) and torch.equal(features[1, :, 2, 3], tokens[1, 1 + 2 * 6 + 3])


def test_the_last_feature_map_of_a_resnet_and_its_norm():
    network = resnet18().train()
    network.fc = nn.Identity()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(2, 3, 64, 96)
    features = spatial_features(network, images)
    assert network.training and all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()), "no statistics are updated"
    assert not any(module._forward_hooks for module in network.modules())
    pooled = network.eval()(images)
    assert features.shape == (2, 512, 2, 3) and not features.requires_grad
    torch.testing.assert_close(features.mean(dim=(2, 3)), pooled)
    maps, names, what = spatial_maps(network, images)
    assert names == ["feature norm"] and torch.equal(maps, features.norm(dim=1, keepdim=True))


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(dim=(1, 2))


class Tokens(nn.Module):
    """A transformer of somebody else's: a convolution, then tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.embed(x).flatten(2).transpose(1, 2)).mean(dim=1)


def test_the_last_feature_map_of_other_modules():
    images = torch.rand(2, 3, 64, 64)
    last = nn.Sequential(nn.Conv2d(3, 12, 8, 8), ChannelsLast(), nn.LayerNorm(12), Mean())
    found = last_feature_map(last, images)
    torch.testing.assert_close(found.mean(dim=(2, 3)), last(images))
    for name, grid in (("mobilenet_v3_small", 2), ("squeezenet1_1", 3), ("timm/convnext_atto", 2)):
        network = build(name, img_size=64)
        found = last_feature_map(network, images)
        assert found.shape[2:] == (grid, grid) and found.isfinite().all(), name


@pytest.mark.parametrize("backbone", [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), Tokens()])
def test_a_backbone_without_a_feature_map_is_named(backbone):
    with pytest.raises(NoSpatialMapError, match=rf"{type(backbone).__name__} has no last feature map .* images of 32×48 pixels"):
        spatial_maps(backbone, torch.rand(2, 3, 32, 48))


def test_sizes_that_a_backbone_cannot_take_are_named():
    with pytest.raises(ValueError, match="cannot take 20×20 images"):
        spatial_maps(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(10, 2)), torch.rand(1, 3, 20, 20))
