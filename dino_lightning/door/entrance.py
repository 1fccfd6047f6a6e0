"""Where the command line begins: answers what it can, refuses what it must, and says what is left to do with torch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import dino_lightning
from dino_lightning import recipes
from dino_lightning.door import brief_help, commands, completion, faces
from dino_lightning.door.errors import UsageError
from dino_lightning.door.nearest import nearest


class Call(NamedTuple):
    """A tool to call with names and options; or, without ``tool``, arguments for Lightning's command line."""

    args: Sequence[str]
    options: dict[str, Any]
    tool: str | None = None


def enter(args: Sequence[str]) -> Call | None:
    """What these arguments ask for; None if it is done.

    Raises:
        UsageError: if there is no such command, option or value.
        FileNotFoundError: if a file or folder that they name is not there.
        SystemExit: after --help, --version and --completion, like argparse.
    """
    command, *rest = args or ["--help"]
    if command in ("--help", "-h"):
        _say(help_text())
    if command == "--version":
        _say(f"dino-lightning {dino_lightning.__version__}")
    if command == "--completion":
        _say(completion.script(rest[0] if rest else None))
    if command in faces.tools():
        return _tool(command, rest)
    known = [*faces.COMMANDS, *faces.tools()]
    if command in faces.COMMANDS:
        commands.check(command, rest)
        if {"--help", "-h"} & {*rest}:
            _say(brief_help.of(command, commands.said(rest).get("method") or "dino"))
        args = ["--help" if arg == "--help_all" else arg for arg in args]
    elif not command.startswith("-"):
        if command in recipes.names():
            raise UsageError(f"{command} is a recipe: dino-lightning fit --config {command}")
        guess = nearest(command, known)
        raise UsageError(f"unknown command {command!r};{f' did you mean {guess!r}?' if guess else ''} Commands: {', '.join(known)}")
    elif not set(rest) & set(faces.COMMANDS):  # Lightning takes --config before the command, too
        raise UsageError(f"give a command before {command}: {', '.join(known)}")
    return Call(args, {})


def _tool(name: str, args: Sequence[str]) -> Call | None:
    from dino_lightning import finished  # NumPy and jsonargparse: most of a second, which the others need not wait
    from dino_lightning.door import tool

    names, options = tool.parse(name, args)
    done = finished.report(names, **options) if name == "extract" else None
    if done is None:
        return Call(names, options, name)
    print(done)
    return None


def help_text() -> str:
    """All commands with a line each, and the recipes."""
    sections = {
        "commands (their options: dino-lightning COMMAND --help)": faces.COMMANDS,
        "tools, for checkpoints and features (dino-lightning TOOL --help)": {name: faces.summary(name) for name in faces.tools()},
        "methods (fit --method NAME; their options: dino-lightning fit --method NAME --help)": faces.METHOD_LINES,
        "recipes for --config": recipes.summaries(),
    }
    listed = "\n\n".join(f"{title}:\n{table(entries)}" for title, entries in sections.items())
    return f"""usage: dino-lightning COMMAND [options]

DINO and DINOv2: self-supervised learning on a folder of images.

{listed}

first: dino-lightning fit --config quickstart    # three minutes, no images needed; then docs/tutorial.md

  --help, --version; --completion SHELL prints a script for the completion of bash, zsh or fish;
  --debug shows the traceback of an error"""


def table(entries: dict[str, str]) -> str:
    return "\n".join(f"  {name:<20}{text}" for name, text in entries.items())


def _say(text: str) -> None:
    print(text)
    raise SystemExit(0)
