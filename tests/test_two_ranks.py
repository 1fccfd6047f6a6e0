"""Two real processes (gloo) with a MultiCropDataModule."""

import os
import subprocess
import sys
from pathlib import Path

import dinov2_trajectory
import pytest
import torch
import trajectory
from conftest import Golden, write_labelled
from lightning.pytorch.callbacks import ModelCheckpoint
from two_ranks import GOLDEN, RESNET, train

from dino_lightning.callbacks import OnlineProbe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("two_ranks"))


@pytest.fixture(scope="module")
def one(folder):
    """One process with batches of 4, which saves each step and has a probe beside; with a user's own loader; with a ResNet."""
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    plain = train(
        folder, batch_size=4, devices=1, limit_train_batches=4, callbacks=[saving, OnlineProbe()], enable_checkpointing=True
    )  # fmt: skip
    resnet = train(folder, batch_size=4, devices=1, **RESNET)
    return {"plain": plain, "uneven": train(folder, batch_size=4, devices=1, uneven=True), "synced": resnet}


@pytest.fixture(scope="module")
def two(folder, one):
    """What two ranks write, and all that they say: one start of two processes for all scenarios, as starting takes longest."""
    scenarios = ["fit", "accumulate", "uneven", "resume", "probe", "cnn", "saving", "synced", "sick", *GOLDEN]
    scenarios += ["sharded", "sharded, resumed", "dinov2", "dinov2, sharded", "mae", "mae, sharded"]
    command = [sys.executable, Path(__file__).with_name("two_ranks.py"), folder, *scenarios, "nan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    written = {name: [folder / f"{name}{rank}.pt" for rank in (0, 1)] for name in scenarios}
    assert all(path.exists() for paths in written.values() for path in paths), done.stderr
    assert done.returncode != 0 and not list(folder.glob("nan*.pt")), "the last one ends them"
    return {name: [torch.load(path) for path in paths] for name, paths in written.items()}, done.stderr


def test_two_ranks_save_by_the_clock_behind_the_same_step(folder, two):
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 21, "asked at step 10, known at the next that is ten later and ends no epoch: 20 does"


@pytest.mark.slow
def test_rank_0_decides_from_where_a_run_goes_on(tmp_path):
    """Started from outside, as under SLURM; each has found another checkpoint, in the same folder or of another run."""
    script = """
import sys
from lightning.pytorch import Trainer
from dino_lightning.continuation import agree
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
print(agree(sys.argv[1], trainer))
"""
    outside = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "dino", "SLURM_NODEID": "0",
               "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    for port, paths, message in (("29571", ("a/1.ckpt", "a/2.ckpt"), ""), ("29572", ("a/1.ckpt", "b/1.ckpt"), "rank 0 resumes a/1.ckpt")):
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", script, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                env={**os.environ, **outside, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": port},
            )
            for rank, path in zip("01", paths)
        ]  # fmt: skip
        (said, _), (other, error) = (process.communicate(timeout=120) for process in ranks)
        assert said.endswith("a/1.ckpt\n")
        assert message in error if message else other.endswith("a/1.ckpt\n")


@pytest.mark.parametrize("scenario", ["fit", "accumulate", "uneven", "resume", "sharded", "sharded, resumed"])
def test_two_ranks_equal_one_process_of_the_whole_batch(one, two, scenario):
    expected, ranks = one.get(scenario, one["plain"]), two[0][scenario]
    losses = expected["losses"][3:] if "resume" in scenario else expected["losses"]
    # Lightning has divided the loss of a micro-batch by their number.
    mean_losses = torch.tensor([rank["losses"] for rank in ranks]).unflatten(1, (len(losses), -1)).sum(dim=2).mean(dim=0)
    torch.testing.assert_close(mean_losses, torch.tensor(losses), rtol=1e-5, atol=0)
    for key, value in expected["state"].items():
        assert torch.equal(ranks[0]["state"][key], ranks[1]["state"][key]), key
        if not key.endswith("qkv.bias"):  # the bias of the keys has no gradient but rounding noise
            # Of the tensor: AdamW makes a step of 1e-3 of a single weight's rounding where its gradient is small.
            assert (ranks[0]["state"][key] - value).norm() <= 1e-5 * value.norm(), key
    assert_same_metrics(expected, ranks, {"val/knn_top1", "val/knn_top5"})


def test_a_checkpoint_of_shards_is_one_of_the_whole(folder, one, two):
    """A single process goes on from it; what it holds are plain tensors in the order of the optimizer."""
    path = folder / "sharded" / "step=3.ckpt"
    sharded, plain = (torch.load(file, weights_only=True) for file in (path, folder / "step=3.ckpt"))
    assert sharded.keys() == plain.keys() and sharded["state_dict"].keys() == plain["state_dict"].keys()
    assert sharded["optimizer_states"][0]["state"].keys() == plain["optimizer_states"][0]["state"].keys()
    again = train(folder, batch_size=4, devices=1, limit_train_batches=4, ckpt_path=path)
    assert again["losses"] == pytest.approx(one["plain"]["losses"][3:], rel=1e-5)


@pytest.mark.parametrize("method", ["dinov2", "mae"])
def test_other_methods_on_shards_are_what_they_are_on_whole_networks(two, method):
    """DINOv2 also where its blocks are computed anew in the backward pass."""
    for whole, sharded in zip(two[0][method], two[0][f"{method}, sharded"]):
        assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        for key, value in whole["state"].items():
            if not key.endswith("qkv.bias"):
                assert (sharded["state"][key] - value).norm() <= 1e-5 * value.norm(), key


def test_the_probe_on_two_ranks_equals_one_process(one, two):
    ranks = two[0]["probe"]
    heads = [result["probes"][0]["head"] for result in (one["plain"], *ranks)]
    for name, value in heads[0].items():
        assert torch.equal(heads[1][name], heads[2][name])
        torch.testing.assert_close(heads[1][name], value, rtol=1e-4, atol=1e-6)
    assert_same_metrics(one["plain"], ranks, {"val/knn_top1", "val/probe_top1", "val/probe_top5"})


def assert_same_metrics(expected, ranks, exact):
    """Each query counts once; RankMe, of a decomposition, is as exact as the features. A checkpoint may monitor them on every rank."""
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    for name in exact:
        assert ranks[0]["metrics"][name] == expected["metrics"][name], name
    assert ranks[0]["metrics"]["val/rank_me"] == pytest.approx(expected["metrics"]["val/rank_me"], rel=1e-5)


def test_other_devices_are_pointed_out_on_resume(two):
    assert two[1].count("resumed on 2 device(s) with 1 accumulated batches; before, there were 1 and 1") == 1


def test_a_cnn_on_two_ranks_uses_every_parameter(two):
    """Without find_unused_parameters; that its batch norms are each rank's own is pointed out (on a CPU they must be)."""
    results, said = two
    first, second = (rank["state"] for rank in results["cnn"])
    assert all(torch.equal(first[key], second[key]) for key in first if "running" not in key)
    assert "no optimizer holds" not in said and "have no effect" not in said, "of any method, in shards or not"
    assert "over all 2 devices; synchronised ones (sync_batchnorm) need GPUs" in said


def test_synchronised_batch_norms_have_the_statistics_of_one_process(one, two):
    """In both networks; in double precision, as a ResNet makes a thousand times more of each rounding."""
    expected, ranks = one["synced"], two[0]["synced"]
    mean_losses = torch.tensor([rank["losses"] for rank in ranks]).mean(dim=0)
    torch.testing.assert_close(mean_losses, torch.tensor(expected["losses"]), rtol=1e-6, atol=0)
    for key, value in expected["state"].items():
        assert torch.equal(ranks[0]["state"][key], ranks[1]["state"][key]), key
        torch.testing.assert_close(ranks[0]["state"][key], value, rtol=1e-8, atol=1e-11, msg=lambda m: f"{key}: {m}")


def test_the_doctor_stops_both_ranks_behind_the_same_step(two):
    results, said = two
    assert [len(rank["losses"]) for rank in results["sick"]] == [61, 61]
    assert said.count("uniform collapse: ") == 1


def test_non_finite_loss_on_one_rank_stops_both(two):
    assert two[1].count("NonFiniteLossError: the loss was not finite at step 2 ") == 2, two[1]


@pytest.mark.parametrize("run", ["adamw", "sgd"])
def test_two_ranks_equal_the_reference(run, two):
    golden, ranks = Golden(f"trajectory_{run}"), two[0][run]
    losses = torch.tensor([rank["losses"] for rank in ranks]).double().mean(dim=0)
    torch.testing.assert_close(losses, golden["losses"], rtol=1e-4, atol=0)
    for rank in ranks:
        trajectory.assert_same_end(rank["state"], golden)
        torch.testing.assert_close(rank["state"]["loss.center"][0], golden["centers"][-1], rtol=1e-4, atol=1e-6)


def test_dinov2_on_two_ranks_equals_the_reference_and_one_process(two):
    """One process of all images without KoLeo, whose neighbours are those of a rank."""
    golden, ranks = Golden("dinov2/trajectory_two_ranks"), two[0]["golden dinov2"]
    both = {name: torch.tensor([rank["losses"][name] for rank in ranks]).double().mean(dim=0) for name in dinov2_trajectory.LOSSES}
    dinov2_trajectory.assert_same_losses(both, golden)
    assert [rank["key"][1:] for rank in ranks] == [(8, 2, 0), (8, 2, 1)], "step, micro-batch and rank decide what is drawn"
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank["norms"]), golden["grad_norm"].float(), rtol=1e-4, atol=0)
        trajectory.assert_same_end(rank["state"], golden, key_bias=1e-4)
    module = dinov2_trajectory.build_module(golden, koleo_loss_weight=0.0)
    one, record = dinov2_trajectory.train(golden, dinov2_trajectory.build_loader(golden, batch_size=4), module=module)
    ranks = two[0]["golden dinov2 without KoLeo"]
    both = torch.tensor([rank["losses"]["loss"] for rank in ranks]).mean(dim=0)
    torch.testing.assert_close(both, torch.tensor(record.losses["loss"]), rtol=1e-5, atol=0)
    for key, value in one.state_dict().items():
        if "qkv.bias" not in key:
            assert (ranks[1]["state"][key] - value).norm() <= 1e-4 * value.norm(), key
