"""The options of ``fit``, read without a run."""

import importlib
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ActionConfigFile
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser

from dino_lightning.data.datamodule import MultiCropDataModule
from dino_lightning.door.commands import said
from dino_lightning.door.errors import UsageError
from dino_lightning.door.parser_errors import brief
from dino_lightning.methods import method_class


def parsed(options: Sequence[str], command: str) -> dict[str, Any]:
    """All of them, with the defaults of the classes (those of the command line are not among them); what plays no part is taken as well.

    Args:
        options: with paths or text behind --config, no names of recipes.
        command: that they are given to, for the message.

    Raises:
        UsageError: if fit does not take them.
    """
    method = said(options).get("method") or "dino"
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    classes = {"model": method_class(method), "data": MultiCropDataModule, "trainer": Trainer, "checkpoint": ModelCheckpoint}
    for group, owner in classes.items():
        parser.add_lightning_class_args(owner, group)
    parser.add_argument("--method", type=str, default=method)
    for name in ("seed_everything", "checkpoint_every", "ckpt_path", "weights_only", "verbose"):
        parser.add_argument(f"--{name}", type=Any)
    try:
        config = parser.parse_args(list(options)).as_dict()
    except ArgumentError as error:
        raise UsageError(brief(str(error), command)) from error
    model = config["model"]
    model["in_chans"] = config["data"]["in_chans"]  # as fit links them
    model["weights"] = None  # what a run begins with is not looked at here
    if "weights_with_head" in model:
        model["weights_with_head"] = False
    backbone = model["backbone"]
    if isinstance(backbone, Mapping) and "in_chans" in backbone.get("init_args", {}):
        backbone["init_args"]["in_chans"] = model["in_chans"]
    return config


def built(value: Any) -> Any:
    """What a ``class_path`` of the options stands for; anything else as it is."""
    if not isinstance(value, Mapping) or "class_path" not in value:
        return value
    module, _, name = value["class_path"].rpartition(".")
    arguments = value.get("init_args") or {}
    return getattr(importlib.import_module(module), name)(**{key: built(inner) for key, inner in arguments.items()})


def device_count(asked: Any, there: int) -> int:
    """Of ``trainer.devices`` on a machine with so many: ``auto`` and -1 are all of them."""
    if isinstance(asked, str) and "," in asked:
        return len([index for index in asked.split(",") if index.strip()])
    if isinstance(asked, list):
        return len(asked)
    return int(asked) if str(asked).isdecimal() and int(asked) > 0 else there


def first_device(asked: Any) -> int:
    """The index of the first GPU of ``trainer.devices``."""
    if isinstance(asked, str) and "," in asked:
        asked = [int(index) for index in asked.split(",") if index.strip()]
    return asked[0] if isinstance(asked, list) else 0
