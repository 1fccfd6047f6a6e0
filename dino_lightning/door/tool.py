"""The arguments of a tool, parsed by its stub."""

import inspect
import re
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser

from dino_lightning.door import commands
from dino_lightning.door.arguments import given_options, no_checkpoint, read_config, unknown
from dino_lightning.door.errors import UsageError
from dino_lightning.door.faces import LIKE_FIT, own_options, tools
from dino_lightning.door.parser_errors import brief
from dino_lightning.listing import is_address

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")
_WEIGHTS = {".ckpt", ".pth", ".pt", ".safetensors"}  # a source of weights that ends so is a file


def parse(name: str, args: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """What a tool takes without an option (its ``*names``), and its options.

    Raises:
        UsageError: if the tool does not take these arguments.
        FileNotFoundError: if a file or folder that it names is not there.
    """
    parameters = inspect.signature(tools()[name]).parameters.values()
    listed = next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), None)
    if name == LIKE_FIT:
        commands.check(name, args)
        args, of_fit = _parted(args, {*own_options(name), "help"})
        return of_fit, _parsed(name, None, args)
    _check_names(name, args, set(own_options(name)))
    several = {f"--{p.name}" for p in parameters if "tuple" in str(p.annotation)}
    found = _parsed(name, listed, _with_lists(args, several))
    names = found.pop(listed, [])
    _check_files(found)
    return names, found


def _parsed(name: str, listed: str | None, args: Sequence[str]) -> dict[str, Any]:
    try:
        found = _parser(name, listed).parse_args(args).as_dict()
    except ArgumentError as error:
        raise UsageError(brief(str(error), name, listed)) from error
    found.pop("config")
    return found


def _parted(args: Sequence[str], names: set[str]) -> tuple[list[str], list[str]]:
    """The arguments of the options of these names, and all others."""
    own: list[str] = []
    others: list[str] = []
    is_own = False
    for arg in args:
        if arg.startswith("-") and not _NUMBER.fullmatch(arg):
            is_own = arg == "-h" or arg.partition("=")[0].removeprefix("--") in names
        (own if is_own else others).append(arg)
    return own, others


def _parser(name: str, listed: str | None) -> ArgumentParser:
    stub = tools()[name]
    parser = ArgumentParser(prog=f"dino-lightning {name}", exit_on_error=False)
    if name == LIKE_FIT:  # where it only stands for the help
        parser.add_argument("--config", type=str, help="a recipe or a file with options of fit; all of them are taken (fit --help)")
    else:
        parser.add_argument("--config", action="config", help="a YAML file with these options")
    if listed:
        explained = next(p.description for p in docstring_parser.parse(stub.__doc__).params if p.arg_name == listed)
        parser.add_argument(listed, nargs="+", type=str, help=explained)
    parser.add_function_arguments(stub, as_positional=False, fail_untyped=True)
    return parser


def _check_names(tool: str, args: Sequence[str], names: set[str]) -> None:
    known = {*names, "config", "help", "print_config"}
    lists = f"dino-lightning {tool} --help lists them"
    for name, value in given_options(args):
        if name[2:].removesuffix("+").partition(".")[0] not in known:
            raise unknown("option", f"of {tool}", name[2:], known, "--", lists)
        for key in read_config(value) if name == "--config" and value else ():
            if key not in known:
                raise unknown("key", f"in {value}", key, known, "", lists)


def _check_files(options: dict[str, Any]) -> None:
    checkpoint, root = options.get("checkpoint"), options.get("root")
    if checkpoint and Path(checkpoint).suffix in _WEIGHTS and not Path(checkpoint).exists():
        raise FileNotFoundError(no_checkpoint(checkpoint))
    if root and not is_address(root) and not Path(root).is_dir():
        raise FileNotFoundError(f"there is no image folder {root}: check the path")


def _with_lists(args: Sequence[str], options: set[str]) -> list[str]:
    """Numbers after an option that takes several are its list: ``--image_size 224 336`` is ``--image_size [224,336]``, and words
    with commas, ``--methods dino,simclr``, are one.
    """
    joined: list[str] = []
    for arg in args:
        if joined and joined[-1] in options and not arg.startswith(("-", "[")) and not _NUMBER.fullmatch(arg):
            joined.append(f"[{arg}]")
            continue
        number = _NUMBER.fullmatch(arg) is not None
        if number and joined and joined[-1] in options:
            joined.append(f"[{arg}]")
        elif number and len(joined) > 1 and joined[-2] in options:
            joined[-1] = f"{joined[-1].removesuffix(']')},{arg}]"
        else:
            joined.append(arg)
    return joined
