"""The linear classifier that learns beside DINO: from the teacher's features, without changing the run, on ranks and resumed."""

import pytest
import torch
from conftest import two_colours, write_images, write_labelled
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from two_ranks import Uneven, train

from dino_lightning.callbacks import OnlineProbe, Throughput


@pytest.fixture
def folder(tmp_path):
    return write_labelled(tmp_path)


def run(folder, *callbacks, batch_size=4, drop_path_rate=0.3, **options):
    return train(folder, batch_size=batch_size, devices=1, drop_path_rate=drop_path_rate, callbacks=callbacks, **options)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_dino_ends_as_without_it(folder):
    without, beside = run(folder), run(folder, OnlineProbe())
    assert same(without["state"], beside["state"]) and without["losses"] == beside["losses"]
    assert set(beside["metrics"]) - set(without["metrics"]) == {"val/probe_top1", "val/probe_top5"}


class Recorder(Callback):
    """The teacher's features of the global crops, the labels, and what is logged, of each batch."""

    def __init__(self):
        self.batches, self.losses = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        with torch.no_grad():
            self.batches.append((torch.cat([module.teacher.backbone(view) for view in batch[0][:2]]), batch[1].repeat(2)))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train/probe_loss"].item())


def test_it_is_sgd_on_the_teachers_features(folder):
    probe, recorder = OnlineProbe(lr=2.0), Recorder()
    run(folder, recorder, probe)  # the recorder's own calls come before the probe listens
    assert len(recorder.batches) == 8
    head = nn.Linear(24, 2)
    start = OnlineProbe()
    start._classes = 2
    start._begin(torch.zeros(1, 24))
    head.load_state_dict(start._head.state_dict())
    optimizer = torch.optim.SGD(head.parameters(), lr=2.0 * 4 / 256, momentum=0.9)
    for (features, labels), logged in zip(recorder.batches, recorder.losses):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(features), labels)
        loss.backward()
        optimizer.step()
        assert logged == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(probe.state_dict()["head"]["weight"], head.weight.detach())


@pytest.mark.parametrize("step", [1, 4, 6])
def test_resumed_it_goes_on(folder, step):
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(folder, keep, OnlineProbe(), enable_checkpointing=True)
    path = folder / f"step={step}.ckpt"
    assert set(torch.load(path, weights_only=True)["callbacks"]["OnlineProbe"]) == {"head", "optimizer"}
    resumed = run(folder, OnlineProbe(), ckpt_path=path)
    assert same(whole["probes"][0]["head"], resumed["probes"][0]["head"]), "bit-equal"
    assert whole["metrics"] == resumed["metrics"]


def test_other_callbacks_may_call_the_teacher(folder):
    """As the throughput meter does before the first step, to count its operations."""
    alone, beside = run(folder, OnlineProbe()), run(folder, OnlineProbe(), Throughput())
    assert same(alone["probes"][0]["head"], beside["probes"][0]["head"])


def test_micro_batches_equal_one_batch(folder):
    one = run(folder, OnlineProbe(), drop_path_rate=0.0, limit_train_batches=4)
    micro = run(
        folder, OnlineProbe(), drop_path_rate=0.0, batch_size=2, accumulate_grad_batches=2, limit_train_batches=8
    )  # fmt: skip
    for name, value in one["probes"][0]["head"].items():
        torch.testing.assert_close(micro["probes"][0]["head"][name], value, rtol=1e-4, atol=1e-6)


def test_it_learns_what_can_be_told(tmp_path):
    two_colours(tmp_path / "images")
    assert run(tmp_path, OnlineProbe(lr=10.0))["metrics"]["val/probe_top1"] == 1


class Labelled(Uneven):
    """A user's own loader: batches (views, labels), of which some samples have none."""

    labels = (0, 1, -1, 1, 0, -1, -1, -1, 0, 1)

    def train_dataloader(self):
        torch.manual_seed(0)
        samples = [(list(torch.rand(2, 3, 32, 32)), label) for label in self.labels]
        return DataLoader(samples, batch_size=self.batch_size)


def test_samples_without_a_label_play_no_part(folder, monkeypatch):
    monkeypatch.setattr("two_ranks.MultiCropDataModule", Labelled)
    recorder, probe = Recorder(), OnlineProbe(num_classes=2)
    run(folder, recorder, probe, batch_size=2)
    # Batches (0, 1), (-1, 1), (0, -1), (-1, -1), (0, 1)
    assert [loss != loss for loss in recorder.losses] == 2 * [False, False, False, True, False]
    assert all(value.isfinite().all() for value in probe.state_dict()["head"].values())


@pytest.mark.parametrize(
    "labels, error, message",
    [((0, 7) * 5, ValueError, "a label is 7, but with num_classes=2"), ((0.5,) * 10, TypeError, "integer labels")],
)
def test_wrong_labels(folder, monkeypatch, labels, error, message):
    monkeypatch.setattr("two_ranks.MultiCropDataModule", Labelled)
    monkeypatch.setattr(Labelled, "labels", labels)
    with pytest.raises(error, match=message):
        run(folder, OnlineProbe(num_classes=2))


def test_without_classes_it_says_what_is_missing(tmp_path):
    write_images(tmp_path / "images", 8)
    with pytest.raises(ValueError, match="the training data name no classes"):
        run(tmp_path, OnlineProbe())
    with pytest.raises(ValueError, match="lr must be positive, got 0"):
        OnlineProbe(lr=0)


def test_a_validation_without_queries_has_no_accuracy(folder):
    """A single loader, whose batches are of a bank."""

    class One(Callback):
        def on_fit_start(self, trainer, module):
            self.loaders = trainer.datamodule.val_dataloader
            trainer.datamodule.val_dataloader = lambda: self.loaders()[0]

    assert not any(name.startswith("val/probe") for name in run(folder, One(), OnlineProbe())["metrics"])
