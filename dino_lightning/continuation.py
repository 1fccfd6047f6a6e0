"""What a command takes from the checkpoint that it goes on with: which one it is, its options, its run folder."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dino_lightning.callbacks.run_config import RunConfig
from dino_lightning.door.arguments import read_config
from dino_lightning.door.commands import said
from dino_lightning.door.errors import UsageError

_CHOSEN = "DINO_LIGHTNING_LAST"  # environment variable: the processes that Lightning starts go on with what rank 0 found
_LOGGERS = {"TensorBoardLogger": "events.out.tfevents*", "CSVLogger": "*"}  # and what tells their run folders


def checkpoint_at(path: str, root: str | None, checkpoints: str | None, images: str | None = None) -> str:
    """The file that ``--ckpt_path`` names: ``last`` is that of ``find_last``."""
    return find_last(root, checkpoints, images) if path == "last" else os.path.expanduser(path)


def find_last(root: str | None, checkpoints: str | None, images: str | None = None) -> str:
    """The newest ``last*.ckpt`` anywhere below a run's root folder (None: the current one), or where its checkpoints are kept instead; where
    ``images`` are named, of the runs that are not known to be on others, if there are any.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the folder is an address, which cannot be searched.
    """
    if _was_told():
        return os.environ[_CHOSEN]
    folders = [os.path.expanduser(folder) for folder in (root or ".", *([checkpoints] if checkpoints else []))]
    for folder in folders:
        if "://" in folder:
            raise ValueError(f"--ckpt_path last looks in folders of this machine, not at {folder}; name the checkpoint")
    # A link may lead nowhere.
    found = [path for folder in folders for path in Path(folder).glob("**/last*.ckpt") if path.exists()]
    if not found:
        raise FileNotFoundError(
            f"--ckpt_path last: there is no last.ckpt below {' or '.join(str(Path(folder).resolve()) for folder in folders)}; "
            "set --trainer.default_root_dir to the folder of the earlier run, or name the file"
        )
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        if not images or not _other_images(path, images):
            return str(path)
    others = _other_images(found[0], images)
    rank_zero_warn(f"--ckpt_path last: {found[0]} is of a run on {others}, not on {images}; going on with it, as there is no other")
    return str(found[0])


def _other_images(checkpoint: Path, images: str) -> str | None:
    """The folder of images that the run of a checkpoint was on, if it is known and not ``images``."""
    try:
        said = read_config(str(checkpoint.parent.parent / "config.yaml")).get("data")
    except UsageError:  # a file of somebody else's, or not whole
        return None
    root = said.get("root") if isinstance(said, dict) else None
    known = isinstance(root, str) and os.path.abspath(os.path.expanduser(root)) != os.path.abspath(os.path.expanduser(images))
    return root if known else None


def restartable(args: Sequence[str]) -> list[str]:
    """Arguments of fit, without ``--ckpt_path last`` as long as there is nothing to go on with and torchrun may start them again.

    (``torchrun --max-restarts``: what it starts after a failure is the same command. All machines must see the run's folder.)
    """
    given = said(args)
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0" or given.get("ckpt_path") != "last":
        return list(args)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank_zero_warn(
            "torchrun keeps the addresses of the ranks that ended, and those that it starts again may call them instead of each other "
            "(pytorch issue 135712): set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
        )
    try:
        find_last(given.get("trainer.default_root_dir"), given.get("checkpoint.dirpath"), given.get("data.root"))
    except FileNotFoundError:
        rank_zero_info("--ckpt_path last: nothing to go on with yet; the run begins")
        return [*args, "--ckpt_path", "null"]
    return list(args)


def agree(path: str, trainer: Trainer) -> str:
    """What rank 0 has found: each process looks by itself, and another run may have written in between.

    Raises:
        ValueError: if that is of another run, whose options this process does not have.
    """
    if trainer.world_size == 1 or _was_told():
        return path
    strategy = trainer.strategy
    if not strategy.cluster_environment.creates_processes_externally:
        os.environ[_CHOSEN] = path  # this is rank 0, and the others are yet to be started
        return path
    strategy.setup_environment()
    chosen = strategy.broadcast(path)
    if Path(chosen).parent != Path(path).parent:
        raise ValueError(
            f"rank 0 resumes {chosen}, rank {trainer.global_rank} {path}: another run writes below the same root folder; name "
            "the checkpoint, or give each run a trainer.default_root_dir of its own"
        )
    return chosen


def _was_told() -> bool:
    return _CHOSEN in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def options_of(saved: Mapping[str, Any], defaults: Namespace) -> dict[str, Any]:
    """The options in which a checkpoint differs from the defaults, by their names on the command line."""
    held = {f"model.{name}": value for name, value in saved.get("hyper_parameters", {}).items() if name[0] != "_"}
    images = saved.get("images") or {}
    names = {"size": "global_crops_size", "mean": "mean", "std": "std"}
    held |= {f"data.{names[name]}": value for name, value in images.items()}
    held["data.in_chans"] = len(images["mean"]) if "mean" in images else held.get("model.in_chans", 3)
    return {name: value for name, value in held.items() if value != defaults.get(name)}


def run_of(checkpoint: str, saved: Mapping[str, Any]) -> Path:
    """The run folder of a checkpoint that holds ``saved``. It may have been moved, or the checkpoints be kept elsewhere."""
    told = saved.get("callbacks", {}).get(RunConfig.__name__, {})
    folders = [Path(checkpoint).resolve().parent.parent, Path(told.get("folder") or os.devnull)]
    return next((folder for folder in folders if (folder / "config.yaml").exists()), folders[0])


def continue_loggers(options: Namespace, checkpoint: str, saved: Mapping[str, Any]) -> None:
    """Has the loggers of a Trainer's options write on where the run that is resumed wrote.

    Args:
        options: of the Trainer; changed in place.
        checkpoint: the file that is resumed.
        saved: what it holds.
    """
    step, told = saved["global_step"], saved["callbacks"].get(RunConfig.__name__, {})
    run = run_of(checkpoint, saved)
    is_run, wandb_id = (run / "config.yaml").exists(), told.get("wandb_id")
    if options.logger in (None, True) and is_run:
        kind = next(kind for kind, files in _LOGGERS.items() if list(run.glob(files)))
        options.logger = Namespace(class_path=f"lightning.pytorch.loggers.{kind}", init_args=Namespace())
    for logger in options.logger if isinstance(options.logger, list) else [options.logger]:
        kind = getattr(logger, "class_path", "").rpartition(".")[2]
        if kind == "WandbLogger" and wandb_id and not logger.init_args.get("id"):
            logger.init_args.id = wandb_id
        if kind not in _LOGGERS or not is_run:
            continue
        if not logger.init_args.get("version"):
            for name, value in {"save_dir": str(run.parents[1]), "name": run.parent.name, "version": run.name}.items():
                logger.init_args[name] = value
        if kind == "CSVLogger":  # Lightning's begins a file anew
            logger.class_path = "dino_lightning.training.loggers.AppendingCSVLogger"
            logger.init_args.first_step = step
        else:  # hides the steps that are taken again
            logger.dict_kwargs = {"purge_step": step, **(logger.get("dict_kwargs") or {})}
