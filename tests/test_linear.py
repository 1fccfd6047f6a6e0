"""Linear probes: their features, a sweep of rates in one pass, what is reported, and the command."""

from pathlib import Path

import pytest
import torch
from conftest import two_colours, write_images
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dino_lightning import VisionTransformer
from dino_lightning.classifiers.classification import accuracies, cross_entropy
from dino_lightning.classifiers.probe import LinearProbe
from dino_lightning.cli import main
from dino_lightning.data import ImageFolder
from dino_lightning.data.labelled import CachedFeatures, LabelledDataModule
from dino_lightning.data.views import CropViews, EvaluationViews
from dino_lightning.evaluation import linear_protocol, probe_features
from dino_lightning.evaluation.features import extract_features
from dino_lightning.tools.linear import linear


def vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, **{"embed_dim": 24, "depth": 3, "num_heads": 2, **options}).eval()


def fit(module, train, val=None, epochs=2, **options):
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, train, *([val] if val is not None else []))
    return trainer


def blobs(count=60, classes=3, width=8, spread=0.3, seed=0):
    """Features around one corner for each class, and labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return 3 * torch.eye(classes, width)[labels] + spread * torch.randn(count, width, generator=random), labels


def test_features_by_hand():
    backbone, images = vit(), torch.randn(2, 3, 32, 32)
    tokens = backbone._tokens(images)
    layers = []
    for block in backbone.blocks:
        tokens = block(tokens)
        layers.append(backbone.norm(tokens))
    torch.testing.assert_close(probe_features(backbone, images), layers[2][:, 0])
    expected = torch.cat([layers[1][:, 0], layers[2][:, 0], layers[2][:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(probe_features(backbone, images, n_blocks=2, mean_patch=True), expected)
    cnn = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.testing.assert_close(probe_features(cnn, images), cnn(images))
    for options in ({"n_blocks": 2}, {"mean_patch": True}):
        with pytest.raises(ValueError, match="Sequential has no such tokens"):
            probe_features(cnn, images, **options)
    with pytest.raises(ValueError, match="between 1 and the depth 3, got 4"):
        probe_features(backbone, images, n_blocks=4)


def test_the_reference_protocol():
    with torch.device("meta"):
        assert linear_protocol(VisionTransformer(embed_dim=384, depth=12, num_heads=6)) == (4, False)
        assert linear_protocol(VisionTransformer(embed_dim=768)) == (1, True)
        assert linear_protocol(nn.Conv2d(3, 3, 1)) == (1, False)
    assert LinearProbe(vit(), num_classes=2).heads[0].in_features == 3 * 24, "no more blocks than there are"


def test_a_sweep_equals_separate_runs_of_each_rate():
    features, labels = blobs(50)

    def run(*rates):
        seed_everything(1)
        probe = LinearProbe(None, num_classes=3, rates=rates, in_features=8)
        loaders = CachedFeatures(features, labels).loader(16, shuffle=True), CachedFeatures(features, labels).loader(16)
        fit(probe, *loaders, epochs=3)
        return probe

    rates = (0.01, 1.0, 30.0)
    together = run(*rates)
    for rate, head in zip(rates, together.heads):
        alone = run(rate)
        assert torch.equal(alone.heads[0].weight, head.weight) and torch.equal(alone.heads[0].bias, head.bias)
        assert alone.results()[rate] == together.results()[rate]
    assert not torch.equal(together.heads[0].weight, together.heads[1].weight)


def test_the_steps_by_hand():
    """SGD with momentum 0.9 and a cosine per epoch, the rate scaled by 32 · 2 images a step over 256."""
    features, labels = blobs(128)
    torch.manual_seed(0)
    probe = LinearProbe(None, num_classes=3, rates=[2.0], in_features=8)
    by_hand = nn.Linear(8, 3)
    by_hand.load_state_dict(probe.heads[0].state_dict())
    assert 0.005 < by_hand.weight.std() < 0.015 and not by_hand.bias.any()
    trainer = fit(probe, CachedFeatures(features, labels).loader(32), epochs=3, accumulate_grad_batches=2)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1.0, momentum=0.9)
    for factor in (1.0, 0.75, 0.25):  # (1 + cos(π · epoch / 3)) / 2
        optimizer.param_groups[0]["lr"] = 2.0 * 64 / 256 * factor
        for rows in torch.arange(128).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand(features[rows]), labels[rows]).backward()
            optimizer.step()
    assert trainer.global_step == 6
    torch.testing.assert_close(probe.heads[0].weight, by_hand.weight)
    torch.testing.assert_close(probe.heads[0].bias, by_hand.bias)


def test_cached_features_train_as_images_do(tmp_path):
    root = two_colours(tmp_path)
    train = ImageFolder(root / "train")
    query = ImageFolder(root / "val")
    views, options = {"size": (32, 32), "in_chans": 3}, {"num_classes": 2, "rates": (0.1, 1.0)}
    data = LabelledDataModule(train, query, (32, 32), batch_size=4)
    pixels = torch.stack([view for view, _ in EvaluationViews(train, **views)])
    images, _ = data.on_after_batch_transfer((pixels, None), 0)
    labels = torch.tensor(train.labels)
    backbone = vit()
    seed_everything(0)
    uncached = LinearProbe(backbone, **options)
    fit(uncached, DataLoader(TensorDataset(images, labels), batch_size=4), data.val_dataloader(), limit_val_batches=0)
    features, again = extract_features(uncached.features, train, **views)
    assert torch.equal(again, labels) and features.shape == (16, 72)
    seed_everything(0)
    cached = LinearProbe(None, in_features=72, **options)
    fit(cached, CachedFeatures(features, labels).loader(4))
    for one, other in zip(uncached.heads, cached.heads):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-5, atol=1e-7)


def test_the_backbone_stays_as_it_is():
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    probe = LinearProbe(backbone, num_classes=2, rates=[1.0])
    seen = []
    backbone.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 2), batch_size=4)
    trainer = fit(probe.train(), loader, loader)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert set(seen) == {(False, False)}
    assert {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]} == {id(p) for p in probe.heads.parameters()}
    assert probe(torch.randn(5, 3, 16, 16)).shape == (1, 5, 2)


class SetHeads(Callback):
    """Gives the classifiers fixed answers in each epoch."""

    def __init__(self, answers):
        self.answers = answers  # by epoch, for each rate the class that it always says

    def on_validation_epoch_start(self, trainer, module):
        for head, answer in zip(module.heads, self.answers[trainer.current_epoch]):
            head.weight.data.zero_()
            head.bias.data = torch.arange(len(head.bias)).eq(answer).float()


def test_last_and_best_epoch_of_each_rate():
    """Of ten queries 5, 3 and 2 are of the classes 0, 1 and 2."""
    train = CachedFeatures(*blobs(8)).loader(4)
    val = CachedFeatures(torch.zeros(12, 8), torch.tensor([0] * 5 + [1] * 3 + [2] * 2 + [-1] * 2)).loader(4)
    probe = LinearProbe(None, num_classes=3, rates=(0.1, 0.2), in_features=8)
    answers = [(1, 2), (0, 1), (2, 1), (0, 2)]
    trainer = fit(probe, train, val, epochs=4, callbacks=[SetHeads(answers)], num_sanity_val_steps=1)
    first, second = probe.results().values()
    assert [first.last[0], first.best[0], first.best_epoch] == pytest.approx([0.5, 0.5, 1]), "the first of equal ones"
    assert [second.last[0], second.best[0], second.best_epoch] == pytest.approx([0.2, 0.3, 1])
    assert first.last[1] == first.best[1] == 1.0, "top-5 of three classes is top-all"
    logged = trainer.callback_metrics
    assert logged["val/linear_top1"] == logged["val/linear_top1_lr_0.1"] == 0.5
    assert logged["val/linear_top1_lr_0.2"] == pytest.approx(0.2) and logged["val/linear_top5"] == 1
    (tested,) = trainer.test(probe, val, verbose=False)
    assert tested["test/linear_top1_lr_0.1"] == 0.5 and tested["test/linear_top5"] == 1
    state = probe.state_dict()
    fresh = LinearProbe(None, num_classes=3, rates=(0.1, 0.2), in_features=8)
    with pytest.raises(RuntimeError, match="no epoch was validated"):
        fresh.results()
    fresh.load_state_dict(state)
    assert fresh.results() == probe.results(), "also after a resume"


def test_accuracies_and_loss_leave_out_what_has_no_label():
    logits, labels = torch.randn(200, 8), torch.randint(-1, 8, (200,))
    logits[:7] = torch.eye(8)[labels[:7].clamp(min=0)]  # in the first batch top-1 and top-5 agree
    metrics = accuracies(8)
    for rows in torch.arange(200).split(7):
        metrics.update(logits[rows], labels[rows])
    seen = labels >= 0
    hits = logits.topk(5).indices == labels[:, None]
    assert metrics.compute()["top1"] == pytest.approx(hits[seen, 0].float().mean().item())
    assert metrics.compute()["top5"] == pytest.approx(hits[seen].any(dim=1).float().mean().item())
    torch.testing.assert_close(cross_entropy(logits, labels), nn.functional.cross_entropy(logits[seen], labels[seen]))
    assert cross_entropy(logits, torch.full((200,), -1)) == 0


def test_crops_are_a_function_of_seed_epoch_and_index(image_folder):
    (image_folder / "0003.jpg").write_text("not an image")
    views = CropViews(ImageFolder(image_folder), (24, 32), 3, seed=1)
    crop, _ = views[2, 5]
    assert crop.shape == (3, 24, 32) and crop.dtype == torch.uint8
    assert torch.equal(crop, views[2, 5][0]) and not torch.equal(crop, views[3, 5][0])
    assert not torch.equal(crop, CropViews(ImageFolder(image_folder), (24, 32), 3, seed=2)[2, 5][0])
    black, label = views[0, 3]
    assert label == -1 and not black.any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rates": ()}, "rates must be positive"),
        ({"rates": (0.1, -1.0)}, "rates must be positive"),
        ({"rates": (0.1, 0.1)}, "none twice"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"in_features": None}, "give in_features, their width"),
        ({"n_blocks": 2}, "neither n_blocks nor mean_patch; got in_features=8, n_blocks=2"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe(None, **{"num_classes": 3, "in_features": 8, **options})


def test_the_command_tells_colours_apart(small_checkpoint, tmp_path, monkeypatch, capsys, caplog):
    root = two_colours(tmp_path / "images")
    (root / "train" / "a" / "2.jpg").write_text("not an image")
    monkeypatch.chdir(tmp_path)
    command = ["linear", "--checkpoint", small_checkpoint, "--root", "images", "--epochs", "8", "--batch_size", "4"]
    main([*command, "--rates", "[0.001, 1]", "--compare", "true", "--output", "saved/heads.pt"])
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if " lr " in line]
    assert [row[:3] for row in rows] == [[name, "lr", rate] for name in ("untrained", "trained") for rate in ("0.001", "1")]
    assert rows[3][3] == "100.0" and "48 features" in text, "separable images"
    assert "chose the best rate and the best epoch" in text and "2.jpg" in caplog.text
    saved = torch.load("saved/heads.pt", weights_only=True)
    assert saved["classes"] == ["a", "b"] and saved["rates"] == [0.001, 1] and saved["n_blocks"] == 2
    assert saved["heads"][1]["weight"].shape == (2, 48)
    assert {path.name for path in Path().iterdir()} == {"images", "saved"}, "nothing else is written"
    with pytest.raises(FileExistsError, match="give another --output"):
        main([*command, "--output", "saved/heads.pt"])


def test_the_command_with_augmentation_is_reproducible(small_checkpoint, tmp_path, capsys):
    root = two_colours(tmp_path)
    options = dict(epochs=3, batch_size=8, rates=(1.0,), augment=True, n_blocks=1, mean_patch=True)
    results = [linear(small_checkpoint, str(root), num_workers=workers, **options) for workers in (0, 2)]
    assert results[0] == results[1] and results[0]["trained"][1.0].last[0] == 1.0
    assert "48 features" in capsys.readouterr().out


def test_the_command_names_what_is_wrong(small_checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of queries in .*; looked for dev"):
        linear(small_checkpoint, str(tmp_path), queries="dev")
    write_images(tmp_path / "flat/train", 2)
    write_images(tmp_path / "flat/val", 2)
    with pytest.raises(ValueError, match="flat/train has no class folders"):
        linear(small_checkpoint, str(tmp_path / "flat"))
    root = two_colours(tmp_path / "more")
    write_images(root / "val" / "c", 1)
    with pytest.raises(ValueError, match="the folder 'c', and only these classes are known: a, b"):
        linear(small_checkpoint, str(root))
    root = two_colours(tmp_path / "images")
    with pytest.raises(ValueError, match="patch size 8 does not divide the image size 36×36"):
        linear(small_checkpoint, str(root), image_size=36)
    with pytest.raises(ValueError, match="between 1 and the depth 2, got 3"):
        linear(small_checkpoint, str(root), n_blocks=3)
    for name in ("a", "b"):
        for path in (root / "val" / name).iterdir():
            path.write_text("not an image")
    with pytest.raises(ValueError, match="none of the 8 images of .*val could be read"):
        linear(small_checkpoint, str(root))
