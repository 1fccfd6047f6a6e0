"""Backbones for other tools, loaded by the tools themselves: the same features, and the same weights back."""

import copy
import json
import re

import onnxruntime
import pytest
import timm
import torch
import torchvision
import transformers
from lightning.pytorch import Trainer
from test_weights import features, same_weights, shaken
from torch import nn
from torch.utils.data import DataLoader

from dino_lightning import DINOModule, SimCLRModule, VisionTransformer, load_backbone
from dino_lightning.backbones import build
from dino_lightning.backbones.small_resnet import SmallResNet
from dino_lightning.cli import main
from dino_lightning.weights.export import FORMS, export
from dino_lightning.weights.package import Package


def short(name: str, patch_size: int, depth: int = 2) -> nn.Module:
    """A network by name, whose first blocks alone are kept."""
    vit = build(name, patch_size=patch_size)
    vit.blocks = vit.blocks[:depth]
    return shaken(vit)


def package(backbone: nn.Module, size=(224, 224), **options) -> Package:
    return Package(backbone, size, 3, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), **options)


def loaded(form: str, folder, backbone: nn.Module):
    """What the tool itself makes of the folder: a function of images."""
    if form == "timm":
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if form == "transformers":
        return transformers.AutoModel.from_pretrained(folder).eval()
    if form == "onnx":
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if form == "torch_export":
        return torch.export.load(folder / "model.pt2").module()
    if form == "torchhub":  # the reference's ViT, here by ours, has a square grid
        weights = torch.load(folder / "backbone.pth")
        network = copy.deepcopy(backbone)
        network.set_grid(round((weights["pos_embed"].shape[1] - 1) ** 0.5) * backbone.patch_size)
        network.load_state_dict(weights)  # strictly
        return network
    return load_backbone(folder)


def assert_same_features(form: str, backbone: VisionTransformer, size: tuple[int, int], folder) -> None:
    export(package(backbone, size), form, folder)
    at_size = copy.deepcopy(backbone)
    at_size.set_grid(size)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
    expected = features(backbone, images)
    torch.testing.assert_close(features(loaded(form, folder, at_size), images), expected, rtol=1e-4, atol=1e-4)
    if form in ("onnx", "torch_export"):
        many = torch.randn(3, 3, *size)
        torch.testing.assert_close(features(loaded(form, folder, at_size), many), features(backbone, many), rtol=1e-4, atol=1e-4)
    if form in ("torchhub", "timm", "transformers", "safetensors"):
        source = folder / "backbone.pth" if form == "torchhub" else folder
        heads = {"num_heads": backbone.blocks[0].attn.num_heads} if form == "torchhub" else {}
        back = load_backbone(source, img_size=size, **heads)
        assert torch.equal(features(back, images), expected)
        if form != "timm" or backbone.register_tokens is None:  # timm has no position of the class token with registers
            assert same_weights(at_size, back), "bit for bit"


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("patch_size", [8, 14, 16])
@pytest.mark.parametrize("name", ["vit_tiny", "vit_small", pytest.param("vit_base", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["torchhub", "timm", "transformers", "safetensors"])
def test_weights_give_the_same_features(form, name, patch_size, other, tmp_path):
    size = (4 * patch_size, 7 * patch_size) if other else (224, 224)
    assert_same_features(form, short(name, patch_size), size, tmp_path / "out")


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
@pytest.mark.parametrize(
    "name, patch_size, size",
    [("vit_tiny", 16, (224, 224)), ("vit_small", 14, (56, 98)), pytest.param("vit_base", 8, (64, 40), marks=pytest.mark.slow)],
)
def test_graphs_give_the_same_features(form, name, patch_size, size, tmp_path):
    assert_same_features(form, short(name, patch_size), size, tmp_path / "out")


@pytest.mark.parametrize("form", ["torchhub", "timm", "transformers", "safetensors", "onnx", "torch_export"])
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_networks_of_dinov2(form, name, tmp_path):
    backbone = short(name, 14)
    if form == "torchhub":
        export(package(backbone), form, tmp_path / "out")
        weights = torch.load(tmp_path / "out" / "backbone.pth")
        assert weights.keys() - backbone.state_dict().keys() == {"mask_token"}, "DINOv2's own networks have one"
        return
    assert_same_features(form, backbone, (224, 224), tmp_path / "out")


@pytest.mark.parametrize("form", ["timm", "transformers", "safetensors"])
def test_swiglu(form, tmp_path):
    vit = VisionTransformer(img_size=28, patch_size=14, embed_dim=48, depth=2, num_heads=4, registers=4, layer_scale=1e-5, ffn="swiglu",
                            position_offset=0.0, position_antialias=True)  # fmt: skip
    assert_same_features(form, shaken(vit), (28, 28), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["timm", "transformers", "onnx", "torch_export"])
@pytest.mark.parametrize("name, patch_size", [("vit_tiny", 16), ("vit_small", 14), ("vit_base", 8)])
def test_whole_networks(form, name, patch_size, tmp_path):
    assert_same_features(form, short(name, patch_size, depth=12), (224, 224), tmp_path / "square")
    assert_same_features(form, short(name, patch_size, depth=12), (8 * patch_size, 12 * patch_size), tmp_path / "other")


def test_torchhub_has_the_names_of_the_reference(golden, tmp_path):
    g = golden("vit")
    arguments = {name: g.item(f"args.{name}") for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    vit = VisionTransformer(**arguments)
    vit.load_state_dict(g.part("state."))
    export(package(vit, (vit.grid[0] * vit.patch_size, vit.grid[1] * vit.patch_size)), "torchhub", tmp_path / "out")
    weights = torch.load(tmp_path / "out" / "backbone.pth")
    assert weights.keys() == g.part("state.").keys()
    assert all(torch.equal(weights[name], value) for name, value in g.part("state.").items())


@pytest.mark.parametrize("form", ["torchvision", "timm", "safetensors", pytest.param("onnx", marks=pytest.mark.slow)])
def test_resnet50(form, tmp_path):
    torch.manual_seed(0)
    backbone = build("resnet50").eval()
    images = torch.randn(2, 3, 64, 64)
    export(package(backbone, (64, 64)), form, tmp_path / "out")
    if form == "torchvision":
        model = torchvision.models.resnet50()
        model.fc = nn.Identity()
        model.load_state_dict(torch.load(tmp_path / "out" / "backbone.pth"))
    else:
        model = loaded(form, tmp_path / "out", backbone)
    found = features(model.eval() if isinstance(model, nn.Module) else model, images)
    torch.testing.assert_close(found, features(backbone, images), rtol=1e-4, atol=1e-4)
    if form in ("timm", "safetensors"):
        assert torch.equal(features(load_backbone(tmp_path / "out"), images), features(backbone, images))


def test_a_small_resnet_comes_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = shaken(SmallResNet(in_chans=5, widths=(4, 8, 12, 16), stem_stride=2, blocks=4, grid=2)).eval()
    images = torch.randn(2, 5, 64, 64)
    for form in ("torchhub", "safetensors"):
        export(package(backbone, (64, 64))._replace(in_chans=5), form, tmp_path / form)
        assert torch.equal(run_card(tmp_path / form)["backbone"](images), features(backbone, images))
    with pytest.raises(
        ValueError, match=r"a SmallResNet\(in_chans=5, widths=\(4, 8, 12, 16\), blocks=4\), and do not tell its stem_stride and grid"
    ):
        load_backbone(tmp_path / "torchhub" / "backbone.pth")
    module = SimCLRModule(backbone, img_size=64, in_chans=5, hidden_dim=8, projection_dim=8)
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, DataLoader([[torch.rand(5, 64, 64)] * 2] * 4, batch_size=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(load_backbone("last.ckpt")(images), module(images))
    with pytest.raises(ValueError, match="DINOModule is 'dino'; use dino_lightning.SimCLRModule"):
        DINOModule.load_from_checkpoint("last.ckpt", backbone=backbone)


def test_the_command_writes_a_folder_with_a_card(small_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["export", "--checkpoint", small_checkpoint, "--to", "transformers", "--image_size", "32", "48", "--mean", "[0.1, 0.2, 0.3]"])
    assert "README.md, config.json, model.safetensors, preprocessor_config.json in exported" in capsys.readouterr().out
    card = (tmp_path / "exported" / "README.md").read_text()
    for fact in ("ViT, width 24, 2 blocks, 2 heads, patches of 8 pixels", "32×48 pixels", "the teacher", "transformers.ViTModel", "dino_lightning 0.1",
                 "| steps | 1, of 4 images |", "images |", 'from_pretrained("exported"'):  # fmt: skip
        assert fact in card, fact
    assert json.loads((tmp_path / "exported" / "preprocessor_config.json").read_text())["image_mean"] == [0.1, 0.2, 0.3]
    teacher = DINOModule.load_from_checkpoint(small_checkpoint).teacher.backbone
    images = torch.randn(2, 3, 32, 48)
    model = transformers.ViTModel.from_pretrained("exported", add_pooling_layer=False)
    torch.testing.assert_close(features(model, images), features(teacher, images), rtol=1e-4, atol=1e-4)
    with pytest.raises(FileExistsError, match="already something at exported"):
        main(["export", "--checkpoint", small_checkpoint, "--to", "timm"])
    main(["export", "--checkpoint", "exported", "--to", "timm", "--output", "again"])
    assert (tmp_path / "again" / "config.json").is_file(), "what was exported is a source"


def run_card(folder) -> dict:
    """Executes the code of a model card where the exported folder lies, and gives what it defined."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("form", [form for form in FORMS if form != "torchvision"])
def test_the_code_of_a_card_runs_as_it_stands(form, small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["export", "--checkpoint", small_checkpoint, "--to", form, "--image_size", "48", "48", "--output", "vit"])
    card = (tmp_path / "vit" / "README.md").read_text()
    assert "patches of 8 pixels" in card and "| trained at | 32×32 pixels (global crops) |" in card and "48×48 pixels" in card
    names = run_card(tmp_path / "vit")
    images, found = (torch.as_tensor(names[name]) for name in ("images", "features"))
    assert images.shape == (2, 3, 48, 48)
    teacher = DINOModule.load_from_checkpoint(small_checkpoint).teacher.backbone
    torch.testing.assert_close(found, features(teacher, images), rtol=1e-4, atol=1e-4)


def test_the_code_of_the_cards_of_cnns_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("resnet18", "squeezenet1_1"):
        backbone = build(name).eval()
        for form in ("torchhub", "torchvision", "safetensors"):
            export(package(backbone, (64, 64)), form, tmp_path / f"{name}_{form}")
            names = run_card(tmp_path / f"{name}_{form}")
            if name == "resnet18":
                torch.testing.assert_close(names["features"], features(backbone, names["images"]), rtol=1e-4, atol=1e-4)
            else:  # no other library builds it without its classifier: the card gives the tensors
                assert names["weights"].keys() == backbone.state_dict().keys()


@pytest.mark.parametrize("form", ["torchhub", "safetensors"])
def test_the_head_goes_along_for_continued_training(form, small_checkpoint, tmp_path, monkeypatch):
    main(["export", "--checkpoint", small_checkpoint, "--to", form, "--with_head", "true", "--output", str(tmp_path / "out")])
    trained = DINOModule.load_from_checkpoint(small_checkpoint)
    source = tmp_path / "out" / "checkpoint.pth" if form == "torchhub" else tmp_path / "out"
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    module = DINOModule(vit, out_dim=64, hidden_dim=32, weights=str(source), weights_with_head=True)
    assert same_weights(trained.teacher, module.student)
    assert torch.equal(module.loss.center, trained.loss.center)
    monkeypatch.chdir(tmp_path)
    assert run_card(tmp_path / "out").keys() & {"checkpoint", "features"}


def test_nothing_is_left_of_what_cannot_be_exported(small_checkpoint, tmp_path):
    resnet, vit = build("resnet18").eval(), short("vit_tiny", 16)
    for backbone, form, error, message in (
        (resnet, "transformers", ValueError, "transformers has no ResNet of this form; choose timm"),
        (vit, "torchvision", ValueError, "torchvision has no VisionTransformer"),
        (short("dinov2_vits14", 14), "transformers", ValueError, "a Dinov2Model cannot keep positions of a grid that is not square, 4×6"),
        (vit, "tensorflow", ValueError, f"to must be one of {', '.join(FORMS)}, got 'tensorflow'"),
    ):
        with pytest.raises(error, match=message):
            size = (56, 84) if "Dinov2Model" in message else (64, 64)
            export(package(backbone, size), form, tmp_path / "out")
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="timm has no place for a projection head; torchhub and safetensors have"):
        export(package(vit, head={}), "timm", tmp_path / "out")
    with pytest.raises(ValueError, match="patch size 16 does not divide the image size 50×50"):
        export(package(vit, (50, 50)), "torchhub", tmp_path / "out")
    assert not list(tmp_path.iterdir())
