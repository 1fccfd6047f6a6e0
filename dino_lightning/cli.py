"""The command line: ``dino-lightning fit|validate|test|predict`` is a LightningCLI with recipes and resumable runs."""

import argparse
import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.callbacks.progress import ProgressBar as LightningProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from dino_lightning import auto, continuation, recipes
from dino_lightning.callbacks import (
    AttentionMaps,
    CollapseDoctor,
    FeatureWriter,
    OnlineKNN,
    ProgressBar,
    RunConfig,
    RunReport,
    SaveEvery,
    StopOnSignal,
    Throughput,
)
from dino_lightning.data.datamodule import MultiCropDataModule
from dino_lightning.door import commands
from dino_lightning.door.brief_help import OWN
from dino_lightning.door.entrance import Call, enter, table
from dino_lightning.door.errors import UsageError
from dino_lightning.door.parser_errors import brief
from dino_lightning.methods import method_class
from dino_lightning.methods.base import Method
from dino_lightning.tools import TOOLS
from dino_lightning.training.checks import check_crops
from dino_lightning.training.plan import check_epochs
from dino_lightning.weights.files import read_checkpoint


class DINOCLI(LightningCLI):
    """LightningCLI for a method (``--method``, ``dino`` unless a recipe or the checkpoint says another) and MultiCropDataModule.

    Beyond Lightning's: explicit arguments win over those in a checkpoint, ``--ckpt_path last`` finds the newest checkpoint
    under the root folder and goes on in its run folder and its W&B run, and the configuration is kept in the run folder.
    """

    _interrupted: Mapping[str, Any] | None = None  # the checkpoint of the run that goes on

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
            logging.getLogger(f"lightning.pytorch.{name}").addFilter(_is_news)
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")  # of Lightning's about torch
        warnings.filterwarnings("ignore", r".*`tensorboardX` has been removed as a dependency")  # the log is a CSV file without it
        listing = table(recipes.summaries())
        help_texts = {"epilog": f"recipes for --config:\n{listing}"}
        args, self._choices = auto.in_place(sys.argv[1:] if args is None else args)
        self._method = _method_of(args)
        super().__init__(
            method_class(self._method),
            MultiCropDataModule,
            save_config_callback=RunConfig,
            seed_everything_default=0,
            # The check before the first step takes all labelled images: what a run must improve on.
            trainer_defaults={"max_epochs": 100, "num_sanity_val_steps": -1, "enable_model_summary": False},
            parser_kwargs={
                "prog": "dino-lightning",
                "exit_on_error": False,
                "formatter_class": _HelpFormatter,
                **dict.fromkeys(self.subcommands(), help_texts),
            },
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.in_chans", "model.in_chans")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        # By itself Lightning saves nothing between validations, nor anything of a run without them if they are not due every epoch.
        every_epoch = {"filename": "last", "enable_version_counter": False, "save_on_train_epoch_end": True}
        parser.set_defaults({f"checkpoint.{name}": value for name, value in every_epoch.items()})
        parser.set_defaults({f"data.{name}": value for name, value in method_class(self._method).data.items()})
        parser.add_argument("--minutes", type=float, help=OWN["minutes"])
        parser.add_argument("--method", type=str, default=self._method, help=OWN["method"])
        parser.add_argument("--checkpoint_every", type=float, default=10.0, help=OWN["checkpoint_every"])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Takes what the arguments leave open from the checkpoint they name; what they say wins."""
        args = recipes.resolve_in(args)
        self.config = parser.parse_args(args)
        options, fits = self._options, self.config.get("subcommand") == "fit"
        path = options.get("ckpt_path")
        is_last = path == "last"  # one that is named begins another branch
        if path:
            images = options.data.root if fits else None  # a checkpoint is applied to any
            path = continuation.checkpoint_at(path, options.trainer.default_root_dir, options.checkpoint.dirpath, images)
        if is_last:
            rank_zero_info("--ckpt_path last: going on from %s", path)
        if path and Path(path).is_file():
            saved = read_checkpoint(path)
            method = saved.get("method", "dino")
            if method != self._method:
                raise ValueError(f"{path} is of the method {method!r}, not {self._method!r}; name that, or train anew")
            if fits and "optimizer_states" not in saved:
                raise ValueError(
                    f"{path} holds weights only (save_weights_only): a run cannot go on from it; begin one with --model.weights {path}"
                )
            subparser = self._parser(self.config.subcommand)
            subparser.set_defaults(continuation.options_of(saved, subparser.get_defaults()))
            self.config = parser.parse_args(args)
            self._options.ckpt_path = path
            self._interrupted = saved if fits and is_last else None
        _link_channels(self._options)

    @property
    def _options(self) -> Namespace:
        return self.config.get(self.config.get("subcommand")) or self.config

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint's hyper-parameters overrule the command line; parse_arguments has them already."""

    def instantiate_classes(self) -> None:
        """Builds model, data and Trainer from a copy of the configuration in which loggers write below the root folder (W&B's would write to
        the current one), or on into the folder of the run that goes on. What ``config.yaml`` keeps is the configuration as it was given,
        which begins a new run.
        """
        given = self.config
        self.config = given.clone()
        options, model = self._options.trainer, self._options.model
        if self._options.get("ckpt_path"):
            model.weights = None  # the checkpoint has them, and the source may be gone
            if "weights_with_head" in model:
                model.weights_with_head = False
            if options.num_sanity_val_steps == -1:
                options.num_sanity_val_steps = 0  # the first step was taken long ago
        root = options.default_root_dir = _real(options.default_root_dir)
        for logger in options.logger if isinstance(options.logger, list) else [options.logger]:
            where = getattr(logger, "init_args", {})
            if "save_dir" in where:
                where["save_dir"] = root if root and where["save_dir"] in (None, ".") else _real(where["save_dir"])
        keep = self._options.checkpoint
        if keep.filename == "last" and (keep.monitor or keep.save_top_k not in (0, 1)):  # several: each by its name, and the newest
            keep.filename, keep.save_last = None, True
        if keep.monitor and keep.monitor.startswith("val/"):  # is known after a validation only
            keep.save_on_train_epoch_end = None
        if self._interrupted is not None and options.logger is not False:
            continuation.continue_loggers(options, self._options.ckpt_path, self._interrupted)
        super().instantiate_classes()
        self.config = given
        for callback in self.trainer.callbacks:
            if isinstance(callback, RunConfig):
                callback.config = self._options
                callback.header = self._choices

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options, checkpoint = self._get(self.config_init, "trainer"), self._get(self.config, "checkpoint")
        given = options.callbacks if isinstance(options.callbacks, list) else [c for c in [options.callbacks] if c]

        def is_given(kind: type) -> bool:
            return any(isinstance(callback, kind) for callback in given)

        wanted = [OnlineKNN, AttentionMaps, CollapseDoctor, Throughput, StopOnSignal, RunReport]
        ours = [kind() for kind in wanted if not is_given(kind)]
        if options.enable_checkpointing is False or options.fast_dev_run or is_given(ModelCheckpoint):
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        else:  # beside the newest the best, where there are labels, and within epochs
            every = self._get(self.config, "checkpoint_every")
            if every and not is_given(SaveEvery):
                ours.append(SaveEvery(every))
            ours.append(ModelCheckpoint(checkpoint.dirpath, "best-{step}", "val/knn_top1", mode="max", save_on_train_epoch_end=False))
        if options.enable_progress_bar is not False and not is_given(LightningProgressBar):
            ours.append(ProgressBar())
        if self.subcommand == "predict" and not is_given(BasePredictionWriter):
            ours.append(FeatureWriter())
        self.trainer_defaults["callbacks"] = ours
        if options.benchmark is None and not options.deterministic:
            options.benchmark = True  # views come in two sizes, for which a GPU may try out its convolutions
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """What is wrong is refused before the run has a folder."""
        check_epochs(self.trainer, self.model.options)
        crops = self.datamodule.multicrop
        local = {"data.local_crops_size": crops.local_crops_size} if crops.local_crops_number else {}
        check_crops(self.model.trained.backbone, {"data.global_crops_size": crops.global_crops_size, **local})
        if self._interrupted is not None:
            options = self.config_init[self.subcommand]
            self.trainer.strategy._lightning_module = self.model  # a sharded one asks for it when its processes meet
            options.ckpt_path = continuation.agree(options.ckpt_path, self.trainer)

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


def _method_of(args: Sequence[str]) -> str:
    """The method that arguments, a recipe or else the checkpoint to begin with name; ``dino`` if none does."""
    said = commands.said(args)
    path = said.get("ckpt_path")
    if said.get("method") or not path:
        return said.get("method") or "dino"
    images = said.get("data.root") if "fit" in args else None
    path = continuation.checkpoint_at(path, said.get("trainer.default_root_dir"), said.get("checkpoint.dirpath"), images)
    return read_checkpoint(path).get("method", "dino") if Path(path).is_file() else "dino"


def _real(path: str | None) -> str | None:
    """A folder by its only name: the best checkpoint of a run that goes on is known if its folder is called the same."""
    return os.path.realpath(os.path.expanduser(path)) if path and "://" not in str(path) else path


def _link_channels(options: Namespace) -> None:
    """A backbone of the configuration takes the images' channels where it has such an option.

    Raises:
        ValueError: if it was given another number.
    """
    backbone, wanted = options.model.backbone, options.data.in_chans
    if not isinstance(backbone, Namespace) or "in_chans" not in backbone.get("init_args", {}):
        return
    parameter = inspect.signature(_imported(backbone.class_path)).parameters.get("in_chans")  # not of one that passes **kwargs on
    default = 3 if parameter is None else parameter.default
    if backbone.init_args.in_chans not in (default, wanted):
        raise ValueError(
            f"model.backbone.init_args.in_chans is {backbone.init_args.in_chans}, but data.in_chans {wanted}; give data.in_chans alone"
        )
    backbone.init_args.in_chans = wanted


_NO_NEWS = ("💡", "GPU available", "TPU available", "`Trainer.fit` stopped", "Loading `train_dataloader`", "`weights_only` was not set")


def _is_news(record: logging.LogRecord) -> bool:
    """Of what Lightning says: not what RunReport says better, and no tips for other products."""
    return not record.getMessage().startswith(_NO_NEWS)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the list of recipes line by line."""


def _imported(class_path: str) -> type:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def run(call: Call) -> None:
    """Does what the door left to do.

    Raises:
        UsageError: if Lightning's parser does not take the arguments.
    """
    _show_log()
    if call.tool:
        TOOLS[call.tool](*call.args, **call.options)
    else:
        _lightning(call.args)


def _show_log() -> None:
    """Shows this package's own messages on stderr, unless the program that called has handlers of its own."""
    log = logging.getLogger("dino_lightning")
    log.setLevel(logging.INFO)
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())


def _lightning(args: Sequence[str]) -> DINOCLI:
    try:
        return DINOCLI(continuation.restartable(args))
    except argparse.ArgumentError as error:
        raise UsageError(brief(str(error), args[0])) from error


def main(args: Sequence[str] | None = None) -> None:
    """The command ``dino-lightning`` in Python: errors are raised."""
    call = enter(sys.argv[1:] if args is None else list(args))
    if call:
        run(call)


def train(
    root: str | os.PathLike[str],
    output: str | os.PathLike[str] = "runs",
    recipe: str | None = None,
    options: Sequence[str] = (),
) -> Method:
    """Trains as ``dino-lightning fit`` does, for people who want no Trainer: ``dino_lightning.train("photos", output="run")``.

    Args:
        root: folder of images, flat or nested, with or without class folders, train/ and val/.
        output: folder below which the run has its own, ``lightning_logs/version_N``.
        recipe: a name or a file; by default ``small_images`` with a GPU, ``cpu`` without.
        options: further ones as on the command line: ``["--trainer.max_epochs=20"]``, ``["--ckpt_path=last"]`` to go on.

    Returns:
        The trained module in evaluation mode: called with images (B, C, H, W) it gives the features to evaluate (B, D), of
        the teacher where there is one.

    Raises:
        ValueError, FileNotFoundError: as the command would say.
        SystemExit: after a signal or Ctrl-C, when the checkpoint is saved.
    """
    recipe = recipe or ("small_images" if torch.cuda.is_available() else "cpu")
    chosen = ["--config", recipe, "--data.root", str(root), "--trainer.default_root_dir", str(output), *options]
    call = enter(["fit", *chosen])
    _show_log()
    return _lightning(call.args).model.eval()
