"""Fine-tuning: layer-wise learning rates, its schedule, what is trained, and the command."""

from pathlib import Path

import pytest
import torch
from conftest import two_colours
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dino_lightning import DINOModule, VisionTransformer
from dino_lightning.classifiers.finetune import FineTune, layer_groups
from dino_lightning.cli import main
from dino_lightning.data import ImageFolder
from dino_lightning.data.labelled import LabelledDataModule
from dino_lightning.tools.finetune import finetune
from dino_lightning.training.schedules import cosine_schedule


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, **{"embed_dim": 12, "depth": 3, "num_heads": 2, **options})


def loader(count=16, batch_size=4):
    labels = torch.arange(count) % 2
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 3 * labels[:, None, None, None]
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def fit(module, train, val=None, epochs=2, **options):
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(module, train, *([val] if val is not None else []))
    return trainer


def test_layers_have_their_rates_and_biases_no_decay():
    backbone, head = vit(), nn.Linear(12, 2)
    groups = layer_groups(backbone, head, layer_decay=0.5, weight_decay=0.1)
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected = {
        backbone.patch_embed.proj.weight: (0.5**4, 0.1),
        backbone.patch_embed.proj.bias: (0.5**4, 0.0),
        backbone.cls_token: (0.5**4, 0.1),
        backbone.pos_embed: (0.5**4, 0.1),
        backbone.blocks[0].attn.qkv.weight: (0.5**3, 0.1),
        backbone.blocks[1].norm1.weight: (0.5**2, 0.0),
        backbone.blocks[2].mlp.fc2.weight: (0.5, 0.1),
        backbone.blocks[2].mlp.fc2.bias: (0.5, 0.0),
        backbone.norm.weight: (1.0, 0.0),
        head.weight: (1.0, 0.1),
        head.bias: (1.0, 0.0),
    }
    for parameter, wanted in expected.items():
        assert found[id(parameter)] == wanted
    count = sum(len(group["params"]) for group in groups)
    assert count == len(found) == len(list(backbone.parameters())) + 2, "each parameter once"


def test_other_backbones_are_one_group_and_the_log_says_so(caplog):
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5))
    cnn(torch.zeros(1, 3, 16, 16))
    groups = layer_groups(cnn, nn.Linear(5, 2), layer_decay=0.5, weight_decay=0.1)
    assert {group["lr_scale"] for group in groups} == {1.0}
    assert "layer_decay=0.5 is not used: a Sequential" in caplog.text
    caplog.clear()
    layer_groups(cnn, nn.Linear(5, 2), layer_decay=1.0, weight_decay=0.1)
    assert not caplog.text


class Rates(Callback):
    def __init__(self):
        self.values, self.modes = [], set()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.values.append([optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]])

    def on_train_batch_end(self, trainer, module, *_):
        self.modes.add((module.training, module.backbone.training))


def test_rates_of_each_step():
    seen = Rates()
    module = FineTune(vit().eval(), 2, lr=0.1, min_lr=0.01, layer_decay=0.5, warmup_epochs=1)
    fit(module, loader(), epochs=3, callbacks=[seen], accumulate_grad_batches=2)
    values = torch.tensor(seen.values)
    plan = dict(base_value=0.1 * 8 / 256, final_value=0.01 * 8 / 256, total_steps=6, warmup_steps=2)
    expected = torch.tensor([cosine_schedule(step, **plan) for step in range(6)])
    torch.testing.assert_close(values[:, 1], expected)
    torch.testing.assert_close(values[:, 0], expected * 0.5**4)
    assert seen.modes == {(True, True)}, "with stochastic depth, though the backbone came in evaluation mode"


def test_it_learns_with_a_frozen_teachers_backbone_and_saves_plain_types(tmp_path):
    backbone = vit(drop_path_rate=0.1).requires_grad_(False)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    module = FineTune(backbone, num_classes=2, lr=0.1, warmup_epochs=1, classes=["dark", "light"])
    trainer = fit(module, loader(), loader(), epochs=10)
    still = [name for name, value in module.backbone.named_parameters() if torch.equal(value, before[name])]
    assert not still
    assert module.results().last == (1.0, 1.0) and trainer.callback_metrics["val/finetune_top1"] == 1
    assert trainer.test(module, loader(), verbose=False) == [{"test/finetune_top1": 1.0, "test/finetune_top5": 1.0}]
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    assert torch.load(tmp_path / "tuned.ckpt", weights_only=True)["hyper_parameters"]["classes"] == ["dark", "light"]
    loaded = FineTune.load_from_checkpoint(tmp_path / "tuned.ckpt", backbone=vit()).eval()
    images, labels = next(iter(loader()))
    assert torch.equal(loaded(images), module.eval()(images)) and loaded(images).argmax(dim=1).tolist() == labels.tolist()
    assert loaded.results() == module.results()


class SetHead(Callback):
    """Makes the classifier always say one class in each epoch."""

    def __init__(self, answers):
        self.answers = answers

    def on_validation_epoch_start(self, trainer, module):
        module.head.weight.data.zero_()
        module.head.bias.data = torch.arange(len(module.head.bias)).eq(self.answers[trainer.current_epoch]).float()


def test_last_and_best_epoch():
    images = torch.randn(10, 3, 16, 16)
    val = DataLoader(TensorDataset(images, torch.tensor([0] * 5 + [1] * 3 + [2] * 2)), batch_size=4)
    module = FineTune(vit(), 3, warmup_epochs=0)
    fit(module, loader(), val, epochs=3, callbacks=[SetHead([1, 0, 2])])
    result = module.results()
    assert (result.last[0], result.best[0], result.best_epoch) == pytest.approx((0.2, 0.5, 1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"min_lr": 1.0}, "min_lr at most as large"),
        ({"layer_decay": 0.0}, "layer_decay must lie in"),
        ({"label_smoothing": 1.0}, "label_smoothing must lie in"),
        ({"warmup_epochs": -1}, "must not be negative"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        FineTune(vit(), **{"num_classes": 2, **options})


def test_a_warm_up_longer_than_the_run():
    with pytest.raises(ValueError, match="warmup_epochs=5 is 20 steps, but the run has only 8"):
        fit(FineTune(vit(), 2), loader(), epochs=2)


def test_the_command(small_checkpoint, tmp_path, monkeypatch, capsys):
    two_colours(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    command = ["finetune", "--checkpoint", small_checkpoint, "--root", "images", "--batch_size", "4", "--lr", "0.1"]
    main([*command, "--epochs", "4", "--warmup_epochs", "1", "--compare", "true", "--output", "tuned/cloth.ckpt"])
    text = capsys.readouterr().out
    assert "16 images of" in text and "\nuntrained" in text and "\ntrained   100.0" in text
    assert [str(path) for path in Path("tuned").iterdir()] == ["tuned/cloth.ckpt"]
    assert {path.name for path in Path().iterdir()} == {"images", "tuned"}
    saved = torch.load("tuned/cloth.ckpt", weights_only=True)
    assert saved["global_step"] == 16 and saved["hyper_parameters"]["classes"] == ["a", "b"]
    backbone = DINOModule.load_from_checkpoint(small_checkpoint).teacher.backbone
    before = backbone.blocks[0].attn.qkv.weight.clone()
    tuned = FineTune.load_from_checkpoint("tuned/cloth.ckpt", backbone=backbone)
    assert not torch.equal(tuned.backbone.blocks[0].attn.qkv.weight, before)
    with pytest.raises(FileExistsError, match="give another --output"):
        main([*command, "--output", "tuned/cloth.ckpt"])


def test_resumed_within_an_epoch(tmp_path):
    """With crops and stochastic depth: the run ends as the one that was not interrupted."""
    root = two_colours(tmp_path / "images")
    folders = [ImageFolder(root / split) for split in ("train", "val")]
    states = []
    for ckpt_path in (None, tmp_path / "step=3.ckpt"):
        data = LabelledDataModule(*folders, (16, 16), batch_size=4)
        module = FineTune(vit(drop_path_rate=0.5), 2, lr=0.1, warmup_epochs=1)
        torch.manual_seed(len(states))
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, callbacks=[keep])
        trainer.fit(module, data, ckpt_path=ckpt_path)
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_overfitting_a_batch_in_double_precision(tmp_path):
    root = two_colours(tmp_path / "images")
    data = LabelledDataModule(*(ImageFolder(root / split) for split in ("train", "val")), (16, 16), batch_size=4)
    trainer = fit(FineTune(vit(), 2, lr=0.1, warmup_epochs=0), data, overfit_batches=1, precision="64-true")
    assert trainer.global_step == 2


def test_the_command_is_reproducible_in_half_precision(small_checkpoint, tmp_path):
    root = two_colours(tmp_path / "images", counts=(4, 2))
    options = dict(epochs=2, warmup_epochs=0, batch_size=4, precision="bf16-mixed")
    states = []
    for workers in (0, 1):
        torch.manual_seed(workers)
        path = tmp_path / f"{workers}.ckpt"
        finetune(small_checkpoint, str(root), output=str(path), num_workers=workers, **options)
        states.append(torch.load(path, weights_only=True)["state_dict"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
