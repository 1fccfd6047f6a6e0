"""Runs that are stopped or killed, as real processes, and go on: they end as the run that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_images
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dino_lightning import DINOModule
from dino_lightning.training.checkpoint_io import AtomicCheckpointIO

SMALL = """
seed_everything: 0
data: {root: images, batch_size: 4, num_workers: 1, global_crops_size: 32, local_crops_size: 16, local_crops_number: 2}
model:
  backbone:
    class_path: dino_lightning.VisionTransformer
    init_args: {img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2, drop_path_rate: 0.1}
  out_dim: 64
  hidden_dim: 32
  warmup_epochs: 1
trainer: {accelerator: cpu, devices: 1, max_epochs: 12, enable_model_summary: false, enable_progress_bar: false}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 24)
    Path("small.yaml").write_text(SMALL)
    return tmp_path


def start(root, *options, launcher=(sys.executable, "-m", "dino_lightning"), config="small.yaml", **variables):
    command = [*launcher, "fit", "--config", config, "--trainer.default_root_dir", root, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)


def finish(process, code=0, seconds=300):
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, said
    return said


def newest(root):
    return max(Path(root).glob("**/last*.ckpt"), key=lambda path: path.stat().st_mtime)


def wait_for_checkpoint(root, process):
    while not list(Path(root).glob("**/last*.ckpt")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def assert_same_end(root, other):
    one, two = (torch.load(newest(folder), weights_only=True) for folder in (root, other))
    assert one["global_step"] == two["global_step"]
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    for state, same in zip(one["optimizer_states"][0]["state"].values(), two["optimizer_states"][0]["state"].values()):
        assert all(torch.equal(state[name], same[name]) for name in state)


@pytest.mark.slow
def test_a_signal_saves_the_step_and_the_run_goes_on(folder):
    whole, stopped = start("whole"), start("stopped")
    wait_for_checkpoint("stopped", stopped)
    os.killpg(stopped.pid, signal.SIGTERM)  # the workers too, as SLURM does
    assert "SIGTERM: saving" in finish(stopped, code=143)
    step = torch.load(newest("stopped"), weights_only=True)["global_step"]
    assert 6 <= step < 72
    finish(start("stopped", "--ckpt_path", "last"))
    finish(whole)
    assert_same_end("stopped", "whole")


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_stops_both_behind_the_same_step(folder):
    """Begun by torchrun, gone on with under SLURM; the same on two machines, and started again by torchrun behind a killed rank."""
    two = ["--trainer.devices", "2", "--data.batch_size", "2", "--trainer.strategy", "ddp"]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533", "-m", "dino_lightning")
    stopped = start("stopped", *two, launcher=torchrun)
    wait_for_checkpoint("stopped", stopped)
    children = Path(f"/proc/{stopped.pid}/task/{stopped.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGUSR1)
    said = finish(stopped, code=1)  # torchrun's own; it ends the slower rank when the faster one has left
    assert said.count("SIGUSR1: saving") == 1 and "exitcode  : 138" in said, said
    slurm = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "dino", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    resumed = [start("stopped", *two, "--ckpt_path", "last", **slurm, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in "01"]
    for rank, process in enumerate(resumed):
        assert f"GLOBAL_RANK: {rank}, MEMBER: {rank + 1}/2" in finish(process)
    # Two machines, each with an agent of its own; and a killed rank, behind which torchrun starts the same command again.
    machines = [
        start("whole", *two, "--trainer.num_nodes", "2", "--trainer.devices", "1", launcher=(*torchrun[:3], "--nnodes=2", f"--node_rank={rank}",
              "--nproc_per_node=1", "--master_addr=127.0.0.1", "--master_port=29534", "-m", "dino_lightning"))
        for rank in range(2)
    ]  # fmt: skip
    for machine in machines:
        finish(machine)
    elastic = ("--max_restarts=1", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:29535", "--nproc_per_node=2", "-m", "dino_lightning")
    killed = start("killed", *two, "--ckpt_path", "last", launcher=(*torchrun[:3], *elastic), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for_checkpoint("killed", killed)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    said = finish(killed)
    assert (
        "issue 135712" not in said
        and "nothing to go on with yet" in said
        and "another rank of this run has ended" in said
        and "going on from" in said
    )
    for folder in ("stopped", "killed"):
        assert_same_end(folder, "whole")


@pytest.mark.slow
def test_a_killed_rank_or_worker_ends_the_run_in_seconds(folder):
    """With what to do in the last line."""
    two = ["--trainer.devices", "2", "--data.batch_size", "2", "--trainer.strategy", "ddp"]
    for name, options, words in (
        ("rank", two, "another rank of this run has ended"),
        ("worker", [], "a worker process of the loader is gone"),
    ):
        process = start(name, *options, "--trainer.max_epochs", "2000")
        wait_for_checkpoint(name, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        # Lightning starts its rank by the name of the module's file; a worker is a fork.
        is_rank = {int(pid): "__main__" in Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
        os.kill(next(pid for pid in is_rank if is_rank[pid] == (name == "rank")), signal.SIGKILL)
        assert words in finish(process, code=1, seconds=30)


def test_checkpoints_are_written_beside_and_moved_into_place(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "new" / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)
    assert torch.load(path) == {"step": 1} and [p.name for p in path.parent.iterdir()] == ["last.ckpt"]

    class Unsavable:
        def __reduce__(self):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        io.save_checkpoint({"weights": torch.zeros(1000), "step": Unsavable()}, path)
    assert torch.load(path) == {"step": 1}, "the old one is still whole"
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"], "and the rest of the new one is gone"
    (path.parent / ".last.ckpt.abc.partial").write_text("of a process that was killed")
    io.save_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 2} and [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_runs_write_their_checkpoints_so_unless_told_otherwise(tmp_path):
    class Own(TorchCheckpointIO):
        pass

    for plugins, expected in (([], AtomicCheckpointIO), ([Own()], Own)):
        trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, plugins=plugins, enable_progress_bar=False,
                          enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
        module = DINOModule(backbone="vit_tiny", img_size=16, out_dim=8, hidden_dim=8, warmup_epochs=0)
        views = torch.utils.data.DataLoader([[torch.rand(3, 16, 16)] * 2] * 2, batch_size=2)
        trainer.fit(module, views)
        assert type(trainer.strategy.checkpoint_io) is expected


@pytest.mark.slow
def test_the_quickstart_survives_twenty_kills(tmp_path, monkeypatch):
    """SIGKILL at random moments, with a checkpoint after every step, so that many fall into the writing of one."""
    monkeypatch.chdir(tmp_path)
    options = ["--data.dataset.init_args.count", "1024", "--checkpoint.every_n_train_steps", "1"]
    whole = start("whole", *options, config="quickstart")
    rng, kills, in_writing = random.Random(0), 0, 0
    while kills < 20:
        resume = ["--ckpt_path", "last"] if list(Path("killed").glob("**/last*.ckpt")) else []
        process = start("killed", *options, *resume, config="quickstart")
        before = {path: path.stat().st_mtime for path in Path("killed").glob("**/*.ckpt")}
        while process.poll() is None and before == {p: p.stat().st_mtime for p in Path("killed").glob("**/*.ckpt")}:
            time.sleep(0.1)  # until it has saved something of its own: else it may never get on
        time.sleep(rng.uniform(0, 3))
        assert process.poll() is None, f"over after {kills} kills:\n{process.communicate()[0]}"
        process.kill()
        process.communicate()
        kills += 1
        in_writing += bool(list(Path("killed").glob("**/.*.partial")))
        for path in Path("killed").glob("**/.*.partial"):
            path.unlink()
        torch.load(newest("killed"), weights_only=True)
    finish(start("killed", *options, "--ckpt_path", "last", config="quickstart"))
    finish(whole)
    assert_same_end("killed", "whole")
    print(f"{kills} kills, {in_writing} of them while a checkpoint was written")
