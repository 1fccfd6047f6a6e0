"""The collapse doctor: its numbers, its verdicts, and runs that were broken on purpose."""

import csv
import inspect
import logging
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import two_colours
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from dino_lightning import BYOLModule, DINOLoss, DINOModule, MoCoV3Module, MultiCropDataModule, SimCLRModule, VisionTransformer, recipes
from dino_lightning.callbacks import CollapseDoctor, OnlineKNN
from dino_lightning.cli import main
from dino_lightning.evaluation.collapse import Signs, diagnose, is_stuck, off_the_curve, too_many_prototypes
from dino_lightning.evaluation.spread import feature_std, participation_ratio, rank_me, view_agreement

HEALTHY = Signs(loss=3.0, entropy=2.0, kl=1.0, feature_std=0.6, feature_rank=4.0, view_agreement=0.7, prototypes=40.0)


# the numbers


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_participation_ratio_is_that_of_the_eigenvalues(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 5
    eigenvalues = torch.linalg.eigvalsh(torch.cov(features.T))
    expected = eigenvalues.sum() ** 2 / eigenvalues.square().sum()
    torch.testing.assert_close(participation_ratio(features), expected, rtol=1e-4, atol=0)


def test_spread_of_what_is_spread_and_of_what_is_not():
    spread, same = torch.eye(16).repeat(4, 1), torch.ones(64, 16)
    assert feature_std(spread) == pytest.approx(math.sqrt(15 / 16)) and feature_std(same) < 1e-3
    assert participation_ratio(spread) == pytest.approx(15, rel=1e-4) and participation_ratio(same) < 1e-3
    assert rank_me(spread) == pytest.approx(16, rel=1e-4) and rank_me(same) == pytest.approx(1, rel=1e-3)


def test_view_agreement_compares_views_of_one_image_with_those_of_others():
    random = torch.Generator().manual_seed(0)
    first, noise = torch.randn(12, 6, generator=random), 0.3 * torch.randn(12, 6, generator=random)
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (first, first + noise))
    distances = torch.cdist(a, b).square()
    others = ~torch.eye(12, dtype=torch.bool)
    expected = 1 - distances.diagonal().mean() / distances[others].mean()
    torch.testing.assert_close(view_agreement(first, first + noise), expected)
    assert view_agreement(first, first) == 1 and 0.5 < expected < 1


def test_loss_is_entropy_plus_kl_of_teacher_and_student():
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4 * 3, 10, generator=random), torch.randn(2 * 3, 10, generator=random)
    loss = DINOLoss(10)
    value = loss(student, teacher, teacher_temp=0.5)
    p, log_q = (teacher / 0.5).softmax(dim=1).chunk(2), (student / 0.1).log_softmax(dim=1).chunk(4)
    pairs = [(p[i], log_q[v]) for i in range(2) for v in range(4) if v != i]
    kl = sum((p_i * (p_i.log() - log_q_v)).sum(dim=1).mean() for p_i, log_q_v in pairs) / len(pairs)
    torch.testing.assert_close(value, loss.teacher_entropy + kl)


# the verdicts


@pytest.mark.parametrize(
    "signs, name",
    [
        (dict(), None),
        (dict(feature_std=0.01), "dead_features"),
        (dict(feature_std=0.1, entropy=5.5), "divergence"),  # shrunk to a fifth of what it was: a uniform teacher follows
        (dict(entropy=5.4, loss=5.5), "uniform_collapse"),
        (dict(entropy=0.2, prototypes=2.5), "one_prototype_collapse"),
        (dict(entropy=0.2), None),  # sure of itself, on many prototypes
        (dict(prototypes=2.5), None),  # few, but not sure: an early step
        (dict(view_agreement=0.9995), "nothing_to_learn"),
        (dict(feature_rank=1.01), "divergence"),
        (dict(loss=7.3), "divergence"),
    ],
)
def test_verdicts(signs, name):
    verdict = diagnose(HEALTHY._replace(**signs), out_dim=256, first_loss=5.0, first_rank=2.5, first_std=0.5)
    assert (verdict and verdict.name) == name


def test_an_untrained_cnn_is_not_accused():
    """Its features are nearly on a line from the start (measured: 1.07 of a ResNet-50 on photographs)."""
    assert diagnose(HEALTHY._replace(feature_rank=1.07), 256, first_loss=5.0, first_rank=1.07, first_std=0.5) is None


def test_a_student_that_stays_uniform():
    assert is_stuck(HEALTHY._replace(loss=5.55, entropy=4.0, kl=1.55), 256) and not is_stuck(HEALTHY, 256)


def test_prototypes_for_few_images():
    assert too_many_prototypes(256, 2048) is None
    assert "Set out_dim to about 256" in too_many_prototypes(65536, 3000).text


def images_of(recipe):
    """For how many training images a recipe says that it is, in its first line or its data set."""
    text = recipes.summary(recipe).replace("thousands of", "1,000")
    named = re.search(r"(?:([\d,]+) to )?([\d,]+) (?:own photographs|images)\b(?! ×)", text)
    if named:
        return [int(number.replace(",", "")) for number in named.groups() if number]
    dataset = options_of(recipe).get("data", {}).get("dataset")
    return [dataset["init_args"]["count"]] if dataset else []


def options_of(recipe):
    return yaml.safe_load((recipes.folder() / f"{recipe}.yaml").read_text())


def test_no_recipe_has_too_many_prototypes_for_the_images_that_it_is_for():
    sizes = {recipe: found for recipe in recipes.names() if (found := images_of(recipe))}
    expected = {"cifar10": [50_000], "cpu": [1000], "quickstart": [2048], "small_images": [2000, 100_000]}
    assert sizes == expected | {f"dinov2_{name}": expected[name] for name in ("quickstart", "small_images")}
    for recipe, found in sizes.items():
        assert not any(too_many_prototypes(options_of(recipe)["model"].get("out_dim", 1), images) for images in found), recipe
    assert "2,000 to 100,000 own photographs" in (Path(__file__).parent.parent / "docs" / "how-to" / "images.md").read_text()


def test_loss_far_from_the_known_curve():
    assert off_the_curve(2.2, 2.0, 100) is None and "where this recipe had 2.00" in off_the_curve(5.0, 2.0, 100).text


# in a real Trainer


def train(tmp_path, doctor, n_samples=16, augmented=False, method=DINOModule, **options):
    seed_everything(0)
    random = torch.Generator().manual_seed(0)
    images = torch.randn(n_samples, 3, 16, 16, generator=random)
    samples = [[image, image + augmented * torch.randn(3, 16, 16, generator=random)] for image in images]
    head = {"out_dim": options.pop("out_dim", 16), "bottleneck_dim": 8}
    if method is not DINOModule:
        head = {"projection_dim": 8, "optimizer": "adamw", "lr": 0.01, "temperature": 0.5}
        head = {name: value for name, value in head.items() if name in inspect.signature(method).parameters}
    backbone = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    module = method(backbone, **head, hidden_dim=16, warmup_epochs=0)
    trainer = Trainer(
        accelerator="cpu", devices=1, callbacks=[doctor], log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, logger=CSVLogger(tmp_path),
        **{"max_epochs": 25, **options},
    )  # fmt: skip
    trainer.fit(module, DataLoader(samples, batch_size=4))
    with open(Path(trainer.logger.log_dir) / "metrics.csv") as file:
        return trainer, list(csv.DictReader(file))


def test_a_verdict_is_told_once_on_the_console_and_in_the_log(tmp_path, caplog):
    doctor = CollapseDoctor()
    trainer, rows = train(tmp_path, doctor)
    assert doctor.summary(trainer).startswith("nothing_to_learn (docs/troubleshooting.md); spread of the features 0.")
    told = [record.message for record in caplog.records if record.name.startswith("dino_lightning.callbacks.doctor")]
    assert len(told) == 1 and "step 61: nothing to learn" in told[0] and "Switch the augmentation on" in told[0]
    marked = [row["step"] for row in rows if row["doctor/nothing_to_learn"]]
    assert marked == ["61"] and trainer.global_step == 100
    keys = ("center_norm", "feature_std", "feature_rank", "view_agreement", "prototypes_used", "grad_norm", "teacher_entropy", "kl")
    assert all(float(row[f"train/{key}"]) >= 0 for row in rows[20:] if not row["doctor/nothing_to_learn"] for key in keys)
    assert float(rows[-1]["train/prototypes_used"]) * 16 == round(float(rows[-1]["train/prototypes_used"]) * 16) > 0


def test_it_can_stop_the_run(tmp_path, caplog):
    trainer, _ = train(tmp_path, CollapseDoctor(stop=True))
    assert trainer.global_step == 61 and "The run stops here" in caplog.text


def test_a_run_with_augmentation_is_not_accused(tmp_path, caplog):
    doctor = CollapseDoctor(stop=True)
    trainer, _ = train(tmp_path, doctor, augmented=True)
    assert doctor.summary(trainer).startswith("nothing wrong seen; spread of the features 0.")
    assert "dino_lightning.callbacks.doctor" not in {record.name for record in caplog.records}


def test_prototypes_and_the_known_curve_in_a_run(tmp_path, caplog):
    doctor = CollapseDoctor(expected_loss={30: 0.1})
    train(tmp_path, doctor, augmented=True, out_dim=128, max_epochs=11)
    assert "out_dim=128 prototypes for 16 training images" in caplog.text
    assert "at step 30 the loss is" in caplog.text and doctor.state_dict()["told"] == ["too_many_prototypes", "off_the_curve"]


@pytest.mark.parametrize("method", [SimCLRModule, BYOLModule, MoCoV3Module])
def test_methods_without_prototypes_are_watched_too(method, tmp_path, caplog):
    doctor = CollapseDoctor(expected_loss={30: 1e-3})
    _, rows = train(tmp_path, doctor, method=method)
    assert doctor.state_dict()["told"] == ["off_the_curve", "nothing_to_learn"]
    assert float(rows[-1]["train/view_agreement"]) == 1 and "train/prototypes_used" not in rows[-1]
    fine = CollapseDoctor()
    train(tmp_path, fine, method=method, augmented=True)
    assert fine.state_dict()["told"] == []


def test_accumulated_batches_leave_the_loss_as_it_is(tmp_path):
    """Lightning divides what a step returns by their number."""
    doctor = CollapseDoctor()
    _, rows = train(tmp_path, doctor, method=SimCLRModule, augmented=True, accumulate_grad_batches=2)
    logged = [float(row["train/loss"]) for row in rows[:10]]  # the first window: twenty batches
    assert doctor.state_dict()["first"]["first_loss"] == pytest.approx(sum(logged) / 10, rel=0.3)


def test_a_subclass_whose_step_gives_the_loss_alone(tmp_path):
    class Plain(DINOModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"]

    module = Plain("shufflenet_v2_x0_5", img_size=32, out_dim=8, hidden_dim=8, warmup_epochs=0)
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
                      enable_checkpointing=False, callbacks=[CollapseDoctor()])  # fmt: skip
    trainer.fit(module, DataLoader([[torch.rand(3, 32, 32)] * 2] * 4, batch_size=2))
    assert trainer.global_step == 2 and not module.teacher.head._forward_hooks


# runs of the quickstart, broken on purpose

_UNAUGMENTED = ["--data.global_crops_scale=[1,1]", "--data.local_crops_scale=[1,1]", "--data.jitter_p=0", "--data.blur_p=[0,0,0]",
                "--data.hflip_p=0"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken, verdict",
    [
        (["--model.center_momentum=1"], "one_prototype_collapse"),
        (["--model.teacher_temp=0.12", "--model.warmup_teacher_temp=0.12"], "uniform_collapse"),
        (["--model.lr=1"], "divergence"),
        (_UNAUGMENTED, "nothing_to_learn"),
        ([], None),
    ],
)
def test_broken_runs_are_named_rightly_within_200_steps(broken, verdict, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    steps = ["--trainer.max_steps=200"] if verdict else []  # the healthy one runs to its end
    main(["fit", "--config", "quickstart", "--trainer.callbacks=null", "--trainer.enable_progress_bar=false",
          "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.", *steps, *broken])  # fmt: skip
    told = [r.message for r in caplog.records if r.name == "dino_lightning.callbacks.doctor" and r.levelno >= logging.WARNING]
    with open(next(tmp_path.glob("**/metrics.csv"))) as file:
        named = [key for key in next(csv.reader(file)) if key.startswith("doctor/")]
    assert named == ([f"doctor/{verdict}"] if verdict else []) and len(told) == len(named), told


@pytest.mark.parametrize("judged", [True, False])
def test_a_validation_of_other_images_is_not_judged(judged, tmp_path, caplog):
    """What k-NN found before the first step was of the run's images: only a run's own validations are compared with that."""

    class Better(OnlineKNN):
        before = property(lambda self: 2.0, lambda self, value: None)  # than any validation

    data = MultiCropDataModule(two_colours(tmp_path / "images"), batch_size=4, num_workers=0, global_crops_size=32, local_crops_number=0)
    module = DINOModule("shufflenet_v2_x0_5", img_size=32, out_dim=8, hidden_dim=8, warmup_epochs=0)
    module.started_from = "published.pth"
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[Better(), CollapseDoctor()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data) if judged else trainer.validate(module, data, verbose=False)
    assert ("forgetting" in caplog.text) == judged
