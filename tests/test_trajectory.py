"""Whole training runs of the reference, by a real Trainer: plain, accumulated and resumed (on two ranks: test_two_ranks.py)."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from trajectory import Golden, assert_same_end, build_loader, train

RUNS = ["trajectory_adamw", "trajectory_sgd"]


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
