"""Weights of other origins: files of the reference, published names, timm, transformers, torchvision, our own checkpoints."""

import argparse
import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from conftest import two_colours
from safetensors.torch import save_file
from torch import nn

from dino_lightning import DINOModule, VisionTransformer, load_backbone
from dino_lightning.backbones import build
from dino_lightning.methods.simclr import SimCLRModule
from dino_lightning.tools import attention, export, knn
from dino_lightning.weights import PUBLISHED
from dino_lightning.weights.export import export as write
from dino_lightning.weights.load import adapted, load_into
from dino_lightning.weights.networks import facts_of
from dino_lightning.weights.package import Package
from dino_lightning.weights.source import open_source

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def shaken(network: nn.Module) -> nn.Module:
    """With weights that have nothing in common with how networks begin (zeros, ones)."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    return network.eval()


def small_vit(**options) -> VisionTransformer:
    return shaken(VisionTransformer(**{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, **options}))


def features(network: nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    with torch.no_grad():
        found = network(images)
    return found if isinstance(found, torch.Tensor) else found.last_hidden_state[:, 0]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    others = other.state_dict()
    return all(torch.equal(value, others[name]) for name, value in one.state_dict().items())


def test_files_of_the_reference_with_the_backbone_alone_and_whole(tmp_path):
    teacher, student = small_vit(), shaken(small_vit())
    head = {
        "head.mlp.weight": torch.ones(8, 48),
        "head.last_layer.weight_g": torch.ones(16, 1),
        "head.last_layer.weight_v": torch.ones(16, 8),
    }
    torch.save(teacher.state_dict(), tmp_path / "alone.pth")
    whole = {
        "student": {f"module.backbone.{name}": v for name, v in student.state_dict().items()} | {f"module.{n}": v for n, v in head.items()},
        "teacher": {f"backbone.{name}": value for name, value in teacher.state_dict().items()} | head,
        # As main_dino.py leaves them: numbers of numpy from its schedules, a path from its cluster script.
        "args": argparse.Namespace(arch="vit_small", output_dir=Path("runs")),
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.1), "weight_decay": np.linspace(0, 1, 3)[1]}]},
        "epoch": 7,
    }
    torch.save(whole, tmp_path / "whole.pth")
    save_file(teacher.state_dict(), tmp_path / "alone.safetensors")
    for name, expected, options in (
        ("alone.pth", teacher, {}),
        ("alone.safetensors", teacher, {}),
        ("whole.pth", teacher, {}),
        ("whole.pth", student, {"network": "student"}),
    ):
        loaded = load_backbone(tmp_path / name, num_heads=3, **options)
        assert not loaded.training and same_weights(expected, loaded)
        assert torch.equal(features(loaded), features(expected))
    for size in ((40, 24), (64, 16)):  # the second has as many patches as the file
        images = torch.randn(1, 3, *size)
        at_another_size = load_backbone(tmp_path / "alone.pth", num_heads=3, img_size=size)
        assert at_another_size.grid == (size[0] // 8, size[1] // 8)
        torch.testing.assert_close(features(at_another_size, images), features(teacher, images))


def test_usual_shapes_know_their_heads(tmp_path):
    torch.save(build("vit_tiny").state_dict(), tmp_path / "tiny.pth")
    assert load_backbone(tmp_path / "tiny.pth").blocks[0].attn.num_heads == 3
    torch.save(small_vit().state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="small.pth: the weights are of a ViT of width 48 and depth 2, .* give num_heads"):
        load_backbone(tmp_path / "small.pth")


class Attack:
    def __reduce__(self):
        return (print, ("this code must not run",))


def test_files_that_hold_code_or_are_broken_are_refused(tmp_path, capsys):
    bad = tmp_path / "bad.pth"
    torch.save({"teacher": small_vit().state_dict(), "args": Attack()}, bad)
    with pytest.raises(ValueError, match="bad.pth holds no weights that can be read safely, .* it holds .*print, which may be code"):
        load_backbone(bad)
    bad.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="bad.pth holds no weights"):
        load_backbone(bad)
    assert "must not run" not in capsys.readouterr().out
    torch.save(small_vit().state_dict(), bad)
    bad.write_bytes(bad.read_bytes()[:3000])
    with pytest.raises(ValueError, match="is not whole"):
        load_backbone(bad)
    save_file({"cls_token": torch.ones(9999)}, tmp_path / "bad.safetensors")
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "bad.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match="bad.safetensors is no whole safetensors file"):
        load_backbone(tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError, match="no file or folder 'dino_vits17', .* no published name .*dino_vits16"):
        load_backbone("dino_vits17")
    bad.write_text("a letter")
    with pytest.raises(ValueError, match="bad.pth holds no weights"):
        load_backbone(bad)
    with pytest.raises(FileNotFoundError, match="holds none of model.safetensors, pytorch_model.bin"):
        load_backbone(tmp_path)
    weights = small_vit().state_dict()
    save_file({**weights, "norm.bias": weights["norm.bias"].log()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not finite \(norm.bias\): it is damaged, or of a run that diverged"):
        load_backbone(tmp_path, num_heads=3)
    for text, message in (('{"num_attention_heads": 3', "config.json is no JSON, or not whole"), ("[3]", "config.json holds a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_backbone(tmp_path)


@pytest.mark.parametrize(
    "held, message",
    [
        ({"epoch": 3}, "there are no named weights in it, but epoch"),
        ({"teacher": {"backbone.x": torch.ones(1)}}, "neither of a ViT .* nor of a ResNet .*, but x"),
        ({"student": {"module.backbone.x": torch.ones(1)}}, "it holds student, but no teacher"),
    ],
)
def test_what_holds_no_backbone_is_named(held, message, tmp_path):
    torch.save(held, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=f"odd.pth: .*{message}"):
        load_backbone(tmp_path / "odd.pth")


def test_every_load_reports_what_was_left_over(tmp_path, caplog):
    weights = small_vit().state_dict()
    torch.save({**weights, "head.weight": torch.ones(10, 48), "odd": torch.ones(1)}, tmp_path / "more.pth")
    load_backbone(tmp_path / "more.pth", num_heads=3)
    assert f"{len(weights)} tensors matched; unexpected: head.weight, odd" in caplog.text
    torch.save({name: v for name, v in weights.items() if name != "blocks.1.mlp.fc2.bias"}, tmp_path / "less.pth")
    with pytest.raises(ValueError, match="less.pth is not a whole backbone of this kind: .* missing: blocks.1.mlp.fc2.bias"):
        load_backbone(tmp_path / "less.pth", num_heads=3)


def test_published_names_are_downloaded_once_checked_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    served, cached = tmp_path / "served" / "vits16.pth", tmp_path / "cache" / "hub" / "checkpoints" / "vits16.pth"
    vit = build("vit_small")
    torch.save(vit.state_dict(), served)
    monkeypatch.setitem(PUBLISHED, "dino_vits16", served.as_uri())
    assert same_weights(vit, load_backbone("dino_vits16"))
    served.unlink()
    assert same_weights(vit, load_backbone("dino_vits16")), "from the cache"
    assert len(cached.with_name("vits16.pth.sha256").read_text().strip()) == 64
    torch.save(build("vit_small").state_dict(), cached)
    with pytest.raises(ValueError, match="vits16.pth is not the file that was read first: its SHA-256 is .* Delete both"):
        load_backbone("dino_vits16")
    cached.with_name("vits16.pth.sha256").unlink()
    torch.save({**vit.state_dict(), "odd": torch.ones(1)}, cached)
    with pytest.raises(ValueError, match="the file of dino_vits16 is not what was published under this name: .*odd"):
        load_backbone("dino_vits16")
    monkeypatch.setitem(PUBLISHED, "dino_vitb8", "http://127.0.0.1:9/vitb8.pth")  # where nobody listens
    with pytest.raises(ConnectionError, match="cannot download .*put this file to .*cache/hub/checkpoints/vitb8.pth"):
        load_backbone("dino_vitb8")


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_small_patch16_224", {"num_classes": 10}),
        ("vit_small_patch14_dinov2", {"num_classes": 0}),
        ("vit_small_patch14_reg4_dinov2", {"num_classes": 0}),
        ("vit_giant_patch14_reg4_dinov2", {"num_classes": 0, "embed_dim": 48}),
        ("vit_giant_patch14_reg4_dinov2", {"num_classes": 0, "embed_dim": 48, "img_size": (28, 56)}),
    ],
)
def test_vits_of_timm(name, options):
    patch_size = 16 if "16" in name else 14
    model = timm.create_model(name, pretrained=False, **{"img_size": 4 * patch_size, "depth": 2, "num_heads": 4, **options})
    shaken(model)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features(load_backbone(model), images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Dinov2WithRegisters", "Dinov2 with SwiGLU"])
def test_models_of_transformers_in_memory_and_in_a_folder(kind, tmp_path):
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 42, "patch_size": 14}
    shape |= {"intermediate_size": 96} if kind == "ViT" else {"mlp_ratio": 4, "use_swiglu_ffn": "SwiGLU" in kind}
    name = kind.split()[0]
    model = shaken(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**shape)))
    images = torch.randn(2, 3, 42, 42)
    expected = features(model, images)
    torch.testing.assert_close(features(load_backbone(model), images), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(features(load_backbone(tmp_path), images), expected, rtol=1e-5, atol=1e-5)


def test_positions_of_dinov2_at_other_sizes():
    """The ones without registers as DINO's, those with them antialiased to the size itself (Dinov2WithRegisters in transformers)."""
    shape = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 112, "patch_size": 14, "mlp_ratio": 4}
    images = torch.randn(1, 3, 70, 70)
    model = shaken(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**shape)))
    torch.testing.assert_close(features(load_backbone(model), images), features(model, images), rtol=1e-5, atol=1e-5)
    plain, registers = build("dinov2_vits14", img_size=112), build("dinov2_vits14_reg", img_size=112)
    assert (plain.position_offset, plain.position_antialias) == (0.1, False)
    assert (registers.position_offset, registers.position_antialias) == (0.0, True)


@pytest.mark.parametrize("name, count", [("dinov2_vits14", 22.1), ("dinov2_vitb14_reg", 86.6), ("dinov2_vitg14", 1136.5)])
def test_networks_of_dinov2_have_their_published_sizes(name, count):
    with torch.device("meta"):
        vit = build(name, img_size=518)
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(count, abs=0.1)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_of_torchvision(name, tmp_path, caplog):
    model = shaken(torchvision.models.get_model(name))
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    loaded = load_backbone(tmp_path / "resnet.pth")
    assert "unexpected: fc.weight, fc.bias" in caplog.text
    model.fc = nn.Identity()
    assert torch.equal(features(loaded), features(model))


def test_other_channels_by_the_stated_rule(tmp_path):
    vit = small_vit()
    torch.save(vit.state_dict(), tmp_path / "rgb.pth")
    gray = torch.randn(2, 1, 32, 32)
    one = load_backbone(tmp_path / "rgb.pth", num_heads=3, in_chans=1)
    torch.testing.assert_close(features(one, gray), features(vit, gray.expand(-1, 3, -1, -1)))
    five = load_backbone(tmp_path / "rgb.pth", num_heads=3, in_chans=5)
    assert five.patch_embed.proj.weight.shape[1] == 5
    weight = torch.arange(3.0).view(1, 3, 1, 1)
    assert adapted(weight, 5).flatten().tolist() == pytest.approx([0, 0.6, 1.2, 0, 0.6])
    # Mean brightness in, mean brightness out, where the number is a multiple of three.
    torch.testing.assert_close(adapted(weight, 6).sum(), weight.sum())


def test_checkpoints_of_methods_with_one_network(tmp_path):
    module = SimCLRModule("vit_tiny", img_size=32, patch_size=16, hidden_dim=16)
    torch.save({"state_dict": module.state_dict(), "method": "simclr"}, tmp_path / "simclr.ckpt")
    assert same_weights(load_backbone(tmp_path / "simclr.ckpt"), module.network.backbone)
    started = DINOModule("vit_tiny", img_size=32, patch_size=16, out_dim=8, hidden_dim=8, weights=str(tmp_path / "simclr.ckpt"))
    assert same_weights(started.teacher.backbone, module.network.backbone)


def test_own_checkpoints(small_checkpoint):
    teacher = DINOModule.load_from_checkpoint(small_checkpoint).teacher.backbone
    assert same_weights(teacher, load_backbone(small_checkpoint))
    assert load_backbone(small_checkpoint).blocks[0].attn.num_heads == teacher.blocks[0].attn.num_heads == 2


def module(**options) -> DINOModule:
    return DINOModule("vit_tiny", img_size=64, out_dim=32, hidden_dim=16, bottleneck_dim=8, warmup_epochs=0, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A ViT-Ti/16 on a grid of 14 × 14, and its file."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pth"
    vit = shaken(build("vit_tiny"))
    torch.save(vit.state_dict(), path)
    return vit, str(path)


def test_a_module_starts_from_weights(tiny, tmp_path):
    vit, path = tiny
    started = module(weights=path)
    vit = copy.deepcopy(vit)
    vit.set_grid(64)
    assert same_weights(vit, started.student.backbone) and same_weights(vit, started.teacher.backbone)
    assert "weights" not in started.hparams, "a checkpoint must not need the file again"


def test_a_module_takes_over_the_head_and_the_centre(tmp_path):
    first = module()
    first.loss.center.fill_(0.5)
    held = {"teacher": first.teacher.state_dict(), "dino_loss": {"center": first.loss.center}}
    torch.save(held, tmp_path / "whole.pth")
    second = module(weights=str(tmp_path / "whole.pth"), weights_with_head=True)
    assert same_weights(first.teacher, second.student) and torch.equal(first.loss.center, second.loss.center)
    third = module(weights=str(tmp_path / "whole.pth"))
    assert not same_weights(first.teacher.head, third.student.head) and not third.loss.center.any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch_size": 8}, r"tiny.pth is of another network: patch_embed.proj.weight \(192, 3, 16, 16\) instead of \(192, 3, 8, 8\)"),
        ({"weights_with_head": True}, "tiny.pth holds no projection head; leave weights_with_head out"),
    ],
)
def test_a_module_refuses_what_does_not_fit(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        module(weights=tiny[1], **options)


def test_a_head_of_no_weights_is_refused():
    with pytest.raises(ValueError, match="weights_with_head takes the head of weights, and there are none"):
        module(weights_with_head=True)


def test_nothing_in_common_is_an_error(tiny):
    with pytest.raises(ValueError, match="nothing in .*tiny.pth matches the backbone: it has cls_token"):
        DINOModule("resnet18", out_dim=32, weights=tiny[1])
    with pytest.raises(ValueError, match=r"head of .* is another one \(.*last_layer.weight_v.*\); choose its out_dim \(32\)"):
        path = tiny[1].replace("tiny.pth", "whole.pth")
        torch.save({"teacher": module().teacher.state_dict()}, path)
        DINOModule("vit_tiny", out_dim=64, hidden_dim=16, bottleneck_dim=8, weights=path, weights_with_head=True)


def test_mask_tokens_go_where_there_is_a_place_for_them(tmp_path, caplog):
    caplog.set_level("INFO")
    vit, plain = small_vit(mask_token=True, layer_scale=0.1, drop_path_uniform=True), small_vit(layer_scale=0.1)
    torch.save(vit.state_dict(), tmp_path / "masked.pth")
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    torch.save({**plain.state_dict(), "mask_token": torch.ones(1, 1, 48)}, tmp_path / "odd.pth")
    own = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, mask_token=True, layer_scale=0.1)
    for name in ("plain", "odd"):
        load_into(own, open_source(tmp_path / f"{name}.pth"))
        assert same_weights(plain, own) and not own.mask_token.any()
        assert f"{name}.pth has no mask token for this backbone, which keeps its own" in caplog.text
    load_into(own, open_source(tmp_path / "masked.pth"))
    assert same_weights(vit, own) and own.mask_token.any()
    without = load_backbone(tmp_path / "masked.pth", num_heads=3)
    assert without.mask_token is None and torch.equal(features(without), features(vit)), "features need none"

    checkpoint = {"state_dict": {f"teacher.backbone.{name}": v for name, v in vit.state_dict().items()}, "dino_lightning": facts_of(vit)}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    package = Package(vit, (32, 32), 3, (0.5,) * 3, (0.5,) * 3)
    for source in (tmp_path / "last.ckpt", write(package, "safetensors", tmp_path / "safetensors")):
        loaded = load_backbone(source, drop_path_rate=0.2)
        assert loaded.state_dict().keys() == vit.state_dict().keys() and same_weights(vit, loaded)
        assert [block.drop_path for block in loaded.blocks] == [0.2, 0.2] and loaded.drop_path_uniform
    for form in ("torchhub", "transformers", "timm"):
        folder = write(package, form, tmp_path / form)
        source = open_source(folder)
        assert torch.equal(features(load_backbone(folder, num_heads=3)), features(vit))
        assert form == "timm" or torch.equal(source.backbone["mask_token"], vit.mask_token), "DINOv2's have a place"
    bare = small_vit(mask_token=True)
    for form in ("torchhub", "transformers", "timm"):  # as networks of DINO, which have none
        folder = write(package._replace(backbone=bare), form, tmp_path / f"{form}-bare")
        assert "mask_token" not in open_source(folder).backbone
        assert torch.equal(features(load_backbone(folder, num_heads=3)), features(bare))
    assert features(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()).shape == (2, 48)
    assert features(transformers.AutoModel.from_pretrained(tmp_path / "transformers").eval()).shape == (2, 48)


def test_weights_of_other_parts_or_heads_are_refused(tmp_path):
    scaled, twice = small_vit(layer_scale=1.0), small_vit(depth=4)
    torch.save(scaled.state_dict(), tmp_path / "scaled.pth")
    torch.save(twice.state_dict(), tmp_path / "twice.pth")
    options = {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8, "img_size": 32}
    for name in ("scaled", "twice"):
        with pytest.raises(ValueError, match=rf"{name}.pth is of a network with other parts: .* unexpected: blocks\."):
            DINOModule(small_vit(), weights=str(tmp_path / f"{name}.pth"), **options)
    torch.save(small_vit().state_dict(), tmp_path / "once.pth")
    with pytest.raises(ValueError, match=r"once.pth is not a whole backbone of this kind: .* missing: blocks\.2\."):
        DINOModule(twice, weights=str(tmp_path / "once.pth"), **options)
    known = Package(small_vit(), (32, 32), 3, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="known is of a ViT with 3 attention heads, the backbone has 4"):
        DINOModule(small_vit(num_heads=4), weights=str(write(known, "safetensors", tmp_path / "known")), **options)
    with pytest.raises(ValueError, match="known is of a ViT with 1e-06 as epsilon of its norms, the backbone has 0.001"):
        DINOModule(small_vit(norm_eps=1e-3), weights=str(tmp_path / "known"), **options)
    torch.save(build("vit_tiny").state_dict(), tmp_path / "tiny.pth")
    unusual = VisionTransformer(embed_dim=192, depth=12, num_heads=6)  # which a state dict alone cannot contradict
    DINOModule(unusual, weights=str(tmp_path / "tiny.pth"), **options)
    assert load_backbone(tmp_path / "tiny.pth", num_heads=6).blocks[0].attn.num_heads == 6


def test_a_grid_of_as_many_patches_is_another_grid(tiny):
    vit, path = copy.deepcopy(tiny[0]), tiny[1]
    started = DINOModule("vit_tiny", img_size=(112, 448), out_dim=32, hidden_dim=16, bottleneck_dim=8, weights=path)
    vit.set_grid((112, 448))
    assert same_weights(vit, started.student.backbone)


def test_networks_that_compute_something_else_are_refused(tmp_path, monkeypatch):
    shape = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "intermediate_size": 96,
    }
    other = shaken(transformers.ViTModel(transformers.ViTConfig(**shape, hidden_act="quick_gelu")))
    other.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors", other):
        with pytest.raises(ValueError, match="the activation quick_gelu, ours GELU"):
            load_backbone(source)
    blurred = timm.create_model("resnetblur50", num_classes=0)
    with pytest.raises(ValueError, match="ResNet computes something else from the same weights .* Use it itself as the backbone"):
        load_backbone(blurred)
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: blurred)
    with pytest.raises(ValueError, match="timm/resnetblur50 computes something else from the same weights"):
        load_backbone("timm/resnetblur50")
    with pytest.raises(ValueError, match="timm has no model 'resnetblurred50'"):
        load_backbone("timm/resnetblurred50")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="a ViT without a class token"):
        load_backbone(timm.create_model("vit_base_patch16_reg4_gap_256", depth=1, num_classes=0))


@pytest.mark.parametrize("name", ["mnasnet0_5", "timm/vit_small_patch14_reg4_dinov2"])
def test_networks_of_other_names_take_their_own_weights(name, tmp_path):
    options = {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8, "img_size": 56}
    first = DINOModule(name, **options)
    torch.save(first.teacher.backbone.state_dict(), tmp_path / "own.pth")
    assert same_weights(first.teacher.backbone, DINOModule(name, weights=str(tmp_path / "own.pth"), **options).student.backbone)


def test_the_backbone_for_a_network_of_ones_own(tiny):
    started = module(weights=tiny[1])
    frozen, trainable = started.as_backbone(), started.as_backbone(trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters()) and all(p.requires_grad for p in trainable.parameters())
    assert not frozen.training and frozen is not started.teacher.backbone
    images = torch.randn(2, 3, 64, 96)
    (last,) = frozen.forward_features(images)
    assert last.cls.shape == (2, 192) and last.patches.shape == (2, 192, 4, 6)
    torch.testing.assert_close(last.cls, frozen(images))
    first, again = frozen.forward_features(images, (0, -1))
    tokens = frozen.get_intermediate_layers(images, 12)
    torch.testing.assert_close(first.patches.flatten(2).transpose(1, 2), tokens[0][:, 1:])
    assert torch.equal(again.patches, last.patches)
    with pytest.raises(ValueError, match=r"blocks must be numbers from -12 to 11, got \(12,\)"):
        frozen.forward_features(images, (12,))


def test_the_tools_take_any_source(small_checkpoint, tmp_path):
    root = two_colours(tmp_path)
    export(small_checkpoint, "safetensors", str(tmp_path / "exported"))
    expected = knn(small_checkpoint, str(root), k=(3,), compare=True)
    found = knn(str(tmp_path / "exported"), str(root), k=(3,), compare=True)
    assert found["trained"] == expected["trained"] and found.keys() == expected.keys()
    (picture,) = attention(str(next(root.rglob("*.jpg"))), checkpoint=str(tmp_path / "exported"), output=str(tmp_path / "maps"))
    assert picture.endswith("_attention.png")
    with pytest.raises(FileNotFoundError, match="no file or folder 'nothing.pth'"):
        knn("nothing.pth", str(root))
