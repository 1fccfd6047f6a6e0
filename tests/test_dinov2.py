"""DINOv2Module in a Trainer and on the command line: what is its own, beside what all methods share (test_module.py)."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import two_colours
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from dino_lightning import DINOModule, DINOv2Module, VisionTransformer, load_backbone
from dino_lightning.callbacks import CollapseDoctor, OnlineKNN, Throughput
from dino_lightning.cli import main
from dino_lightning.door.errors import UsageError
from dino_lightning.evaluation.collapse import Signs, diagnose, forgetting
from dino_lightning.methods.dinov2 import DINOv2Plan
from dino_lightning.tools.checkpoint import load_module, untrained
from dino_lightning.training.guard import NonFiniteLossError

OPTIONS = dict(out_dim=64, hidden_dim=32, bottleneck_dim=16, warmup_epochs=0, warmup_teacher_temp_epochs=0, freeze_last_layer=0)


def tiny_vit(**options):
    return VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "mask_token": True, **options}
    )


def build_module(backbone=None, **options):
    torch.manual_seed(0)
    return DINOv2Module(backbone or tiny_vit(), **{**OPTIONS, **options})


def loader_of(n_samples=8, batch_size=4):
    random = torch.Generator().manual_seed(0)
    return DataLoader([[torch.randn(3, side, side, generator=random) for side in (32, 32, 16)] for _ in range(n_samples)], batch_size)


def fit(module, loader=None, ckpt_path=None, **options):
    defaults = dict(accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False,
                    enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    trainer = Trainer(**{**defaults, **options})
    trainer.fit(module, loader or loader_of(), ckpt_path=ckpt_path)
    return trainer


class States(Callback):
    """The losses, and the state before every step, and whether a centre then still holds logits of the step before."""

    def __init__(self):
        self.losses, self.states, self.left = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.states.append({key: value.clone() for key, value in module.state_dict().items()})
        self.left += [center._pending is not None for center in module._centers().values()]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def moved(self, prefix=""):
        """Whether each step but the last changed anything of this name."""
        parts = [[value for key, value in state.items() if key.startswith(prefix)] for state in self.states]
        return [not all(map(torch.equal, a, b)) for a, b in zip(parts, parts[1:])]


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_half_precision(centering):
    """bf16 stays close to float32; a scaler's skipped steps move nothing."""
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        watch = States()
        module = build_module(lr=0.02, centering=centering)
        fit(module, precision=precision, max_epochs=10, callbacks=[watch])
        assert all(value.dtype == torch.float32 for value in module.state_dict().values())
        losses.append(torch.tensor(watch.losses))
    assert 0 < (losses[1] / losses[0] - 1).abs().max() < 0.05
    watch = States()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = fit(build_module(lr=0.05, centering=centering), plugins=[plugin], callbacks=[watch], max_epochs=12)
    moved = watch.moved()
    first = moved.index(True)
    assert first > 1 and not any(moved[:first]) and sum(moved[first:]) > 5 and not any(watch.left)
    assert trainer.callback_metrics["train/skipped_steps"] == moved.count(False)
    assert all(p.isfinite().all() for p in trainer.lightning_module.parameters())


def test_masks_depend_on_seed_step_micro_batch_and_rank_alone():
    module = build_module()
    drawn = {}
    for key in ((0, 0, 0, 0), (0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        module.key = key
        masks = module.draw_masks(8, (4, 4))
        assert masks.shape == (8, 16) and masks.dtype == torch.bool and masks.any(dim=1).sum() == 4
        assert torch.equal(drawn.setdefault(key, masks), masks)
    assert len({masks.numpy().tobytes() for masks in drawn.values()}) == 5


def test_what_is_off_costs_nothing_and_needs_nothing():
    """Without iBOT any backbone trains, and there is no second head; without masks, or KoLeo on one image, the loss is finite."""
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module = build_module(cnn, ibot_loss_weight=0, ibot_separate_head=True, layerwise_decay=1.0)
    assert not hasattr(module.student, "ibot_head")
    assert "train/ibot_loss" not in fit(module).callback_metrics
    unmasked = fit(build_module(mask_probability=0), loader_of(batch_size=1), callbacks=[CollapseDoctor()])
    metrics = unmasked.callback_metrics
    assert metrics["train/ibot_loss"] == metrics["train/koleo_loss"] == metrics["train/masked"] == 0 and metrics["train/loss"].isfinite()
    for backbone in (tiny_vit(mask_token=False), cnn):
        with pytest.raises(ValueError, match=r"needs patches that can be masked.*mask_token=True"):
            build_module(backbone)
    assert build_module().student.backbone.mask_token.requires_grad


def test_a_held_backbone_stays_and_its_heads_learn(caplog):
    watch = States()
    module = build_module(freeze_backbone_epochs=1, momentum_teacher=0.5, drop_path_rate=0.5)
    fit(module, callbacks=[watch, Throughput()], max_epochs=3)
    assert watch.moved("student.backbone.") == [False, False, True, True, True] and all(watch.moved("student.dino_head."))
    assert watch.moved("teacher.backbone.") == [False, False, True, True, True]


def test_a_released_backbone_warms_up_by_itself():
    class Rates(Callback):
        seen = []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            of = {group["backbone"]: group["lr"] for group in optimizer.param_groups if group["below"] == 0}
            self.seen.append(of[True] / of[False] if of[False] else 0.0)

    fit(build_module(freeze_backbone_epochs=1, warmup_epochs=2, layerwise_decay=1.0), loader_of(16), callbacks=[Rates()], max_epochs=5)
    assert Rates.seen[3:] == pytest.approx([0, 0, *(i / 7 for i in range(1, 8)), *[1] * 8]), "4 steps held, 8 of warm-up, then as the heads"


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_centres(tmp_path):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 2:
                self.centers = [center.center.clone() for center in module._centers().values()]
                module.student.dino_head.last_layer.weight_v.data[0] = torch.nan  # the teacher's logits are finite still

        def on_exception(self, trainer, module, exception):
            self.kept = [torch.equal(a, b.center) for a, b in zip(self.centers, module._centers().values())]

    poison = Poison()
    with pytest.raises(NonFiniteLossError, match="at step 2 .*teacher temperature 0.07, norm of dino_center .* norm of ibot_center"):
        fit(build_module(), callbacks=[poison, ModelCheckpoint(tmp_path, every_n_train_steps=1)], enable_checkpointing=True, max_epochs=4)
    assert poison.kept == [True, True]


def test_masks_are_for_the_class_token_too():
    """Also without the patches' loss, as in the reference."""
    losses = []
    for probability in (0.0, 1.0):
        watch = States()
        fit(build_module(ibot_loss_weight=0, mask_probability=probability), callbacks=[watch], max_epochs=1)
        losses.append(watch.losses[0])
    assert losses[0] != losses[1]


def test_a_frozen_last_layer_is_one_with_a_rate_of_0():
    watch = States()
    trainer = fit(build_module(freeze_last_layer=1), callbacks=[watch])
    assert watch.moved("student.dino_head.last_layer") == [False, False, True] and all(watch.moved("student.dino_head.mlp"))
    steps = {state["step"].item() for state in trainer.optimizers[0].state_dict()["state"].values()}
    assert steps == {4.0}, "its moments move all the same"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centering": "sinkhorn"}, "centering must be 'centering' or 'sinkhorn_knopp', got 'sinkhorn'"),
        ({"mask_ratio": (0.5, 0.1)}, r"mask_ratio must be two numbers of \[0, 1\], the smaller first, got \(0.5, 0.1\)"),
        ({"mask_probability": 1.5}, r"mask_probability must lie in \[0, 1\], got 1.5"),
        ({"layerwise_decay": 0}, "layerwise_decay must be positive, got 0"),
        ({"layer_scale": 0.0}, "layer_scale must be a positive number or null, got 0.0"),
        ({"koleo_loss_weight": -1}, "koleo_loss_weight must not be negative, got -1"),
        ({"registers": 1.5}, "registers must be an integer, got 1.5"),
        (
            {"backbone": "dinov2_vits14", "registers": 4},
            "registers, layer_scale, ffn shape the backbones vit_.; dinov2_vits14 brings its own",
        ),
        ({"dino_loss_weight": 0, "ibot_loss_weight": 0, "koleo_loss_weight": 0}, "there is nothing to learn"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        build_module(**options)


def test_named_backbones_are_shaped_by_the_options():
    module = DINOv2Module("vit_tiny", img_size=32, registers=3, ffn="swiglu", layer_scale=None, drop_path_rate=0.25, **OPTIONS)
    vit = module.student.backbone
    fresh = untrained(module)
    assert {name: p.shape for name, p in fresh.named_parameters()} == {name: p.shape for name, p in vit.named_parameters()}
    assert vit.register_tokens.shape[1] == 3 and hasattr(vit.blocks[0].mlp, "w12") and vit.layer_scale is None
    assert {block.drop_path for block in vit.blocks} == {0.25} and vit.mask_token is not None
    assert module.teacher.backbone.training is False
    assert DINOv2Plan.of({**module.options, "warmup_epochs": 0}, 10, 5, module.learning_rate(256)).lr == module.options["lr"] / 2


def test_the_doctor_on_patches():
    healthy = Signs(3.0, 2.0, 1.0, 0.6, 4.0, 0.7, 40.0, patch_entropy=2.0, patch_prototypes=30.0, koleo_distance=0.4, masked=0.15)
    first = dict(first_loss=5.0, first_rank=2.5, first_std=0.5, patch_out_dim=64)
    assert diagnose(healthy, 256, **first) is None
    for name, signs in {
        "no_masks": {"masked": 0.0, "patch_entropy": float("nan")},
        "uniform_patch_collapse": {"patch_entropy": 4.1},
        "one_patch_prototype_collapse": {"patch_entropy": 0.1, "patch_prototypes": 1.1},
        "twins": {"koleo_distance": 0.001},
    }.items():
        assert diagnose(healthy._replace(**signs), 256, **first).name == name
    assert forgetting(0.8, 0.7) is None and "80.0 % before the first step" in forgetting(0.8, 0.1).text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with two_colours/ and a run of two epochs on it by the command line; the path of its checkpoint."""
    root = tmp_path_factory.mktemp("dinov2")
    two_colours(root / "images")
    vit = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "mask_token": True,
        "registers": 2,
        "drop_path_rate": 0.2,
    }
    recipe = {
        "method": "dinov2",
        "data": {"root": str(root / "images"), "batch_size": 4, "num_workers": 0, "global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 1},
        "model": {"backbone": {"class_path": "dino_lightning.VisionTransformer", "init_args": vit}, "out_dim": 64, "hidden_dim": 32},
        "trainer": {"accelerator": "cpu", "max_epochs": 3, "enable_progress_bar": False, "default_root_dir": str(root)},
    }  # fmt: skip
    (root / "small.yaml").write_text(yaml.safe_dump(recipe))
    main(
        [
            "fit",
            "--config",
            str(root / "small.yaml"),
            "--checkpoint.every_n_train_steps=3",
            "--checkpoint.save_top_k=-1",
            "--checkpoint.filename={step}",
        ]
    )
    return root, str(next(root.rglob("step=12.ckpt")))


def test_a_run_of_the_command_line_goes_on_exactly(run, tmp_path, monkeypatch):
    """From the middle of an epoch, by the run's own config, and with another option, which wins."""
    root, whole = run
    monkeypatch.chdir(tmp_path)
    half = whole.replace("step=12", "step=6")
    main(["fit", "--data.root", str(root / "images"), "--config", str(Path(whole).parents[1] / "config.yaml"),
          "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", half])  # fmt: skip
    before, after = (torch.load(path, weights_only=True) for path in (whole, next(tmp_path.rglob("step=12.ckpt"))))
    assert before["method"] == "dinov2" and yaml.safe_load((Path(whole).parents[1] / "config.yaml").read_text())["method"] == "dinov2"
    assert all(torch.equal(value, after["state_dict"][key]) for key, value in before["state_dict"].items())
    without_method = {key: part for key, part in yaml.safe_load((root / "small.yaml").read_text()).items() if key in ("data", "trainer")}
    Path("plain.yaml").write_text(yaml.safe_dump(without_method))
    again = ("fit", "--config", "plain.yaml", "--ckpt_path", half)
    main([*again, "--model.layerwise_decay", "1.0", "--trainer.default_root_dir", "flat", "--checkpoint.filename", "flat"])
    flat = torch.load(next(Path("flat").rglob("flat.ckpt")), weights_only=True)
    rates = {group["lr"] for group in flat["optimizer_states"][0]["param_groups"] if not group["patch_embed"]}
    assert len(rates) == 1 and flat["method"] == "dinov2", "without the recipe: the checkpoint says its method"
    with pytest.raises(UsageError, match="--method dino, but .*small.yaml says method: dinov2"):
        main(["fit", "--config", str(root / "small.yaml"), "--method", "dino"])
    with pytest.raises(ValueError, match="is of the method 'dinov2', not 'dino'"):
        main(["fit", "--method", "dino", "--data.root", str(root / "images"), "--ckpt_path", half])
    with pytest.raises(ValueError, match="is of the method 'dinov2', DINOModule is 'dino'"):
        DINOModule.load_from_checkpoint(whole)
    with pytest.raises(UsageError, match="unknown method dinov3; did you mean dinov2"):
        main(["fit", "--method", "dinov3", "--data.root", str(root / "images")])
    with pytest.raises(UsageError, match="unknown option --model.koleo_loss_weight of fit"):
        main(["fit", "--model.koleo_loss_weight", "0.2", "--data.root", str(root / "images")])


def test_crops_that_the_patches_do_not_divide_are_refused_before_there_is_a_folder(run, tmp_path):
    with pytest.raises(
        ValueError, match="data.local_crops_size: the patch size 8 does not divide .* 20×20; the nearest that fits is 16×16"
    ):
        main(["fit", "--config", str(run[0] / "small.yaml"), "--data.local_crops_size", "20", "--trainer.default_root_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_tools_take_its_checkpoints(run, tmp_path, capsys):
    root, checkpoint = run
    module = load_module(checkpoint)
    assert isinstance(module, DINOv2Module)
    images = torch.randn(2, 3, 32, 32)
    for backbone in (load_backbone(checkpoint), module.as_backbone()):
        torch.testing.assert_close(backbone(images), module(images))
    main(["knn", "--checkpoint", checkpoint, "--root", str(root / "images"), "--num_workers", "0"])
    main(["validate", "--ckpt_path", checkpoint, "--data.root", str(root / "images"), "--trainer.logger", "false"])
    assert "val/knn_top1" in capsys.readouterr().out
    main(["extract", str(root / "images"), "--checkpoint", checkpoint, "--output", str(tmp_path / "features"), "--num_workers", "0"])
    main(["export", "--checkpoint", checkpoint, "--to", "safetensors", "--output", str(tmp_path / "exported")])
    assert "trained with DINOv2" in (tmp_path / "exported" / "README.md").read_text()
    torch.testing.assert_close(load_backbone(tmp_path / "exported")(images), module(images))
    with pytest.raises(ValueError, match="with_head out"):
        main(["export", "--checkpoint", checkpoint, "--to", "torchhub", "--with_head", "true", "--output", str(tmp_path / "no")])


def test_a_run_that_begins_with_weights(run, tmp_path, caplog):
    """New heads on its backbone; the doctor says so if what the weights knew is lost."""
    root, checkpoint = run
    torch.save({"teacher": load_module(checkpoint).teacher.state_dict()}, tmp_path / "teacher_checkpoint.pth")  # as the reference's
    module = build_module(weights=str(tmp_path / "teacher_checkpoint.pth"), backbone=tiny_vit(registers=2), lr=0.02)
    assert torch.equal(module.student.backbone.cls_token, load_module(checkpoint).teacher.backbone.cls_token)
    module = build_module(weights=checkpoint, backbone=tiny_vit(registers=2), lr=0.02)
    assert "freeze_backbone_epochs=1" in caplog.text and module.started_from == checkpoint
    for network in (module.student, module.teacher):
        assert torch.equal(network.backbone.mask_token, load_module(checkpoint).teacher.backbone.mask_token)

    class Known(Callback):
        """What the weights told apart before the first step, as a share."""

        def __init__(self, before):
            self.before = before

        def on_fit_start(self, trainer, module):
            next(callback for callback in trainer.callbacks if isinstance(callback, OnlineKNN)).before = self.before

    bank, queries = (DataLoader([(torch.randn(3, 32, 32), label) for _ in range(8)], 4) for label in (0, 1))  # which nobody can tell
    for before, told in ((0.0, False), (0.5, True)):
        caplog.clear()
        doctor = CollapseDoctor()
        trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
                          num_sanity_val_steps=0, enable_model_summary=False, callbacks=[OnlineKNN(), doctor, Known(before)])  # fmt: skip
        trainer.fit(module, loader_of(), [bank, queries])
        assert trainer.callback_metrics["val/knn_top1"] == 0
        assert ("forgetting: k-NN finds" in caplog.text) == told == ("forgetting" in doctor.state_dict()["told"])


def test_adopting_a_checkpoint_of_the_reference_says_why_not(tmp_path):
    torch.save({"model": {"student.backbone._flat_param": torch.zeros(4)}, "optimizer": {"state": {}}, "iteration": 7}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"DINOv2.*shards.*teacher_checkpoint.pth.* behind --model.weights"):
        main(["adopt", "--checkpoint", str(tmp_path / "m.pth")])


def test_a_checkpoint_of_an_object_says_that_it_must_be_given_again(tmp_path):
    module = DINOv2Module(VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, mask_token=True), layer_scale=None,
                          img_size=32, out_dim=8, hidden_dim=8, bottleneck_dim=8)  # fmt: skip
    options = {**module.hparams}
    assert options["backbone"].startswith("object:")
    with pytest.raises(ValueError, match="does not hold; pass it: DINOv2Module.load_from_checkpoint"):
        DINOv2Module(**options)
