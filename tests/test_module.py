"""DINOModule in a real Trainer: teacher, precision, non-finite losses, checkpoints, bad input."""

import copy
import logging
import os
import pickle
import warnings
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision, TorchSyncBatchNorm
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dino_lightning import DINOModule, VisionTransformer
from dino_lightning.callbacks import OnlineKNN
from dino_lightning.methods.batch import split_views
from dino_lightning.methods.networks import Network
from dino_lightning.training.guard import NonFiniteLossError

OPTIONS = dict(out_dim=64, hidden_dim=32, bottleneck_dim=16, warmup_epochs=0)


def tiny_vit(**options):
    return VisionTransformer(**{"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, **options})


class BatchNormNet(nn.Sequential):
    def __init__(self, channels=3):
        super().__init__(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_module(backbone=None, **options):
    return DINOModule(backbone=backbone or tiny_vit(), **{**OPTIONS, **options})


def views_of(n_samples, sizes=((32, 32), (32, 32), (16, 16)), seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(channels, *size, generator=generator) for size in sizes] for _ in range(n_samples)]


def loader_of(n_samples=8, batch_size=4, **options):
    return DataLoader(views_of(n_samples, **options), batch_size=batch_size)


def fit(module, loader=None, ckpt_path=None, **options):
    defaults = dict(accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False,
                    enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    trainer = Trainer(**{**defaults, **options})
    trainer.fit(module, loader if loader is not None else loader_of(), ckpt_path=ckpt_path)
    return trainer


def same(a, b):
    return all(torch.equal(value, b[key]) for key, value in a.items()) and a.keys() == b.keys()


# the networks


def test_teacher_starts_as_a_frozen_copy_without_drop_path():
    module = build_module(tiny_vit(drop_path_rate=0.5))
    assert same(module.student.state_dict(), module.teacher.state_dict())
    assert not any(p.requires_grad for p in module.teacher.parameters())
    for mode in (module.train, module.eval):
        mode()
        assert not any(m.training for m in module.teacher.modules())
    x = [torch.randn(4, 3, 32, 32)] * 2
    module.train()
    assert torch.equal(module.teacher(x), module.teacher(x)) and not torch.equal(module.student(x), module.student(x))


def test_batch_norms_of_the_teacher_train_on_buffers_of_their_own():
    module = build_module(BatchNormNet(), use_bn_in_head=True)
    for mode in (module.train, module.eval):
        mode()
        assert {type(m) for m in module.teacher.modules() if m.training} == {nn.BatchNorm2d, nn.BatchNorm1d}
    fit(module)
    student, teacher = module.student.backbone[1], module.teacher.backbone[1]
    assert teacher.num_batches_tracked == 4 and not torch.equal(student.running_mean, teacher.running_mean)
    before = teacher.running_mean.clone()
    images = torch.randn(3, 3, 32, 32)
    assert torch.allclose(module(images)[:1], module(images[:1]), atol=1e-6), "features use the running statistics"
    assert torch.equal(teacher.running_mean, before) and teacher.training


def test_synchronised_batch_norms_replace_those_of_both_networks():
    """On a CPU they can only be had without other ranks, where they must do what the plain ones do."""
    plain, synchronised = (copy.deepcopy(build_module(BatchNormNet(), use_bn_in_head=True)) for _ in range(2))
    synchronised.load_state_dict(plain.state_dict())
    TorchSyncBatchNorm().apply(synchronised)
    norms = [m for m in synchronised.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == 6 and not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in synchronised.modules())
    for module in (plain, synchronised):
        module.student.backbone[3].p = 0.0
        fit(module)
    assert all(m.training for m in synchronised.teacher.modules() if isinstance(m, nn.SyncBatchNorm))
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(synchronised.state_dict()[key], value)


def test_one_backbone_call_per_size_and_one_head_call():
    calls = []
    network = Network(tiny_vit(), nn.Linear(24, 5))
    network.backbone.register_forward_hook(lambda m, x, y: calls.append(tuple(x[0].shape)))
    network.head.register_forward_hook(lambda m, x, y: calls.append(tuple(x[0].shape)))
    views = [torch.randn(2, 3, *size) for size in ((32, 32), (16, 24), (32, 32), (16, 24), (16, 24))]
    logits = network(views)
    assert calls == [(4, 3, 32, 32), (6, 3, 16, 24), (10, 24)]
    assert torch.allclose(logits, torch.cat([network([view]) for view in views]), atol=1e-6), "views-major"


def test_features_of_the_teacher():
    module = build_module()
    with torch.no_grad():
        module.teacher.backbone.norm.bias.add_(1.0)
        assert torch.equal(module(torch.ones(2, 3, 32, 32)), module.teacher.backbone(torch.ones(2, 3, 32, 32)))
    features, paths = module.predict_step((torch.ones(2, 3, 32, 32), ["a", "b"]), 0)
    assert features.shape == (2, 24) and paths == ["a", "b"]
    out = module.validation_step((torch.ones(2, 3, 32, 32), torch.tensor([0, 1])), 0, 1)
    assert out["features"].shape == (2, 24) and out["labels"].tolist() == [0, 1]


# the training step


@pytest.mark.parametrize("sizes", [((32, 32),) * 2, ((32, 48), (32, 48), (16, 24)), ((16, 16),) * 5])
def test_views_of_any_size_and_count(sizes):
    module = build_module()
    fit(module, loader_of(sizes=sizes))
    assert module.loss.center.any()


@pytest.mark.parametrize("form", ["list", "tuple with labels", "nested tuple"])
def test_forms_of_a_batch(form):
    views = [torch.zeros(2, 3, 8, 8)] * 3
    batch = {"list": views, "tuple with labels": (views, torch.zeros(2)), "nested tuple": [tuple(views), ["a", "b"], 3]}
    assert len(split_views(batch[form])) == 3


def test_what_is_no_batch_of_views():
    with pytest.raises(TypeError, match="got Tensor"):
        split_views(torch.zeros(2, 3, 8, 8))
    with pytest.raises(TypeError, match="list of"):
        split_views([torch.zeros(2, 3, 8, 8), "label"])
    with pytest.raises(ValueError, match="at least two views"):
        split_views([torch.zeros(2, 3, 8, 8)])
    with pytest.raises(ValueError, match="same B and C"):
        split_views([torch.zeros(2, 3, 8, 8), torch.zeros(3, 3, 8, 8)])


def test_learning_rate_is_scaled_by_the_images_of_a_step():
    class Rates(Callback):
        seen = []

        def on_train_batch_end(self, trainer, module, *_):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield [view[None].repeat(3, 1, 1, 1) for view in views_of(1)[0]]

    fit(build_module(lr=1.0, min_lr=0.0), callbacks=[Rates()], accumulate_grad_batches=2)
    assert Rates.seen[1] == pytest.approx(4 * 2 / 256)
    Rates.seen.clear()
    endless = DataLoader(Endless(), batch_size=None)  # the loader does not say its batch size: the first batch counts
    fit(build_module(lr=1.0, min_lr=0.0), endless, callbacks=[Rates()], limit_train_batches=2)
    assert Rates.seen[0] == pytest.approx(3 / 256)
    with pytest.raises(ValueError, match="limit_train_batches=N"):
        fit(build_module(), endless)


def test_last_layer_is_skipped_while_frozen():
    module = build_module(freeze_last_layer=1, norm_last_layer=False)
    before = {k: v.clone() for k, v in module.student.state_dict().items()}
    trainer = fit(module, max_epochs=1)
    after = module.student.state_dict()
    for name in ("head.last_layer.weight_g", "head.last_layer.weight_v"):
        assert torch.equal(before[name], after[name])
        assert module.student.get_parameter(name) not in trainer.optimizers[0].state, "no decay, no moments"
    assert not torch.equal(before["head.mlp.0.weight"], after["head.mlp.0.weight"])


def test_drop_path_is_drawn_from_the_seed_and_leaves_the_global_generator():
    def run(seed):
        seed_everything(seed)
        backbone = tiny_vit(drop_path_rate=0.5)
        torch.manual_seed(0)
        backbone.reset_parameters()
        nn.init.normal_(backbone.patch_embed.proj.weight)
        torch.manual_seed(99)  # another state of the global generator must not matter
        state = torch.get_rng_state()
        module = build_module(backbone)
        for p in module.student.head.parameters():
            nn.init.constant_(p, 0.1)
        module.teacher.load_state_dict(module.student.state_dict())
        fit(module)
        return module.state_dict(), state

    a, b, c = run(1)[0], run(1)[0], run(2)[0]
    assert same(a, b) and not same(a, c)


def test_same_keys_in_the_log(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(build_module(), logger=logger, log_every_n_steps=1, callbacks=[LearningRateMonitor()])
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "train/lr", "train/weight_decay", "train/momentum", "train/teacher_temp", "train/kl",
            "train/teacher_entropy", "train/grad_norm", "train/skipped_steps"} <= set(header)  # fmt: skip


# precision and non-finite losses


def test_bf16_mixed_trains_close_to_float32():
    """Fifty steps: every loss within 5 %, and the weights end within a tenth of the way they went (measured: 2.5 %, 0.061)."""

    class Losses(Callback):
        def __init__(self):
            self.values = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.values.append(outputs["loss"].item())

    losses, ends = {}, {}
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        module, watch = build_module(lr=0.02), Losses()
        start = nn.utils.parameters_to_vector(module.student.parameters()).detach().clone()
        fit(module, precision=precision, max_epochs=25, callbacks=[watch])
        assert all(p.dtype == torch.float32 for p in module.parameters()) and module.loss.center.dtype == torch.float32
        losses[precision] = torch.tensor(watch.values)
        ends[precision] = nn.utils.parameters_to_vector(module.student.parameters()).detach()
    assert len(watch.values) == 50
    off = (losses["bf16-mixed"] / losses["32-true"] - 1).abs().max()
    way = (ends["32-true"] - start).norm()
    apart = (ends["bf16-mixed"] - ends["32-true"]).norm() / way
    assert 0 < off < 0.05 and 0 < apart < 0.1


@pytest.mark.parametrize("backbone", [None, 3, ["vit_small"]])
def test_what_is_no_backbone_is_named(backbone):
    with pytest.raises(TypeError, match="backbone must be a name, such as vit_small, or a module"):
        DINOModule(backbone)


@pytest.mark.parametrize(
    ("options", "strategy", "words"),
    [
        ({"use_bn_in_head": True}, "sharded", "batch norms, whose statistics no strategy of FSDP2 shares"),
        ({"optimizer": "lars"}, "sharded", "optimizer='lars'"),
        ({"compile": True}, "sharded", "compile=true"),
        ({}, ModelParallelStrategy(), "use strategy='sharded', which is FSDP2, or 'ddp'"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(options, strategy, words):
    trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    module = DINOModule("vit_tiny", img_size=16, out_dim=8, hidden_dim=8, warmup_epochs=0, **options)
    with patch.dict(os.environ), pytest.raises(ValueError, match=words):  # the strategy tells processes to come who they are
        trainer.fit(module, torch.utils.data.DataLoader([[torch.rand(3, 16, 16)] * 2] * 2, batch_size=2))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_true_half_precision_is_refused(precision):
    with pytest.raises(ValueError, match="moving average stalls"):
        fit(build_module(), precision=precision)


class Poison(Callback):
    """Makes the views of one batch NaN."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            for view in batch:
                view.fill_(torch.nan)


def test_non_finite_loss_stops_with_a_report_and_a_clean_checkpoint(tmp_path):
    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(NonFiniteLossError, match="not finite at step 5 .epoch 2.*teacher temperature 0.04") as error:
        fit(build_module(), callbacks=[Poison(5), every_step], enable_checkpointing=True, max_epochs=10)
    assert "step=5.ckpt" in str(error.value), "the last checkpoint is named"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step={i}.ckpt" for i in range(1, 6)]
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_non_finite_loss_is_read_one_step_late_without_checkpoints():
    class Steps(Callback):
        count = 0

        def on_train_batch_end(self, trainer, module, *_):
            self.count += 1

    steps = Steps()
    with pytest.raises(NonFiniteLossError, match="step 3 .*last finite gradient norm [0-9.]+; there is no checkpoint yet"):
        fit(build_module(), callbacks=[Poison(3), steps], max_epochs=10)
    assert steps.count == 5


def test_non_finite_loss_in_the_last_step():
    with pytest.raises(NonFiniteLossError, match="step 3"):
        fit(build_module(), callbacks=[Poison(3)], max_epochs=2)


def test_a_step_that_the_scaler_skips_moves_nothing():
    """An optimizer step that does not happen, as under a gradient scaler that found an infinite gradient."""

    class SkipStep(Callback):
        states = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.states.append({k: v.clone() for k, v in module.state_dict().items()})
            if trainer.global_step == 1:
                self.step = trainer.optimizers[0].step
                trainer.strategy.optimizers[0].step = lambda closure: closure()
            elif trainer.global_step == 2:
                trainer.strategy.optimizers[0].step = self.step

    trainer = fit(build_module(), callbacks=[SkipStep()])
    moved = [not same(a, b) for a, b in zip(SkipStep.states, SkipStep.states[1:])]
    assert moved == [True, False, True]
    assert trainer.callback_metrics["train/skipped_steps"] == 1


def test_fp16_with_a_real_scaler_and_overflows():
    """From a scale far too large the scaler skips steps until the gradients are finite; then training goes on."""

    class Moves(Callback):
        states = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.states.append({k: v.clone() for k, v in module.state_dict().items()})

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = fit(build_module(lr=0.05), plugins=[plugin], callbacks=[Moves()], max_epochs=20)
    moved = [not same(a, b) for a, b in zip(Moves.states, Moves.states[1:])]
    first = moved.index(True)
    assert first > 1 and not any(moved[:first]) and sum(moved[first:]) > 10
    assert trainer.callback_metrics["train/skipped_steps"] == moved.count(False)
    assert trainer.global_step == 40 and all(p.isfinite().all() for p in trainer.lightning_module.parameters())


def test_an_optimizer_resumed_under_a_scaler_is_not_fused(tmp_path):
    """A fused one would undo the scaling after the clipping; its checkpoint remembers that it was."""
    trainer = fit(build_module(), max_epochs=1)
    assert trainer.optimizers[0].param_groups[0]["fused"]
    trainer.save_checkpoint(tmp_path / "float32.ckpt")
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    trainer = fit(build_module(), ckpt_path=tmp_path / "float32.ckpt", plugins=[plugin], max_epochs=2)
    assert trainer.global_step == 4 and not any(group["fused"] for group in trainer.optimizers[0].param_groups)


# checkpoints


def test_checkpoint_of_a_named_backbone_loads(tmp_path):
    module = DINOModule("vit_tiny", img_size=32, **OPTIONS)
    trainer = fit(module, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["backbone"] == "vit_tiny"
    loaded = DINOModule.load_from_checkpoint(tmp_path / "c.ckpt")
    assert same(loaded.state_dict(), module.state_dict()) and loaded.hparams == module.hparams


def test_checkpoint_of_a_backbone_object_wants_it_back(tmp_path):
    module = build_module()
    trainer = fit(module, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    torch.load(tmp_path / "c.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="VisionTransformer.*backbone=..."):
        DINOModule.load_from_checkpoint(tmp_path / "c.ckpt")
    loaded = DINOModule.load_from_checkpoint(tmp_path / "c.ckpt", backbone=tiny_vit())
    assert same(loaded.state_dict(), module.state_dict())


def test_a_checkpoint_of_the_command_line_trained_on_in_python_loads(small_checkpoint, tmp_path):
    module = DINOModule.load_from_checkpoint(small_checkpoint)
    fit(module, max_epochs=1, logger=CSVLogger(tmp_path)).save_checkpoint(tmp_path / "c.ckpt")
    again = DINOModule.load_from_checkpoint(tmp_path / "c.ckpt")
    assert same(module.state_dict(), again.state_dict()) and again.hparams["lr"] == module.hparams["lr"]
    fit(again, max_epochs=1).save_checkpoint(tmp_path / "d.ckpt")
    assert DINOModule.load_from_checkpoint(tmp_path / "d.ckpt", lr=0.1).options["lr"] == 0.1
    other = DINOModule.load_from_checkpoint(small_checkpoint, backbone=tiny_vit())
    fit(other, max_epochs=1).save_checkpoint(tmp_path / "e.ckpt")
    with pytest.raises(ValueError, match="VisionTransformer.*backbone=..."):
        DINOModule.load_from_checkpoint(tmp_path / "e.ckpt")


def test_state_dicts_speak_the_references_names():
    module = DINOModule("vit_tiny", img_size=32, **OPTIONS)
    for network in (module.student, module.teacher):
        keys = set(network.state_dict())
        assert keys == {name for name, _ in network.named_parameters()}
        assert {"backbone.cls_token", "backbone.blocks.0.attn.qkv.weight", "head.mlp.0.weight", "head.last_layer.weight_g",
                "head.last_layer.weight_v"} <= keys  # fmt: skip
        with pytest.raises(RuntimeError, match="Missing key"):
            network.load_state_dict({})
    assert module.student.state_dict()["head.last_layer.weight_g"].shape == (64, 1)


def test_module_pickles():
    module = build_module()
    assert same(pickle.loads(pickle.dumps(module)).state_dict(), module.state_dict())


# what a user's code may do


def test_a_module_in_evaluation_mode_trains_all_the_same():
    backbone = BatchNormNet().eval()
    module = build_module(backbone).eval()
    fit(module)
    assert module.student.training and backbone.training and module.loss.center.any()
    assert backbone[1].num_batches_tracked == 2 * 4, "two sizes in four steps"


def test_hooks_overridden_without_super_keep_the_algorithm():
    class Mine(DINOModule):
        def on_before_optimizer_step(self, optimizer):
            pass

        def on_train_batch_end(self, outputs, batch, batch_idx):
            pass

    ends = []
    for kind in (DINOModule, Mine):
        torch.manual_seed(0)
        module = kind(backbone=tiny_vit(), lr=0.1, **OPTIONS)
        fit(module)
        ends.append(module.state_dict())
    assert same(*ends)


def test_what_overrides_would_break_without_a_word_is_named():
    def mine(**methods):
        return type("Mine", (DINOModule,), methods)(backbone=tiny_vit(), lr=0.1, **OPTIONS)

    def adamw(self):
        return torch.optim.AdamW(self.student.parameters(), lr=1.0)

    for words, methods in {
        "overrides on_train_start; call super": {"on_train_start": lambda self: None},
        "with the first batch; Mine overrides that: call super": {"on_train_batch_start": lambda self, batch, batch_idx: None},
        "overrides optimizer_step, and this one did not": {
            "optimizer_step": lambda self, epoch, batch_idx, optimizer, closure: optimizer.step(closure)
        },
    }.items():
        with pytest.raises(RuntimeError, match=words):
            fit(mine(**methods))
    manual = build_module()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="leave automatic_optimization true"):
        fit(manual)
    with pytest.raises(NonFiniteLossError):
        fit(mine(on_before_backward=lambda self, loss: None), callbacks=[Poison(1)])
    with pytest.warns(UserWarning, match="what configure_optimizers says of these, and schedulers, have no effect"):
        fit(mine(configure_optimizers=adamw))
    module = mine()
    module.extra = nn.Linear(2, 2)
    with pytest.warns(
        UserWarning, match="never trained, because no optimizer holds them: extra.weight, extra.bias; override build_optimizer"
    ):
        fit(module)
    skipped = mine(training_step=lambda self, batch, batch_idx: None)
    before = {name: value.clone() for name, value in skipped.state_dict().items()}
    fit(skipped)  # as Lightning has it, such a batch is left out
    assert same(before, skipped.state_dict())

    def every_other_step(self, epoch, batch_idx, optimizer, closure):
        closure() if batch_idx % 2 else DINOModule.optimizer_step(self, epoch, batch_idx, optimizer, closure)

    assert fit(mine(optimizer_step=every_other_step)).callback_metrics["train/skipped_steps"] == 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(build_module())
    assert not [warning for warning in said if "optimizer" in str(warning.message)]


def test_other_batches_of_evaluation_are_named():
    module, images = build_module(), torch.rand(2, 3, 32, 32)
    for batch, words in {
        (tuple([images] * 3)): r"tuple of a tensor \(2, 3, 32, 32\), a tensor \(2, 3, 32, 32\), .*no validation loss",
        images: r"got a tensor \(2, 3, 32, 32\)",
    }.items():
        with pytest.raises(TypeError, match=words):
            module.validation_step(batch, 0)
    with pytest.raises(TypeError, match="prediction takes batches of images"):
        module.predict_step([images[0], "a.jpg"], 0)
    features, paths = module.eval().predict_step(images, 0)
    assert torch.equal(features, module.predict_step([images, ["a", "b"]], 0)[0]) and paths is None
    labelled = DataLoader([(image, i % 2) for i, image in enumerate(torch.rand(4, 3, 32, 32))], batch_size=2)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[OnlineKNN()], enable_progress_bar=False)
    with pytest.warns(UserWarning, match="OnlineKNN needs two loaders"):
        trainer.validate(module, labelled)
    with pytest.raises(ValueError, match="unknown backbone 'vit_tyni'; did you mean 'vit_tiny'"):
        DINOModule("vit_tyni")


def test_a_subclass_with_its_own_defaults(tmp_path):
    class Mine(DINOModule):
        def __init__(self, lr=1.0, **options):
            super().__init__(lr=lr / 10, out_dim=32, hidden_dim=16, warmup_epochs=0, **options)

    module = Mine(backbone=tiny_vit())
    trainer = fit(module, max_epochs=1)
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.1 * 4 / 256 + 1e-9, "what DINOModule was given counts"
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    torch.load(tmp_path / "c.ckpt", weights_only=True)


def test_a_fit_after_an_aborted_one_starts_clean():
    module = build_module()
    good = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(NonFiniteLossError):
        fit(module, callbacks=[Poison(0)])
    module.load_state_dict(good)
    fit(module)
    fresh = build_module()
    fresh.load_state_dict(good)
    fit(fresh)
    assert same(module.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("backbone", [dict(img_size=30, patch_size=10), dict(in_chans=1), dict(img_size=(16, 24))])
def test_options_of_named_backbones_are_not_used_with_a_module(backbone):
    assert build_module(tiny_vit(**backbone)).student.head.in_dim == 24


def test_a_module_for_one_size_only():
    flat = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 30 * 30, 7))
    assert build_module(flat).student.head.in_dim == 7


# what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(teacher_temp=0.0), "teacher_temp must be positive, got 0.0"),
        (dict(momentum_teacher=1.5), "momentum_teacher must lie in"),
        (dict(lr=-1.0), "lr must not be negative"),
        (dict(optimizer="adam"), "'adam'"),
        (dict(out_dim=0), "out_dim must be at least 1"),
        (dict(lr="fast"), "lr must be a number, got 'fast'"),
        (dict(lr=float("nan")), "lr must not be negative, got nan"),
        (dict(lr=True), "lr must be a number, got True"),
        (dict(momentum_teacher=None), "momentum_teacher must be a number, got None"),
        (dict(out_dim=2.5), "out_dim must be an integer, got 2.5"),
        (dict(hidden_dim=-1), "hidden_dim must be at least 1, got -1"),
        (dict(bottleneck_dim="16"), "bottleneck_dim must be an integer, got '16'"),
        (dict(head_layers=0), "head_layers must be at least 1, got 0"),
        (dict(patch_size=0), "patch_size must be at least 1, got 0"),
        (dict(img_size=(32,)), r"img_size must be pixels, an integer or .height, width., got .32,"),
        (dict(drop_path_rate=1), r"drop_path_rate must lie in \[0, 1\), got 1"),
        (dict(warmup_epochs=1.5), "warmup_epochs must be an integer, got 1.5"),
        (dict(use_bn_in_head="yes"), "use_bn_in_head must be true or false, got 'yes'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        build_module(**options)


def test_warmups_longer_than_the_run():
    with pytest.raises(ValueError, match="warmup_epochs=10 is 20 steps, but the run has only 4 .2 epochs of 2"):
        fit(build_module(warmup_epochs=10))
    with pytest.raises(ValueError, match="warmup_teacher_temp_epochs=3"):
        fit(build_module(warmup_teacher_temp_epochs=3))
    fit(build_module(warmup_epochs=10), fast_dev_run=True)


def test_two_kinds_of_clipping():
    with pytest.raises(ValueError, match="gradient_clip_val=1.0.*clip_grad=3.0"):
        fit(build_module(), gradient_clip_val=1.0)
    fit(build_module(clip_grad=0.0), gradient_clip_val=1.0)


@pytest.mark.parametrize(
    "callback, message",
    [
        (LearningRateFinder(), "LearningRateFinder .Tuner.lr_find.*the plan sets the rate.*it collapses.*configs/sweeps"),
        (StochasticWeightAveraging(swa_lrs=0.1), "StochasticWeightAveraging.*not its swa_lrs.*teacher already is the average"),
        (GradientAccumulationScheduler({1: 2}), "scheduling=.1: 2, 0: 1}.*accumulate_grad_batches=.*one number for the run"),
    ],
)
def test_callbacks_that_would_not_do_what_they_say(callback, message, tmp_path):
    module = build_module()
    with pytest.raises(ValueError, match=message):
        fit(module, default_root_dir=tmp_path, logger=CSVLogger(tmp_path), callbacks=[callback], enable_checkpointing=True)
    if isinstance(callback, LearningRateFinder):
        trainer = Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, logger=CSVLogger(tmp_path))
        with pytest.raises(ValueError, match=message):
            Tuner(trainer).lr_find(module, loader_of())
    assert not list(tmp_path.iterdir()), "refused before anything is written"


def test_no_training_step_without_a_trainer():
    with pytest.raises(RuntimeError, match=r"trains in a Trainer.*Trainer\(...\).fit.*DINOLoss, DINOHead"):
        build_module().training_step(next(iter(loader_of())), 0)


def test_a_run_without_length():
    with pytest.raises(ValueError, match="max_epochs"):
        fit(build_module(), max_epochs=-1)


def test_crop_sizes_that_the_backbone_cannot_take():
    module = build_module()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match="cannot take 20×20 images.*16×16"):
        fit(module, loader_of(sizes=((32, 32), (32, 32), (20, 20))))
    assert same(before, module.state_dict())
    flat = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Flatten())
    with pytest.raises(ValueError, match="512 features for 16×16 crops, but its head was made for 2048"):
        fit(build_module(flat, img_size=32), loader_of())


def test_positions_for_another_size_are_pointed_out(caplog):
    with caplog.at_level(logging.WARNING, "dino_lightning"):
        fit(build_module(), loader_of(sizes=((48, 48),) * 2), max_epochs=1)
    assert "global crops are 48×48, but the positions of the ViT are laid out for 32×32" in caplog.text


def test_unused_parameters_are_frozen_and_named(caplog):
    class Forgetful(BatchNormNet):
        def __init__(self):
            super().__init__()
            self.mask_token = nn.Parameter(torch.zeros(8))

        def forward(self, x):
            for layer in list(self)[:6]:
                x = layer(x)
            return x

    with caplog.at_level(logging.WARNING, "dino_lightning"):
        module = build_module(Forgetful())
    assert not module.student.backbone.mask_token.requires_grad and "mask_token" in caplog.text
    assert module.student.backbone[0].weight.requires_grad
