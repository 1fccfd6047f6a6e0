"""The command line: ``dino-lightning fit|validate|test|predict`` is a LightningCLI with recipes and resumable runs."""

import argparse
import inspect
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import docstring_parser
import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter
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
from dino_lightning.module import DINOModule
from dino_lightning.tools import TOOLS


_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")


class DINOCLI(LightningCLI):
    """LightningCLI for DINOModule and MultiCropDataModule.

    Beyond Lightning's: explicit arguments win over those in a checkpoint, ``--ckpt_path last`` finds the newest checkpoint
    under the root folder, the configuration is kept in the run folder, and a resumed run goes on in its W&B run.
    """

    _wandb_id: str | None = None  # of the run whose checkpoint is resumed

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        listing = "\n".join(f"  {name:<20}{recipes.summary(name)}" for name in recipes.names())
        tools = "\n".join(f"  {name:<20}{inspect.getdoc(tool).partition(chr(10))[0]}" for name, tool in TOOLS.items())
        epilog = f"other commands (dino-lightning COMMAND --help):\n{tools}\n\nrecipes for --config:\n{listing}"
        help_texts = {"epilog": epilog, "formatter_class": _HelpFormatter}
        super().__init__(
            DINOModule,
            MultiCropDataModule,
            save_config_callback=RunConfig,
            seed_everything_default=0,
            trainer_defaults={"max_epochs": 100},
            parser_kwargs={
                "description": "DINO: self-supervised learning on a folder of images.",
                **help_texts,
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
        args = _with_recipes(sys.argv[1:] if args is None else args)
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


    def validate(self, **options: Any) -> None:
        self._evaluate(self.trainer.validate, **options)

    def test(self, **options: Any) -> None:
        self._evaluate(self.trainer.test, **options)

    def _evaluate(self, run: Callable[..., Any], *, verbose: bool, **options: Any) -> None:
        """Prints each number once; Lightning's table repeats those of [bank, query] for both loaders."""
        run(**options, verbose=False)
        if verbose and self.trainer.is_global_zero:
            measured = sorted(self.trainer.callback_metrics.items())
            print("\n".join(f"{name:16}{value:.4f}" for name, value in measured) or "no labelled train/ and val/ to measure on")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the list of recipes line by line."""


def _with_recipes(args: Sequence[str]) -> list[str]:
    """Replaces the names of recipes behind --config by their paths."""
    resolved = []
    for i, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option in ("--config", "-c") and equals:
            arg = f"{option}={recipes.resolve(value)}"
        elif i > 0 and args[i - 1] in ("--config", "-c"):
            arg = recipes.resolve(arg)
        resolved.append(arg)
    return resolved


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


def _run_tool(name: str, args: Sequence[str]) -> None:
    """Calls a tool with its options; what its ``*names`` take stands on the command line without an option."""
    tool = TOOLS[name]
    parser = ArgumentParser(prog=f"dino-lightning {name}")
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    listed = next((p.name for p in inspect.signature(tool).parameters.values() if p.kind == p.VAR_POSITIONAL), None)
    if listed:
        explained = next(p.description for p in docstring_parser.parse(tool.__doc__).params if p.arg_name == listed)
        parser.add_argument(listed, nargs="+", type=str, help=explained)
    parser.add_function_arguments(tool, as_positional=False, fail_untyped=True)
    several = {f"--{p.name}" for p in inspect.signature(tool).parameters.values() if "tuple" in str(p.annotation)}
    options = parser.parse_args(_with_lists(args, several)).as_dict()
    options.pop("config")
    tool(*options.pop(listed, ()), **options)


def _with_lists(args: Sequence[str], options: set[str]) -> list[str]:
    """Numbers behind an option that takes several are its list: ``--image_size 224 336`` is ``--image_size [224,336]``."""
    joined: list[str] = []
    for arg in args:
        number = _NUMBER.fullmatch(arg) is not None
        if number and joined and joined[-1] in options:
            joined.append(f"[{arg}]")
        elif number and len(joined) > 1 and joined[-2] in options:
            joined[-1] = f"{joined[-1].removesuffix(']')},{arg}]"
        else:
            joined.append(arg)
    return joined


def main(args: Sequence[str] | None = None) -> None:
    """The command ``dino-lightning``."""
    log = logging.getLogger("dino_lightning")
    log.setLevel(logging.INFO)  # what a load of weights matched, where a run goes on
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
    args = sys.argv[1:] if args is None else list(args)
    if args and args[0] in TOOLS:
        _run_tool(args[0], args[1:])
    else:
        DINOCLI(args or ["--help"])
