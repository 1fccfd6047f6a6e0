"""Whole training runs of the reference, by a real Trainer: plain, accumulated, resumed, and on two real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from trajectory import Golden, build_loader, train

RUNS = ["trajectory_adamw", "trajectory_sgd"]


def assert_same_end(state: dict[str, torch.Tensor], golden: Golden) -> None:
    for network in ("student", "teacher"):
        for key, expected in golden.part(f"final.{network}.").items():
            got = state[f"{network}.{key}"]
            if key.endswith("qkv.bias"):
                # The softmax ignores the bias of the keys: its gradient is rounding noise, which AdamW blows up to 1e-6.
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
                got, expected = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (got, expected))
            error = (got - expected).norm() / expected.norm()
            assert not error > 1e-4, f"{network}.{key} is off by {error:.2e}"


@pytest.mark.parametrize("run", RUNS)
def test_trajectory_equals_the_reference(run):
    golden = Golden(run)
    module, record = train(golden, build_loader(golden, batch_size=4))
    torch.testing.assert_close(torch.tensor(record.losses).double(), golden["losses"], rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.stack(record.centers), golden["centers"], rtol=1e-4, atol=1e-6)
    for name in ("lr", "weight_decay", "momentum"):
        applied = torch.tensor(getattr(record, name), dtype=torch.float64)
        torch.testing.assert_close(applied, golden[name], rtol=1e-7, atol=1e-10)
    assert_same_end(module.state_dict(), golden)


@pytest.mark.parametrize("run", RUNS)
def test_micro_batches_of_one_accumulated(run):
    golden = Golden(run)
    module, record = train(golden, build_loader(golden, batch_size=1), accumulate_grad_batches=4)
    losses = torch.tensor(record.losses).double().view(-1, 4).mean(dim=1)
    torch.testing.assert_close(losses, golden["losses"], rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.stack(record.centers), golden["centers"], rtol=1e-4, atol=1e-6)
    assert_same_end(module.state_dict(), golden)


@pytest.mark.parametrize("run", RUNS)
def test_resumed_from_the_end_of_an_epoch(run, tmp_path):
    golden = Golden(run)
    every_epoch = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, _ = train(golden, build_loader(golden, batch_size=4), callbacks=[every_epoch])
    resumed, record = train(golden, build_loader(golden, batch_size=4), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert len(record.losses) == golden["losses"].numel() - 2 * golden.item("config.niter")
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    assert_same_end(resumed.state_dict(), golden)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which two ranks leave RUN0.pt and RUN1.pt of both runs."""
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, Path(__file__).with_name("trajectory.py"), folder, *RUNS]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=one_thread)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("run", RUNS)
def test_two_processes(run, two_processes):
    golden, ranks = Golden(run), [torch.load(two_processes / f"{run}{i}.pt") for i in (0, 1)]
    losses = torch.tensor([rank["losses"] for rank in ranks]).double().mean(dim=0)
    torch.testing.assert_close(losses, golden["losses"], rtol=1e-4, atol=0)
    for rank in ranks:
        assert_same_end(rank["state"], golden)
        torch.testing.assert_close(rank["state"]["loss.center"][0], golden["centers"][-1], rtol=1e-4, atol=1e-6)


def test_step_checkpoints_hold_the_updated_teacher_and_centre(tmp_path):
    """Callbacks save before the module's own hook: the state of step n must be complete in the checkpoint of step n."""

    class StateBetweenSteps(Callback):
        states = {}

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.states[trainer.global_step] = {k: v.clone() for k, v in module.state_dict().items()}

    golden = Golden("trajectory_adamw")
    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    train(golden, build_loader(golden, batch_size=4), callbacks=[every_step, StateBetweenSteps()], max_epochs=2)
    for step in range(1, 6):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        expected, before = StateBetweenSteps.states[step], StateBetweenSteps.states[step - 1]
        assert all(torch.equal(saved[key], expected[key]) for key in expected)
        assert not torch.equal(saved["loss.center"], before["loss.center"])
        assert not torch.equal(saved["teacher.head.mlp.0.weight"], before["teacher.head.mlp.0.weight"]) or step == 1
