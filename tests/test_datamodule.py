"""Folders and Datasets in, batches out: any number of workers, unreadable files, bad input."""

import logging
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_images
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.tuner import Tuner
from PIL import Image
from torch.utils.data import Dataset

from dino_lightning import DINOModule, MultiCropDataModule, VisionTransformer
from dino_lightning.data import ImageFolder
from dino_lightning.data.sampler import EpochSampler
from dino_lightning.data.unreadable import UnreadableImagesError, UnreadableLedger
from dino_lightning.data.views import Unpainted

SMALL = dict(global_crops_size=32, local_crops_size=16, local_crops_number=2, batch_size=4, num_workers=0)


class Collector(LightningModule):
    """Trains nothing and remembers the batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches, self.validated, self.predicted = [], [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight * batch[0][0].mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append((dataloader_idx, *batch))

    def predict_step(self, batch, batch_idx):
        self.predicted.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(datamodule, **options):
    module = Collector()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", devices=1, **{"max_epochs": 1, **quiet, **options})
    trainer.fit(module, datamodule)
    return module, trainer


def test_batches_are_views_and_labels(image_folder):
    module, _ = fit(MultiCropDataModule(image_folder, **SMALL))
    assert len(module.batches) == 6
    views, labels = module.batches[0]
    assert [tuple(view.shape) for view in views] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 2
    assert all(view.dtype == torch.float32 for view in views) and labels.tolist() == [-1] * 4
    assert -2.2 < min(v.min() for v in views) and max(v.max() for v in views) < 2.7, "normalised"


def test_two_workers_give_the_same_batches_as_none(image_folder):
    one, _ = fit(MultiCropDataModule(image_folder, **SMALL), max_epochs=2)
    two, _ = fit(MultiCropDataModule(image_folder, **{**SMALL, "num_workers": 2}), max_epochs=2)
    assert len(one.batches) == len(two.batches) == 12
    for (views, _), (others, _) in zip(one.batches, two.batches):
        assert all(torch.equal(view, other) for view, other in zip(views, others))
    first, second = one.batches[0][0][0], one.batches[6][0][0]
    assert not torch.equal(first, second), "epochs differ"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_overfitting_a_batch_sees_other_crops_of_the_same_images(image_folder, num_workers, caplog):
    source = ImageFolder(image_folder)
    numbered = [(source[i][0], i) for i in range(len(source))]
    data = MultiCropDataModule(dataset=numbered, **{**SMALL, "num_workers": num_workers})
    module, _ = fit(data, max_epochs=2, overfit_batches=2)
    assert [labels.tolist() for _, labels in module.batches] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    for first, second in zip(module.batches[:2], module.batches[2:]):
        assert not any(torch.equal(one, other) for one, other in zip(first[0], second[0]))


def test_a_global_view_only(image_folder):
    module, _ = fit(MultiCropDataModule(image_folder, **{**SMALL, "local_crops_number": 0}))
    assert len(module.batches[0][0]) == 2


def test_views_need_not_be_square_and_may_be_equal(image_folder):
    sizes = dict(global_crops_size=(32, 48), local_crops_size=(32, 48))
    module, _ = fit(MultiCropDataModule(image_folder, **{**SMALL, **sizes}))
    assert {tuple(view.shape) for view in module.batches[0][0]} == {(4, 3, 32, 48)}


def test_seed_comes_from_seed_everything_unless_given(image_folder, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert MultiCropDataModule(image_folder).seed == 7 and MultiCropDataModule(image_folder, seed=3).seed == 3
    a, b = (fit(MultiCropDataModule(image_folder, seed=seed, **SMALL))[0].batches[0][0][0] for seed in (3, 4))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("nested", ["", "deep/er", "class"])
def test_flat_nested_and_class_folders(tmp_path, nested):
    if nested == "class":
        write_images(tmp_path / "cat", 4)
        write_images(tmp_path / "dog", 4, first=4)
    else:
        write_images(tmp_path / nested, 8)
    module, _ = fit(MultiCropDataModule(tmp_path, **SMALL))
    labels = torch.cat([labels for _, labels in module.batches]).sort().values.tolist()
    assert labels == ([0] * 4 + [1] * 4 if nested == "class" else [-1] * 8)
    assert not module.validated


def test_splits_give_bank_and_queries(tmp_path):
    for split, count in (("train", 8), ("validation", 2)):
        for i, name in enumerate(("cat", "dog")):
            write_images(tmp_path / split / name, count, first=10 * i)
    module, _ = fit(MultiCropDataModule(tmp_path, **SMALL), num_sanity_val_steps=0)
    assert len(module.batches) == 4, "only train/ is trained on"
    bank = torch.cat([labels for loader, _, labels in module.validated if loader == 0])
    queries = torch.cat([labels for loader, _, labels in module.validated if loader == 1])
    assert bank.tolist() == [0] * 8 + [1] * 8 and queries.tolist() == [0, 0, 1, 1]
    images = module.validated[0][1]
    assert images.shape[1:] == (3, 32, 32) and images.dtype == torch.float32 and images.min() < 0


def test_predict_gives_images_and_paths(image_folder):
    datamodule = MultiCropDataModule(image_folder, **SMALL)
    module, trainer = fit(datamodule)
    trainer.predict(module, datamodule)
    paths = [path for _, paths in module.predicted for path in paths]
    assert paths == [str(image_folder / f"{i:04d}.jpg") for i in range(24)]
    assert module.predicted[0][0].shape == (4, 3, 32, 32)


class Arrays(Dataset):
    """A user's Dataset: (image, label, name) of any kind of image."""

    def __init__(self, convert, n=8):
        self.convert, self.n = convert, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3)).astype(np.uint8)
        return self.convert(pixels)


def test_any_map_style_dataset():
    expected = None
    for convert in (
        lambda x: x,
        lambda x: Image.fromarray(x),
        lambda x: (Image.fromarray(x), 5),
        lambda x: (torch.from_numpy(x).permute(2, 0, 1), 5, "name"),
        lambda x: (torch.from_numpy(x).permute(2, 0, 1).float() / 255, torch.tensor(5)),
    ):
        module, _ = fit(MultiCropDataModule(dataset=Arrays(convert), **SMALL))
        views, labels = module.batches[0]
        expected = views if expected is None else expected
        assert all(torch.equal(view, other) for view, other in zip(views, expected))
        assert set(labels.tolist()) == ({5} if isinstance(convert(np.zeros((4, 4, 3), np.uint8)), tuple) else {-1})


def test_other_channel_counts(tmp_path):
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).integers(0, 4000, (40, 50, 5)).astype(np.uint16))
    module, _ = fit(MultiCropDataModule(tmp_path, in_chans=5, **SMALL))
    assert module.batches[0][0][0].shape == (4, 5, 32, 32)
    with pytest.raises(ValueError, match="mean has 3 values"):
        MultiCropDataModule(tmp_path, in_chans=5, mean=(0.5, 0.5, 0.5))


def test_unreadable_images_are_replaced_counted_and_named(image_folder, caplog):
    (image_folder / "0003.jpg").write_bytes((image_folder / "0003.jpg").read_bytes()[:400])
    (image_folder / "0005.jpg").write_text("not an image")
    batches = []
    for workers in (0, 2):
        caplog.clear()
        datamodule = MultiCropDataModule(image_folder, max_unreadable=0.2, **{**SMALL, "num_workers": workers})
        with caplog.at_level(logging.WARNING, "dino_lightning"):
            batches.append(fit(datamodule, max_epochs=2)[0].batches)
        (message,) = [record.getMessage() for record in caplog.records if "could not be read" in record.getMessage()]
        assert "2 of the 24 images of epoch 0" in message and "0003.jpg" in message and "0005.jpg" in message
    for (views, _), (others, _) in zip(*batches):
        assert len(views[0]) == 4 and all(torch.equal(view, other) for view, other in zip(views, others))


def test_files_that_change_behind_the_listing(image_folder, caplog):
    """One is gone, one is another image now, one is a pipe, one may not be read (but by root)."""
    datamodule = MultiCropDataModule(image_folder, max_unreadable=0.2, **SMALL)
    datamodule.setup("fit")
    (image_folder / "0003.jpg").unlink()
    (image_folder / "0005.jpg").write_bytes((image_folder / "0006.jpg").read_bytes())
    (image_folder / "0007.jpg").unlink()
    os.mkfifo(image_folder / "0007.jpg")
    (image_folder / "0009.jpg").chmod(0)
    with caplog.at_level(logging.WARNING, "dino_lightning"):
        fit(datamodule)
    (message,) = [record.getMessage() for record in caplog.records if "could not be read" in record.getMessage()]
    assert "0003.jpg: [Errno 2]" in message and "0007.jpg: a pipe, a device or a folder" in message and "0005.jpg" not in message
    assert os.geteuid() == 0 or "0009.jpg: [Errno 13]" in message


def test_unreadable_images_are_left_out_of_monitors_and_predictions(tmp_path, caplog):
    for split, count in (("train", 8), ("val", 3)):
        for i, name in enumerate(("cat", "dog")):
            write_images(tmp_path / split / name, count, first=10 * i)
    (tmp_path / "train/cat/0003.jpg").write_text("not an image")
    (tmp_path / "val/cat/0001.jpg").write_text("not an image")
    datamodule = MultiCropDataModule(tmp_path, max_unreadable=0.1, **SMALL)
    with caplog.at_level(logging.WARNING, "dino_lightning"):
        module, trainer = fit(datamodule, num_sanity_val_steps=0)
        trainer.predict(module, datamodule)
    assert [labels.tolist() for loader, _, labels in module.validated if loader == 1] == [[0, -1, 0, 1], [1, 1]]
    assert [labels.tolist() for loader, _, labels in module.validated if loader == 0][0] == [0, 0, 0, -1]
    assert sum(len(paths) for _, paths in module.predicted) == sum(len(x) for x, _ in module.predicted) == 20
    assert "train/cat/0003.jpg" in caplog.text and "val/cat/0001.jpg" in caplog.text


def test_a_run_that_ends_in_mid_epoch_counts_unreadable_images_too(image_folder):
    for i in range(0, 24, 2):
        (image_folder / f"{i:04d}.jpg").write_text("not an image")
    with pytest.raises(RuntimeError, match="could not be read, more than max_unreadable"):
        fit(MultiCropDataModule(image_folder, **SMALL), max_epochs=-1, max_steps=3)


def test_train_as_a_class_and_queries_without_labels(tmp_path, caplog):
    for i, name in enumerate(("car", "plane", "train")):
        write_images(tmp_path / "transport" / name, 4, first=10 * i)
    module, _ = fit(MultiCropDataModule(tmp_path / "transport", **SMALL))
    assert {int(label) for _, labels in module.batches for label in labels} == {0, 1, 2}
    write_images(tmp_path / "kaggle/train/a", 4)
    write_images(tmp_path / "kaggle/train/b", 4, first=4)
    write_images(tmp_path / "kaggle/test", 3)
    with caplog.at_level(logging.WARNING, "dino_lightning"):
        module, _ = fit(MultiCropDataModule(tmp_path / "kaggle", **SMALL))
    assert len(module.batches) == 2 and not module.validated and "kaggle/test is not monitored" in caplog.text


def test_the_bank_is_capped(tmp_path):
    for split, count in (("train", 8), ("val", 2)):
        for i, name in enumerate(("cat", "dog")):
            write_images(tmp_path / split / name, count, first=10 * i)
    module, _ = fit(MultiCropDataModule(tmp_path, max_bank=6, **SMALL), num_sanity_val_steps=0)
    assert sum(len(labels) for loader, _, labels in module.validated if loader == 0) == 6


def test_too_many_unreadable_images_stop_the_run(image_folder):
    (image_folder / "0003.jpg").write_text("not an image")
    with pytest.raises(RuntimeError, match=r"1 of 24 images could not be read, more than max_unreadable=0.01(.|\n)*0003.jpg"):
        fit(MultiCropDataModule(image_folder, **SMALL))


def test_nothing_but_unreadable_images(image_folder):
    for path in image_folder.iterdir():
        path.write_text("not an image")
    with pytest.raises(RuntimeError, match="10 images in a row could not be read"):
        fit(MultiCropDataModule(image_folder, **SMALL))


@pytest.mark.slow
def test_the_batch_size_that_the_finder_finds_is_trained_with(image_folder, tmp_path):
    def start(batch_size, **options):
        torch.manual_seed(0)
        backbone = VisionTransformer(32, 8, embed_dim=24, depth=1, num_heads=2)
        module = DINOModule(backbone, out_dim=64, hidden_dim=32, lr=0.1, warmup_epochs=1)
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, **quiet, **options)
        return module, MultiCropDataModule(image_folder, **{**SMALL, "batch_size": batch_size}), trainer

    module, data, trainer = start(4)
    assert Tuner(trainer).scale_batch_size(module, datamodule=data, init_val=16) == data.batch_size == 24, "all images there are"
    trainer.fit(module, data)
    assert module.global_step == 2 and module._layout["images_per_step"] == 24 and module._plan.lr == 0.1 * 24 / 256

    module, data, trainer = start(4, callbacks=[BatchSizeFinder(max_trials=3)])
    trainer.fit(module, data)
    whole, data, trainer = start(8)
    trainer.fit(whole, data)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in whole.state_dict().items()), "with 2 · 2 · 2"
    assert not list(tmp_path.glob(".scale_batch_size*"))
    module, data, trainer = start(4, callbacks=[BatchSizeFinder(max_trials=2)])
    module.options["warmup_epochs"] = 3
    with pytest.raises(ValueError, match="warmup_epochs=3"):
        trainer.fit(module, data)


@pytest.mark.parametrize("precision, dtype", [("64-true", torch.float64), ("bf16-mixed", torch.float32)])
def test_painted_views_have_the_precision_of_the_run(image_folder, precision, dtype, tmp_path):
    write_images(tmp_path / "val/a", 4, first=30)
    for name in "ab":
        write_images(tmp_path / "train" / name, 4, first=10 * ord(name))
    module, _ = fit(MultiCropDataModule(tmp_path, **SMALL), precision=precision)
    assert {view.dtype for views, _ in module.batches for view in views} == {dtype}
    assert module.validated and {images.dtype for _, images, _ in module.validated} == {dtype}
    backbone = VisionTransformer(32, 8, embed_dim=24, depth=1, num_heads=2)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", max_epochs=1, precision=precision, **quiet)
    trainer.fit(DINOModule(backbone, out_dim=64, hidden_dim=32, warmup_epochs=0), MultiCropDataModule(image_folder, **SMALL))
    assert trainer.global_step == 6


def test_errors_before_training(tmp_path, image_folder):
    with pytest.raises(ValueError, match="24 images are fewer than one batch: batch_size=25"):
        fit(MultiCropDataModule(image_folder, **{**SMALL, "batch_size": 25}))
    (tmp_path / "empty" / "a" / "b").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/empty"):
        fit(MultiCropDataModule(tmp_path / "empty", **SMALL))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit(MultiCropDataModule(tmp_path / "nowhere", **SMALL))
    with pytest.raises(ValueError, match="either root or dataset"):
        MultiCropDataModule()
    with pytest.raises(TypeError, match="map-style"):
        MultiCropDataModule(dataset=iter([]))
    with pytest.raises(ValueError, match="global_crops_size: a size must be one number or"):
        MultiCropDataModule(image_folder, global_crops_size=(96, 96, 3))


def test_ranks_share_one_permutation():
    def indices(rank, world, batch):
        sampler = EpochSampler(range(22), batch, world, rank, seed=1)
        sampler.set_epoch(3)
        return [index for epoch, index in sampler if epoch == 3]

    whole, ranks = indices(0, 1, 4), [indices(r, 2, 2) for r in (0, 1)]
    assert sorted(whole) == list(range(22)) and sorted(ranks[0] + ranks[1]) == list(range(22))
    for step in range(5):
        together = ranks[0][2 * step : 2 * step + 2] + ranks[1][2 * step : 2 * step + 2]
        assert sorted(together) == sorted(whole[4 * step : 4 * step + 4])
    other = EpochSampler(range(22), 4, seed=1)
    assert [index for _, index in other] != whole, "epochs differ"


def test_sampler_goes_on_where_it_stopped():
    whole = list(EpochSampler(range(20), 4, position=lambda: (2, 0)))
    assert list(EpochSampler(range(20), 4, position=lambda: (2, 3))) == whole[12:]


def test_a_resumed_epoch_counts_its_own_images():
    """One broken image shortly behind the place where a run went on is no large share of the epoch."""
    ledger, batch = UnreadableLedger(0.01), Unpainted([], [], torch.zeros(64), [])

    def trainer(done):
        progress = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=done)))
        return SimpleNamespace(
            fit_loop=SimpleNamespace(epoch_loop=progress),
            num_training_batches=2000,
            global_step=0,
            max_steps=-1,
            is_global_zero=True,
            current_epoch=0,
        )

    ledger.note(trainer(498), batch._replace(unreadable=["a.jpg: broken"]))
    ledger.note(trainer(499), batch)
    with pytest.raises(UnreadableImagesError, match="1300 of 128000 images"):
        ledger.note(trainer(999), batch._replace(unreadable=[f"{i}.jpg" for i in range(1299)]))


def test_a_hook_of_a_subclass_is_called_once_a_batch(image_folder):
    class Counting(MultiCropDataModule):
        calls = 0

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.calls += 1
            return super().on_after_batch_transfer(batch, dataloader_idx)

    data = Counting(image_folder, **SMALL)
    module = DINOModule("shufflenet_v2_x0_5", img_size=32, out_dim=8, hidden_dim=8, warmup_epochs=0)
    trainer = Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(module, data)
    assert data.calls == 2


@pytest.mark.parametrize("options, words", [(dict(std=(0.2, 0.0, 0.2)), "std must be of levels"), (dict(mean=(123.7, 116.3, 103.5)), "mean must be of levels"),
                                            (dict(max_unreadable=2), "max_unreadable is a share")])  # fmt: skip
def test_numbers_out_of_their_range_are_named(options, words, image_folder):
    with pytest.raises(ValueError, match=words):
        MultiCropDataModule(image_folder, **options)
