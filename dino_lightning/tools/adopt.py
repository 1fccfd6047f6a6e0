"""``dino-lightning adopt``: a run of the reference implementation becomes one of ours."""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from torch import Tensor, nn

from dino_lightning.methods.dino import DINOModule
from dino_lightning.tools.training import new_file
from dino_lightning.training.optim import is_decayed
from dino_lightning.weights.files import read

# The reference's flags that bear the names of our options.
_MODEL = (
    "patch_size", "out_dim", "norm_last_layer", "momentum_teacher", "use_bn_in_head", "warmup_teacher_temp", "teacher_temp",
    "warmup_teacher_temp_epochs", "weight_decay", "weight_decay_end", "clip_grad", "freeze_last_layer", "lr", "warmup_epochs",
    "min_lr", "optimizer", "drop_path_rate",
)  # fmt: skip
_DATA = ("global_crops_scale", "local_crops_number", "local_crops_scale", "seed")


def adopt(checkpoint: str, output: str = "adopted", steps_per_epoch: int | None = None) -> None:
    """Makes a checkpoint of the reference's main_dino.py (checkpoint.pth) one that dino-lightning fit goes on from.

    Student, teacher, head, centre, the optimizer's moments and the epoch are taken over, and the flags as options: the next step
    is the one that the reference would have taken. Its data order and augmentation are not: those are ours from here on.

    Args:
        checkpoint: of the reference, a whole one, not the backbone alone (for that there is --model.weights of fit).
        output: a new folder for adopted.ckpt and config.yaml.
        steps_per_epoch: of that run; by default what AdamW has counted, but in half precision, in which it left steps out.
    """
    path = Path(checkpoint)
    held, _ = read(path)
    if "iteration" in held and "model" in held:
        raise ValueError(
            f"{path} is a checkpoint of DINOv2's training, which holds one rank's flat shards of networks and moments (FSDP's local state) "
            "without the shapes to put them together by. What can be taken over are the teacher's weights: "
            "eval/training_N/teacher_checkpoint.pth of that run behind --model.weights, with --method dinov2"
        )
    if not isinstance(held.get("args"), argparse.Namespace):
        raise ValueError(f"{path} holds no flags of main_dino.py ('args'), but {', '.join(map(str, held))}")
    flags = vars(held["args"])
    if "arch" not in flags:
        raise ValueError(f"{path} holds flags ('args') of another program than main_dino.py: there is no arch among them")
    flags["arch"] = flags["arch"].replace("deit_", "vit_")  # as it was called at first
    if held.get("fp16_scaler") and steps_per_epoch is None:
        raise ValueError(
            f"{path} is of a run in half precision, whose optimizer does not count the steps that the scaler skipped; give "
            "steps_per_epoch: the images // (batch_size_per_gpu × GPUs)"
        )
    module = DINOModule(backbone=flags["arch"], **{name: flags[name] for name in _MODEL if name in flags})
    try:
        adopted = lightning_checkpoint(held, module, steps_per_epoch)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is no whole checkpoint of a network as its flags describe it: {error}") from error
    config = {
        "model": {"backbone": flags["arch"], **{name: flags[name] for name in _MODEL if name in flags}},
        "data": {
            "batch_size": flags["batch_size_per_gpu"],
            **{name: _plain(flags[name]) for name in _DATA if name in flags},
        },
        "trainer": {"max_epochs": flags["epochs"], "precision": "16-mixed" if flags.get("use_fp16") else "32-true"},
    }
    file = new_file(str(Path(output) / "adopted.ckpt"))
    torch.save(adopted, file)
    (file.parent / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    steps = adopted["layout"]["steps_per_epoch"]
    print(
        f"{held['epoch']} of {flags['epochs']} epochs of {steps} steps of {adopted['layout']['images_per_step']} images. Go on with:\n"
        f"dino-lightning fit --config {file.parent / 'config.yaml'} --data.root IMAGES --ckpt_path {file}"
    )


def lightning_checkpoint(held: Mapping[str, Any], module: DINOModule, steps_per_epoch: int | None = None) -> dict[str, Any]:
    """A checkpoint for a Trainer with this module from one in the reference's layout, written at the end of an epoch.

    Args:
        held: "student", "teacher", "optimizer", "dino_loss", "epoch", "args" and, under float16, "fp16_scaler".
        module: with the shapes of that run; takes its weights.
        steps_per_epoch: optimizer steps of an epoch, a batch each.

    Raises:
        KeyError: if one of these is missing.
        RuntimeError: if weights are missing, left over or of another shape.
        ValueError: if the optimizer's state is of another network, or does not tell the steps of an epoch.
    """
    for name in ("student", "teacher"):
        getattr(module, name).load_state_dict(_unwrapped(held[name]))
    module.loss.load_state_dict(held["dino_loss"])
    optimizer = _optimizer_state(held["optimizer"], _unwrapped(held["student"]), module)
    epochs = held["epoch"]
    if steps_per_epoch is None:
        steps_per_epoch = _count_steps(optimizer, epochs)
    flags = vars(held["args"])
    return {
        "epoch": epochs - 1,
        "global_step": epochs * steps_per_epoch,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": module.state_dict(),
        "loops": {"fit_loop": _finished_epochs(epochs, steps_per_epoch)},
        "callbacks": {},
        "optimizer_states": [optimizer],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": dict(module.hparams),
        "drop_path_seed": flags.get("seed", 0),
        "layout": {
            "images_per_step": flags["batch_size_per_gpu"] * flags.get("world_size", 1),
            "steps_per_epoch": steps_per_epoch,
            "accumulate_grad_batches": 1,
            "world_size": flags.get("world_size", 1),
        },
        **({"MixedPrecision": held["fp16_scaler"]} if held.get("fp16_scaler") else {}),
    }


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _optimizer_state(state: Mapping[str, Any], student: Mapping[str, Tensor], module: DINOModule) -> dict[str, Any]:
    """The state of our optimizer with the moments of theirs. Both number the parameters: here they meet by name."""
    trained = {name: p for name, p in module.student.named_parameters() if p.requires_grad}
    ours, theirs = _numbered(trained, trained), _numbered([name for name in student if name in trained], trained)
    if sum(len(group["params"]) for group in state["param_groups"]) != len(theirs):
        raise ValueError("the optimizer's state is of another number of parameters than the student has")
    template = module.build_optimizer(fused=False).state_dict()
    for group, held in zip(template["param_groups"], state["param_groups"]):
        group.update({name: float(value) for name, value in held.items() if name in ("lr", "weight_decay")})  # theirs are numpy's
    template["state"] = {
        ours[name]: {_OUR_NAMES.get(key, key): _tensor(value) for key, value in state["state"][theirs[name]].items()}
        for name in ours
        if theirs[name] in state["state"]
    }
    return template


_OUR_NAMES = {"mu": "momentum_buffer"}  # of LARS


def _tensor(value: Any) -> Any:
    return torch.tensor(float(value)) if isinstance(value, int | float) else value  # steps, which older torch counts in integers


def _numbered(names: Iterable[str], parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """The number of each parameter in an optimizer's state: the decayed ones first."""
    names = list(names)
    decayed = [name for name in names if is_decayed(name, parameters[name])]
    return {name: i for i, name in enumerate(decayed + [name for name in names if name not in set(decayed)])}


def _count_steps(optimizer: Mapping[str, Any], epochs: int) -> int:
    counted = max((int(state["step"]) for state in optimizer["state"].values() if "step" in state), default=0)
    if counted == 0 or counted % epochs:
        raise ValueError(
            f"the optimizer has counted {counted} steps in {epochs} epochs, which does not tell the steps of an epoch; give steps_per_epoch"
        )
    return counted // epochs


def _finished_epochs(epochs: int, steps: int) -> dict[str, Any]:
    """Lightning's progress at the end of an epoch, as it stands in a checkpoint from there."""

    def count(current: int, total: int, names: tuple[str, ...] = ("ready", "completed", "started", "processed")) -> dict[str, Any]:
        return {"current": dict.fromkeys(names, current), "total": dict.fromkeys(names, total)}

    total = epochs * steps
    optimizer = {"step": count(steps, total, ("ready", "completed")), "zero_grad": count(steps, total, ("ready", "completed", "started"))}
    epoch = count(epochs, epochs)
    for kind in epoch.values():
        kind["completed"] = epochs - 1
    return {
        "state_dict": {},
        "epoch_progress": epoch,
        "epoch_loop.state_dict": {"_batches_that_stepped": total},
        "epoch_loop.batch_progress": {**count(steps, total), "is_last_batch": True},
        "epoch_loop.automatic_optimization.state_dict": {},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": optimizer},
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
