"""Completion of commands, options and recipes in a shell, in a script that shtab writes."""

import argparse
import inspect
import typing

from dino_lightning import recipes
from dino_lightning.door import faces
from dino_lightning.door.errors import UsageError
from dino_lightning.methods import METHODS

SHELLS = ("bash", "zsh", "fish")
_OF_FILES = ("root", "weights", "ckpt_path", "default_root_dir", "dirpath")  # of fit's options, whose types are not looked at


def script(shell: str | None) -> str:
    """The script for a shell, which it reads at its start.

    Raises:
        UsageError: for a shell that is none of ``SHELLS``; without shtab.
    """
    if shell not in SHELLS:
        raise UsageError(f"--completion takes the name of a shell, one of {', '.join(SHELLS)}, got {shell or 'none'}")
    try:
        import shtab
    except ImportError:
        raise UsageError("--completion needs shtab: pip install shtab") from None
    return shtab.complete(_parser(shtab.FILE), shell, preamble=_recipes_and_files())


def _parser(files: dict[str, str]) -> argparse.ArgumentParser:
    """What there is to complete, as an argparse parser that never parses."""
    parser = argparse.ArgumentParser("dino-lightning")
    parser.add_argument("--version", action="store_true", help="says the version")
    commands = parser.add_subparsers()
    like_fit = {**faces.COMMANDS, faces.LIKE_FIT: faces.summary(faces.LIKE_FIT)}
    for name, line in like_fit.items():
        command = commands.add_parser(name, help=line)
        for option in sorted({*faces.options(name, None).names()} - {"help"}):
            action = command.add_argument(f"--{option}", choices=METHODS if option == "method" else None)
            if option.rpartition(".")[2] in _OF_FILES:
                action.complete = files
            elif option == "config":
                action.complete = {"bash": "_dino_lightning_recipes", "zsh": "_dino_lightning_recipes"}
    for name, tool in faces.tools().items():
        if name in like_fit:
            continue
        command = commands.add_parser(name, help=faces.summary(name))
        for parameter in inspect.signature(tool).parameters.values():
            if parameter.kind == parameter.VAR_POSITIONAL:
                command.add_argument(parameter.name, nargs="*").complete = files
                continue
            choices = typing.get_args(parameter.annotation) if typing.get_origin(parameter.annotation) is typing.Literal else None
            action = command.add_argument(f"--{parameter.name}", choices=("true", "false") if parameter.annotation is bool else choices)
            if parameter.annotation in (str, str | None):
                action.complete = files
    return parser


def _recipes_and_files() -> dict[str, str]:
    names = " ".join([recipes.AUTO, *recipes.names()])
    return {
        "bash": f'_dino_lightning_recipes() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}\n',
        "zsh": f"_dino_lightning_recipes() {{ compadd {names}; _files }}\n",
    }
