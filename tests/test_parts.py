"""Head, backbones, optimizers and k-NN against the golden numbers, and their bad inputs."""

import copy
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from dino_lightning import DINOHead, DINOModule, VisionTransformer
from dino_lightning.backbones import build, feature_dim, features_at, prototypes, redrawn
from dino_lightning.backbones.positions import interpolate_positions
from dino_lightning.backbones.small_resnet import SmallResNet
from dino_lightning.evaluation import knn_accuracy
from dino_lightning.training.optim import LARS, build_optimizer, clip_each_, gradient_norms, param_groups

VARIANTS = {
    "plain": dict(),
    "bn": dict(use_bn=True),
    "free": dict(norm_last_layer=False),
    "one": dict(nlayers=1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_head_equals_the_reference(golden, variant):
    g = golden("head")
    head = DINOHead(48, 128, hidden_dim=64, bottleneck_dim=32, **VARIANTS[variant])
    head.load_state_dict(g.part(f"{variant}.state."))
    x = g[f"{variant}.input"].requires_grad_()
    out = copy.deepcopy(head)(x)
    torch.testing.assert_close(out, g[f"{variant}.output"], rtol=1e-5, atol=1e-6)
    (head(x) * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    torch.testing.assert_close(x.grad, g[f"{variant}.grad_input"], rtol=1e-5, atol=1e-6)
    gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    expected = g.part(f"{variant}.grad.")
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        # Before a batch norm the gradient of a bias is nothing but rounding, which differs between processors.
        rounding = variant == "bn" and name in ("mlp.0.bias", "mlp.3.bias")
        atol = 1e-5 if rounding else max(1e-6, 1e-5 * value.abs().max().item())
        torch.testing.assert_close(gradients[name], value, rtol=1e-5, atol=atol, msg=lambda m: f"{name}: {m}")


def test_head_initialisation():
    torch.manual_seed(0)
    head = DINOHead(384, 4096)
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.01) and not head.mlp[0].bias.any()
    assert head.last_layer.weight_v.abs().max().item() == pytest.approx(1 / 16, rel=1e-3)
    assert head.last_layer.weight_v.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.01)
    assert (head.last_layer.weight_g == 1).all() and not head.last_layer.weight_g.requires_grad
    assert head(torch.randn(64, 384)).abs().max() <= 1 + 1e-5, "with unit gains the logits are cosines"


@pytest.mark.parametrize("size", ["64x64", "32x32", "96x96", "48x80"])
def test_vit_equals_the_reference(golden, size):
    g = golden("vit")
    arguments = {name: g.item(f"args.{name}") for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    vit = VisionTransformer(**arguments).eval()
    vit.load_state_dict(g.part("state."))
    x = g[f"{size}.input"]
    with torch.no_grad():
        torch.testing.assert_close(vit(x), g[f"{size}.cls"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vit.get_last_selfattention(x), g[f"{size}.attention"], rtol=1e-5, atol=1e-6)
        for i, layer in enumerate(vit.get_intermediate_layers(x, 2)):
            torch.testing.assert_close(layer, g[f"{size}.intermediate{i}"], rtol=1e-5, atol=1e-5)


def test_vit_tokens_of_both_crops():
    vit = build("vit_tiny", drop_path_rate=0.1).eval()
    with torch.no_grad():
        for side, tokens in ((224, 197), (96, 37)):
            layer = vit.get_intermediate_layers(torch.zeros(1, 3, side, side), 1)[0]
            assert layer.shape == (1, tokens, 192)
    assert [block.drop_path for block in vit.blocks][::11] == [0.0, pytest.approx(0.1)]


@pytest.mark.parametrize(
    "name, patch_size, count",
    [("vit_tiny", 16, 5_524_416), ("vit_small", 16, 21_665_664), ("vit_small", 8, 21_670_272),
     ("vit_base", 16, 85_798_656), ("vit_base", 8, 85_807_872)],
)  # fmt: skip
def test_published_parameter_counts(name, patch_size, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name, patch_size=patch_size).parameters()) == count


@pytest.mark.parametrize("name, depth, width", [("vit_large", 24, 1024), ("vit_giant", 40, 1536)])
def test_large_vits_with_patch_14(name, depth, width):
    with torch.device("meta"):
        vit = build(name, patch_size=14)
    assert (len(vit.blocks), vit.embed_dim, vit.grid) == (depth, width, (16, 16))


def test_vit_with_a_grid_that_is_not_square():
    vit = VisionTransformer(img_size=(32, 48), patch_size=8, embed_dim=24, depth=1, num_heads=2)
    assert vit.pos_embed.shape == (1, 1 + 4 * 6, 24)
    assert vit(torch.zeros(2, 3, 32, 48)).shape == vit(torch.zeros(2, 3, 16, 24)).shape == (2, 24)


@pytest.mark.parametrize("uniform", [False, True])
def test_blocks_computed_anew_have_the_same_gradients(uniform):
    """To the bit, with the paths that were dropped."""
    options = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 2,
        "drop_path_rate": 0.5,
        "drop_path_uniform": uniform,
    }
    plain, anew = VisionTransformer(**options), VisionTransformer(**options, activation_checkpointing=True)
    anew.load_state_dict(plain.state_dict())
    images, gradients = torch.randn(6, 3, 32, 32), []
    for network in (plain, anew):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            found = network.train()(images)
        torch.rand(7)  # what is drawn between the passes is of no matter
        (found**2).sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(map(torch.equal, *gradients))
    with pytest.raises(ValueError, match="activation_checkpointing is for the VisionTransformer of this package, .* is a ResNet"):
        DINOModule("resnet18", img_size=32, out_dim=8, activation_checkpointing=True)
    module = DINOModule("vit_tiny", img_size=32, out_dim=8, activation_checkpointing=True)
    assert module.student.backbone.activation_checkpointing


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, drop_path_rate=0.5)
    x = torch.randn(1, 3, 16, 16).expand(4000, -1, -1, -1)
    branch = torch.ones(4000, 5, 24)
    dropped = vit.blocks[1].train()._drop(branch)
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and dropped.mean().item() == pytest.approx(1, abs=0.1)
    assert all(len(sample.unique()) == 1 for sample in dropped[:50]), "whole samples are dropped"
    with torch.no_grad():
        assert torch.equal(vit.eval()(x[:2]), vit(x[:2]))


@pytest.mark.parametrize("name, dim", [("resnet50", 2048), ("densenet121", 1024), ("mobilenet_v3_small", 576),
                                       ("convnext_tiny", 768), ("squeezenet1_1", 512), ("vgg11", 512)])  # fmt: skip
def test_cnns_give_pooled_features_of_any_size(name, dim):
    backbone = build(name, in_chans=2)
    assert feature_dim(backbone, torch.zeros(1, 2, 96, 96)) == feature_dim(backbone, torch.zeros(1, 2, 64, 128)) == dim
    assert all(p.requires_grad for p in backbone.parameters())


def test_timm_backbones_take_both_crops():
    pytest.importorskip("timm")
    for name, dim in (("timm/vit_tiny_patch16_224", 192), ("timm/resnet18", 512)):
        backbone = build(name, drop_path_rate=0.1)
        assert feature_dim(backbone, torch.zeros(1, 3, 224, 224)) == feature_dim(backbone, torch.zeros(1, 3, 96, 96)) == dim
    with pytest.raises(ValueError, match="vit_tinny"):
        build("timm/vit_tinny")


def test_backbone_errors():
    with pytest.raises(ValueError, match="vit_smal'.*vit_small"):
        build("vit_smal")
    with pytest.raises(ValueError, match="patch size 16 does not divide the image size 100×96.*96×96"):
        build("vit_tiny")(torch.zeros(1, 3, 100, 96))
    with pytest.raises(ValueError, match="cannot take 20×20 images"):
        feature_dim(build("vit_tiny"), torch.zeros(1, 3, 20, 20))
    with pytest.raises(ValueError, match="^the images have 5 channels, the backbone takes 3; set in_chans"):
        feature_dim(build("vit_tiny"), torch.zeros(1, 5, 32, 32))
    with pytest.raises(ValueError, match="^the images are torch.uint8, the weights of the backbone torch.float32; have the loader"):
        feature_dim(build("vit_tiny"), torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="pool and flatten"):
        feature_dim(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 20, 20))
    with pytest.raises(ValueError, match="num_heads=5 does not divide embed_dim=24"):
        VisionTransformer(embed_dim=24, num_heads=5)


def _with(model, name, layer):
    setattr(model, name, layer)
    return model


def _timm(name, **options):
    return pytest.importorskip("timm").create_model(name, **options)


@pytest.mark.parametrize(
    "backbone, layer",
    [
        (lambda: torchvision.models.resnet18(), "1000 class scores of its layer fc. Take it off, backbone.fc = torch.nn.Identity()"),
        (lambda: torchvision.models.vit_b_32(num_classes=10), "10 class scores of its layer heads.head"),
        (lambda: torchvision.models.squeezenet1_1(), "layer classifier.1. Take it off, backbone.classifier[1] ="),
        (lambda: nn.Sequential(nn.Identity(), torchvision.models.resnet18()), "backbone[1].fc = torch.nn.Identity()"),
        (lambda: _timm("vit_tiny_patch16_224"), "layer head. Take it off, .*num_classes=0), or .* 'timm/NAME'"),
        (lambda: _timm("mobilenetv3_small_050", num_classes=5), "5 class scores of its layer classifier"),
        (lambda: _timm("vit_tiny_patch16_224", num_classes=0), None),
        (lambda: _timm("vit_tiny_patch16_224", num_classes=256), None),  # as CLIP's networks end
        (lambda: _with(torchvision.models.resnet18(), "fc", nn.Identity()), None),
        (lambda: _with(torchvision.models.resnet18(), "fc", nn.Linear(512, 128)), None),
        (lambda: nn.Sequential(torchvision.models.resnet18(), nn.Linear(1000, 10)), None),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)), None),
    ],
)
def test_a_network_with_its_classifier_is_pointed_out(backbone, layer, caplog):
    DINOModule(backbone(), out_dim=8, hidden_dim=8)
    if layer is None:
        assert "classifier" not in caplog.text
    else:
        assert re.search("ends in its classifier.*" + re.escape(layer).replace(r"\.\*", ".*"), caplog.text), caplog.text


def test_probing_leaves_the_modes_and_the_buffers():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = copy.deepcopy(backbone.state_dict())
    features_at(backbone, torch.randn(2, 3, 16, 16))
    assert backbone.training and not backbone[1].training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_lars_equals_the_reference(golden):
    g = golden("lars")
    matrix, vector = (nn.Parameter(g[f"{i}.before"]) for i in (0, 1))
    optimizer = LARS([{"params": [matrix], "weight_decay": 0.04}, {"params": [vector]}], lr=0.3)
    for step in range(3):
        matrix.grad, vector.grad = g[f"{step}.grad0"], g[f"{step}.grad1"]
        optimizer.step()
        torch.testing.assert_close(matrix.data, g[f"{step}.param0"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(vector.data, g[f"{step}.param1"], rtol=1e-5, atol=1e-7)


def test_param_groups_follow_the_reference():
    network = nn.ModuleDict({"backbone": build("vit_tiny"), "head": DINOHead(192, 64, norm_last_layer=False)})
    decayed, undecayed = (group["params"] for group in param_groups(network))
    names = {id(p): name for name, p in network.named_parameters()}
    decayed, undecayed = [{names[id(p)] for p in group} for group in (decayed, undecayed)]
    assert {"backbone.cls_token", "backbone.pos_embed", "head.last_layer.weight_v"} <= decayed
    assert all(name.endswith("bias") or "norm" in name for name in undecayed)
    assert (len(decayed), len(undecayed)) == (56, 102)
    network.head.last_layer.weight_g.requires_grad_(False)
    assert len(param_groups(network)[0]["params"]) == 55, "frozen parameters are left out"


def test_clipping_is_per_tensor():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (4, 9, 16)]
    for parameter, norm in zip(parameters, (6.0, 3.0, 0.5)):
        parameter.grad = torch.ones_like(parameter) * norm / parameter.numel() ** 0.5
    gradients, norms = gradient_norms(parameters)
    clip_each_(gradients, norms, 3.0)
    assert [p.grad.norm().item() for p in parameters] == pytest.approx([3.0, 3.0, 0.5], rel=1e-5)


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="'adam'"):
        build_optimizer("adam", param_groups(nn.Linear(2, 2)), fused=False)


@pytest.mark.parametrize("size, stem_stride", [(32, 1), (33, 2), (64, 4)])
def test_small_resnet_takes_images_of_any_size(size, stem_stride):
    network = SmallResNet(in_chans=5, widths=(4, 8, 12), stem_stride=stem_stride, blocks=2).eval()
    images = torch.rand(3, 5, size, size)
    features = network(images)
    assert features.shape == (3, 12) and (features >= 0).all()
    torch.testing.assert_close(network(images.contiguous(memory_format=torch.channels_last)), features)
    quarters = SmallResNet(in_chans=5, widths=(4, 8, 12), stem_stride=stem_stride, blocks=2, grid=2).eval()
    quarters.load_state_dict(network.state_dict())
    if size == 32:  # whose last map is 8 x 8
        torch.testing.assert_close(quarters(images).view(3, 4, 12).mean(dim=1), features)
    assert quarters(images).shape == (3, 48)
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 1 + 2 * (1 + 2 * 2)
    shifted = network(images.roll(4 * stem_stride, dims=3))
    assert (shifted - features).norm() < (network(1 - images) - features).norm(), "the mean over places hardly knows where things are"


@pytest.mark.parametrize("wrong", [{"widths": (8,)}, {"widths": (8, 0)}, {"stem_stride": 0}, {"blocks": -1}, {"grid": 0}])
def test_small_resnet_refuses(wrong):
    with pytest.raises(ValueError, match="expected two widths or more"):
        SmallResNet(**wrong)


def test_small_resnet_with_more_cells_than_places():
    with pytest.raises(ValueError, match=r"leaves \(1, 1\) places of such an image, fewer than grid=2"):
        SmallResNet(grid=2).eval()(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("fused", [False, True])
def test_sgd_takes_parameters_that_were_frozen_at_first(fused):
    always, later = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = build_optimizer("sgd", [{"params": [always, later]}], fused=fused)
    optimizer.param_groups[0]["lr"] = 0.1
    for step in range(3):
        always.grad, later.grad = torch.ones(3), torch.ones(3) if step else None
        optimizer.step()
    torch.testing.assert_close(always.detach(), torch.full((3,), 1 - 0.1 * (1 + 1.9 + 2.71)))
    torch.testing.assert_close(later.detach(), torch.full((3,), 1 - 0.1 * (1 + 1.9)))


@pytest.mark.parametrize("k", [5, 10, 20, 100])
def test_knn_equals_the_reference(golden, k):
    g = golden("knn")
    top1, top5 = knn_accuracy(g["bank"], g["bank_labels"], g["query"], g["query_labels"], k=k, temperature=g.item("temperature"))
    assert 100 * top1 == pytest.approx(g.item(f"top1.k{k}"), rel=1e-6)
    if k == 100:
        assert 100 * top5 == pytest.approx(g.item("top5.k100"), rel=1e-6)


def test_redrawn_is_the_network_before_training(caplog):
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, layer_scale=0.01)
    for parameter in vit.parameters():
        nn.init.constant_(parameter, 7.0)
    state = torch.get_rng_state()
    fresh = redrawn(vit)
    assert torch.equal(torch.get_rng_state(), state) and not fresh.training
    assert not any((parameter == 7).any() for parameter in fresh.parameters())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), redrawn(vit).parameters()))
    assert fresh.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not caplog.records and (fresh.blocks[1].ls2.gamma == 0.01).all()
    redrawn(nn.ModuleDict({"layer": nn.Linear(2, 2), "attention": nn.MultiheadAttention(4, 2)}))
    assert "attention.in_proj_weight" in caplog.text and "layer.weight" not in caplog.text


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("grid, target", [((14, 14), (6, 6)), ((5, 7), (9, 3))])
def test_the_gradient_of_interpolated_positions_is_that_of_torchs_interpolation(grid, target, offset, antialias):
    positions = torch.randn(1, 1 + grid[0] * grid[1], 8, dtype=torch.float64, requires_grad=True)
    result = interpolate_positions(positions, grid, target, offset, antialias)
    gradient = torch.randn_like(result)
    (ours,) = torch.autograd.grad(result, positions, gradient)
    size = {"scale_factor": tuple((to + offset) / side for to, side in zip(target, grid))} if offset else {"size": target}
    patches = positions[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, mode="bicubic", antialias=antialias, **size)
    plain = torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(result, plain)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, positions, gradient)[0])


def test_prototypes_equal_the_plain_weight_norm(monkeypatch):
    """In chunks of the backward pass, with trained gains; under autocast the logits stay float32."""
    monkeypatch.setattr(prototypes, "_CPU_CHUNK", 7 * 30)
    layer = prototypes.Prototypes(16, 100).double()
    layer.weight_g.data.uniform_(0.5, 2)
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight_v, layer.weight_g)
    plain = F.linear(x, layer.weight_v * layer.weight_g / layer.weight_v.norm(dim=1, keepdim=True))
    gradient = torch.randn_like(plain)
    torch.testing.assert_close(layer(x), plain)
    for ours, theirs in zip(torch.autograd.grad(layer(x), inputs, gradient), torch.autograd.grad(plain, inputs, gradient)):
        torch.testing.assert_close(ours, theirs)
    layer.weight_g.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer.float()(x.float())
    torch.testing.assert_close(logits, plain.float(), rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(logits.sum(), layer.weight_v)[0].isfinite().all()


def test_the_last_block_for_the_class_token_alone_trains_alike():
    """With drop path, whose draws are the same: value and gradients of the class token are those of a pass over all tokens."""
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=2, drop_path_rate=0.3, registers=2).double().train()
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    results = []
    for call in (lambda: vit(x), lambda: vit.get_intermediate_layers(x)[0][:, 0]):
        torch.manual_seed(0)
        features = call()
        results.append([features, *torch.autograd.grad(features.square().sum(), list(vit.parameters()))])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_options_that_a_part_cannot_follow_are_refused():
    for options in ({"ffn": "swiglu"}, {"layer_scale": 1e-5}):
        with pytest.raises(ValueError, match=f"resnet18 takes no {next(iter(options))}=.*: only a VisionTransformer has this"):
            build("resnet18", **options)
    with pytest.raises(ValueError, match="bottleneck_dim must be at least 1, got 0"):
        DINOHead(8, 4, bottleneck_dim=0)
