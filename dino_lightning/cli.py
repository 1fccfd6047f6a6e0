"""The command line: ``dino-lightning fit|validate|test|predict`` is a LightningCLI with recipes and resumable runs."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.callbacks.progress import ProgressBar as LightningProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from dino_lightning import recipes
from dino_lightning.callbacks import (
    AttentionMaps,
    CollapseDoctor,
    FeatureWriter,
    OnlineKNN,
    ProgressBar,
    RunConfig,
    StopOnSignal,
    Throughput,
)
from dino_lightning.datamodule import MultiCropDataModule
from dino_lightning.door.entrance import Call, enter, table
from dino_lightning.door.errors import UsageError
from dino_lightning.door.parser_errors import brief
from dino_lightning.module import DINOModule
from dino_lightning.tools import TOOLS


class DINOCLI(LightningCLI):
    """LightningCLI for DINOModule and MultiCropDataModule.

    Beyond Lightning's: explicit arguments win over those in a checkpoint, ``--ckpt_path last`` finds the newest checkpoint
    under the root folder, the configuration is kept in the run folder, and a resumed run goes on in its W&B run.
    """

    _wandb_id: str | None = None  # of the run whose checkpoint is resumed

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        listing = table({name: recipes.summary(name) for name in recipes.names()})
        help_texts = {"epilog": f"recipes for --config:\n{listing}"}
        super().__init__(
            DINOModule,
            MultiCropDataModule,
            save_config_callback=RunConfig,
            seed_everything_default=0,
            trainer_defaults={"max_epochs": 100},
            parser_kwargs={
                "prog": "dino-lightning",
                "exit_on_error": False,
                "formatter_class": _HelpFormatter,
                **{name: help_texts for name in self.subcommands()},
            },
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.in_chans", "model.in_chans")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Takes what the arguments leave open from the checkpoint they name; what they say wins."""
        args = recipes.resolve_in(sys.argv[1:] if args is None else args)
        self.config = parser.parse_args(args)
        options = self.config.get(self.config.get("subcommand"))
        if options is None or not options.get("ckpt_path"):
            return
        interrupted = options.ckpt_path == "last" and self.config.subcommand == "fit"
        if options.ckpt_path == "last":
            folders = [options.trainer.default_root_dir or ".", options.get("checkpoint", {}).get("dirpath")]
            options.ckpt_path = _last_checkpoint([Path(folder) for folder in folders if folder])
        if Path(options.ckpt_path).is_file():
            path = options.ckpt_path
            saved = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            given = {name: value for name, value in saved.get("hyper_parameters", {}).items() if name[0] != "_"}
            self._parser(self.config.subcommand).set_defaults({f"model.{name}": value for name, value in given.items()})
            self.config = parser.parse_args(args)
            self.config[self.config.subcommand].ckpt_path = path
            # The checkpoint has them, and the source may be gone.
            model = self.config[self.config.subcommand].model
            model.weights, model.weights_with_head = None, False
            if interrupted:  # a checkpoint that is named begins another branch
                self._wandb_id = saved.get("callbacks", {}).get(RunConfig.__name__, {}).get("wandb_id")

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint's hyper-parameters overrule the command line; parse_arguments has them already."""

    def before_instantiate_classes(self) -> None:
        """Loggers write below the root folder unless they are told where (W&B's would write to the current folder).

        With ``--ckpt_path last``, W&B goes on with the run of the checkpoint.
        """
        options = self._get(self.config, "trainer")
        for logger in options.logger if isinstance(options.logger, list) else [options.logger]:
            given = getattr(logger, "init_args", {})
            if options.default_root_dir and given.get("save_dir", "") in (None, "."):
                given["save_dir"] = options.default_root_dir
            if self._wandb_id and "Wandb" in getattr(logger, "class_path", "") and not given.get("id"):
                given["id"] = self._wandb_id

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self._get(self.config_init, "trainer")
        given = options.callbacks if isinstance(options.callbacks, list) else [c for c in [options.callbacks] if c]

        def is_given(kind: type) -> bool:
            return any(isinstance(callback, kind) for callback in given)

        if options.enable_checkpointing is False or options.fast_dev_run or is_given(ModelCheckpoint):
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
            best = []
        else:  # beside the newest, where there are labels
            folder = self._get(self.config, "checkpoint").dirpath
            best = [ModelCheckpoint(folder, "best-{step}", "val/knn_top1", mode="max", save_on_train_epoch_end=False)]
        ours = [kind() for kind in (OnlineKNN, AttentionMaps, CollapseDoctor, Throughput, StopOnSignal) if not is_given(kind)]
        if options.enable_progress_bar is not False and not is_given(LightningProgressBar):
            ours.append(ProgressBar())
        if self.subcommand == "predict" and not is_given(BasePredictionWriter):
            ours.append(FeatureWriter())
        self.trainer_defaults["callbacks"] = ours + best
        return super().instantiate_trainer(**kwargs)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the list of recipes line by line."""


def _last_checkpoint(folders: Sequence[Path]) -> str:
    there = (path for folder in folders for path in folder.glob("**/last*.ckpt") if path.exists())  # a link may lead nowhere
    found = sorted(there, key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"--ckpt_path last: there is no last.ckpt below {' or '.join(str(folder.resolve()) for folder in folders)}; "
            "set trainer.default_root_dir to the folder of the earlier run, or name the file"
        )
    rank_zero_info("--ckpt_path last: going on from %s", found[-1])
    return str(found[-1])


def run(call: Call) -> None:
    """Does what the door left to do.

    Raises:
        UsageError: if Lightning's parser does not take the arguments.
    """
    log = logging.getLogger("dino_lightning")
    log.setLevel(logging.INFO)  # what a load of weights matched, where a run goes on
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
    if call.tool:
        TOOLS[call.tool](*call.args, **call.options)
        return
    try:
        DINOCLI(call.args)
    except argparse.ArgumentError as error:
        raise UsageError(brief(str(error), call.args[0])) from error


def main(args: Sequence[str] | None = None) -> None:
    """The command ``dino-lightning`` in Python: errors are raised."""
    call = enter(sys.argv[1:] if args is None else list(args))
    if call:
        run(call)
