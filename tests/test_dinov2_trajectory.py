"""Whole training runs of DINOv2's reference, by a real Trainer: plain, resumed and accumulated (on two ranks: test_two_ranks.py)."""

import pytest
import torch
from dinov2_trajectory import SCHEDULES, Golden, assert_same_losses, build_loader, build_module, train
from lightning.pytorch.callbacks import ModelCheckpoint
from trajectory import assert_same_end

from dino_lightning.methods.dinov2 import DINOv2Plan
from dino_lightning.training.schedules import cosine_schedule

RUNS = ["dinov2/trajectory_sinkhorn", "dinov2/trajectory_centering"]


@pytest.mark.parametrize("run", RUNS)
def test_trajectory_equals_the_reference_and_resumes(run, tmp_path):
    golden = Golden(run)
    every_epoch = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module, record = train(golden, build_loader(golden, batch_size=4), callbacks=[every_epoch])
    assert_same_losses({name: torch.tensor(values).double() for name, values in record.losses.items()}, golden)
    torch.testing.assert_close(torch.tensor(record.norms), golden["grad_norm"].float(), rtol=1e-4, atol=0)
    for name in SCHEDULES:
        torch.testing.assert_close(torch.tensor(record.steps[name]), golden[name].float(), rtol=1e-6, atol=1e-12)
    if golden.item("config.centering") == "centering":
        for i, name in enumerate(("dino", "ibot")):
            centers = torch.stack([step[i] for step in record.centers])
            torch.testing.assert_close(centers, golden[f"centers.{name}"], rtol=1e-4, atol=1e-6)
    assert_same_end(module.state_dict(), golden, key_bias=1e-4)
    resumed, again = train(golden, build_loader(golden, batch_size=4), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert len(again.norms) == 3
    for key, value in module.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_micro_batches_equal_one_batch_with_centring():
    """KoLeo sees the micro-batch, and is switched off here."""
    golden = Golden("dinov2/trajectory_centering")
    runs = []
    for size in (4, 2, 1):
        module = build_module(golden, koleo_loss_weight=0.0)
        trained, _ = train(golden, build_loader(golden, batch_size=size), module=module, accumulate_grad_batches=4 // size)
        runs.append(trained.state_dict())
    for parts in runs[1:]:
        for key, value in parts.items():
            if "qkv.bias" not in key:
                assert (value - runs[0][key]).norm() < 1e-4 * value.norm(), key


@pytest.mark.parametrize("case", [0, 1])
def test_schedules(golden, case):
    g = golden("dinov2/schedules")
    config = {name: g.item(f"{case}.config.{name}") for name in (
        "lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "momentum_teacher", "warmup_teacher_temp", "teacher_temp",
        "warmup_teacher_temp_epochs",
    )}  # fmt: skip
    steps_per_epoch, epochs = g.item(f"{case}.config.niter"), g.item(f"{case}.config.epochs")
    freeze = g.item(f"{case}.config.freeze_last_layer_epochs")
    plan = DINOv2Plan(epochs * steps_per_epoch, steps_per_epoch, **config, freeze_last_layer=freeze)
    for name in SCHEDULES:
        expected = g[f"{case}.{name}"]
        found = torch.tensor([getattr(plan, f"{name}_at")(step) for step in range(len(expected))], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert found.tolist() == [plan.values_at(step)[name] for step in range(len(expected))]


def test_a_schedule_that_is_frozen_first(golden):
    g = golden("dinov2/schedules")
    args = {name: g.item(f"freeze.args.{name}") for name in ("base_value", "final_value", "total_iters", "warmup_iters", "freeze_iters")}
    shape = {"warmup_steps": args["warmup_iters"], "start_value": g.item("freeze.args.start_warmup_value")}
    frozen, values = args["freeze_iters"], g["freeze.values"]
    total = args["total_iters"] - frozen
    ends = {name: args[name] for name in ("base_value", "final_value")}
    found = [0.0 if i < frozen else cosine_schedule(i - frozen, total_steps=total, **ends, **shape) for i in range(len(values))]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("run", [*RUNS, "dinov2/trajectory_two_ranks"])
def test_rates_of_the_parameters(run):
    """What the optimizer is told in a step in the middle is the golden plan's, times the golden multipliers."""
    golden = Golden(run)
    module = build_module(golden)
    steps, epochs = golden.item("config.niter"), golden.item("config.epochs")
    module._plan = DINOv2Plan.of(module.options, epochs * steps, steps, golden.item("config.lr"))
    optimizer = module.build_optimizer(fused=False)
    of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    parameters = dict(module.student.named_parameters())
    names = golden.names("params.name")
    assert sorted(names) == sorted(parameters)
    for step in (1, 5):
        module.set_rates(optimizer.param_groups, step)
        for name, lr, decay, last in zip(
            names, *(golden[f"params.{key}"].tolist() for key in ("lr_multiplier", "wd_multiplier", "is_last_layer"))
        ):
            group, rate = of[parameters[name]], golden["last_layer_lr" if last else "lr"][step].item()
            assert group["lr"] == pytest.approx(lr * rate, rel=1e-6, abs=1e-15), name
            assert group["weight_decay"] == pytest.approx(decay * golden["weight_decay"][step].item(), rel=1e-6), name
