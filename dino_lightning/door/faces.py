"""What the commands look like: which there are, and the names and types of their options."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dino_lightning.door.sources import function, light_part, stub
from dino_lightning.methods import METHODS, home

COMMANDS = {
    "fit": "Trains on a folder of images, without labels.",
    "validate": "k-NN accuracy of a checkpoint's features on labelled images.",
    "test": "The same on the test split.",
    "predict": "Writes the features of images.",
}  # of Lightning

METHOD_LINES = {
    "dino": "Self-distillation of views of an image (Caron et al. 2021); the default.",
    "dinov2": "With masked patches, for features of places as well (Oquab et al. 2023).",
    "simclr": "For comparison: two views told from those of the batch (Chen et al. 2020).",
    "byol": "For comparison: the moving average's projection predicted (Grill et al. 2020).",
    "moco_v3": "For comparison: queries, and keys of the moving average (Chen et al. 2021).",
    "mae": "For comparison: the pixels of hidden patches (He et al. 2022).",
}

# The options GROUP.NAME are the arguments of a class, model.NAME those of the method's.
_GROUPS = {
    "data": ("dino_lightning.data.datamodule", "MultiCropDataModule"),
    "trainer": ("lightning.pytorch.trainer.trainer", "Trainer"),
    "checkpoint": ("lightning.pytorch.callbacks.model_checkpoint", "ModelCheckpoint"),
}
# Those without a group are the arguments of the Trainer's method, and these.
_ALONE = {"config", "print_config", "help", "help_all", "seed_everything", "checkpoint_every", "method", "minutes"}
_NOT_OPTIONS = {"self", "model", "datamodule", "train_dataloaders", "val_dataloaders", "dataloaders"}


LIKE_FIT = "estimate"  # the tool that takes fit's options beside its own


class Options(NamedTuple):
    """The options of a command: ``alone``, the names without a dot; ``groups``, the names after GROUP., None where they are not known."""

    alone: set[str]
    groups: dict[str, set[str] | None]

    def have(self, name: str) -> bool:
        """Whether the parser may know it; of data.dataset.init_args.count, data.dataset is judged."""
        group, dot, rest = name.removesuffix("+").partition(".")
        if group not in self.groups:
            return not dot and group in self.alone
        names = self.groups[group]
        return not dot or names is None or rest.partition(".")[0].removesuffix("+") in names

    def names(self) -> list[str]:
        """All of them, with dots."""
        return [*self.alone, *(f"{group}.{name}" for group, names in self.groups.items() for name in names or ())]


@functools.cache
def options(command: str, method: str | None = "dino") -> Options:
    """Of fit, validate, test, predict or the tool that is like fit, with a method; with None, of any."""
    groups = {group: _arguments(module, f"{owner}.__init__") for group, (module, owner) in _GROUPS.items()}
    homes = [home(name) for name in (METHODS if method is None else [method])]
    groups["model"] = set().union(*(_arguments(module, f"{owner}.__init__") for module, owner in homes))
    module, owner = _GROUPS["trainer"]
    called, own = ("fit", set(own_options(command))) if command == LIKE_FIT else (command, set())
    return Options(_ALONE | own | (_arguments(module, f"{owner}.{called}") or set()), groups)


def _arguments(module: str, name: str) -> set[str] | None:
    """None where they are not known: no such source, or arguments of any name."""
    node = function(module, name)
    if node is None or node.args.kwarg:
        return None
    return {argument.arg for argument in node.args.args + node.args.kwonlyargs} - _NOT_OPTIONS


def stubs(method: str = "dino") -> dict[str, Callable[..., None]]:
    """For each group a function with those of its options whose types are plain ones."""
    classes = {**_GROUPS, "model": home(method)}
    nodes = {group: (module, function(module, f"{owner}.__init__")) for group, (module, owner) in classes.items()}
    return {group: stub(module, light_part(module, node)) for group, (module, node) in nodes.items() if node}


@functools.cache
def tools() -> dict[str, Callable[..., None]]:
    """A stub of each tool by its name: a function in ``tools/`` in a file of its name."""
    package = Path(__file__).resolve().parent.parent
    names = sorted(path.stem for path in (package / "tools").glob("*.py"))
    nodes = {name: (f"{package.name}.tools.{name}", function(f"{package.name}.tools.{name}", name)) for name in names}
    return {name: stub(module, node) for name, (module, node) in nodes.items() if node}


def own_options(tool: str) -> list[str]:
    """The names of a tool's options; not of what it takes without one."""
    parameters = inspect.signature(tools()[tool]).parameters.values()
    return [p.name for p in parameters if p.kind != p.VAR_POSITIONAL]


def summary(tool: str) -> str:
    """The first line of its docstring."""
    return inspect.getdoc(tools()[tool]).partition("\n")[0]
