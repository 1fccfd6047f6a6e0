"""Options on the command line and keys in the files behind --config, read without a parser."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from dino_lightning.door.errors import UsageError
from dino_lightning.door.nearest import nearest


def given_options(args: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The name and the value (None without one) of each argument that argparse takes for an option with two dashes, or -c."""
    for arg, following in zip(args, [*args[1:], "--"]):
        name, equals, value = arg.partition("=")
        if name == "-c" or (name.startswith("--") and name != "--" and " " not in name):
            behind = None if following.startswith("--") else following
            yield ("--config" if name == "-c" else name), value if equals else behind


def read_config(config: str) -> dict[str, Any]:
    """The YAML behind --config, a path or the text itself; empty where it is not there or no mapping, which the parser says.

    Raises:
        UsageError: if it is no YAML.
    """
    try:
        text = config if "\n" in config else Path(config).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{config} is no YAML: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def unknown(what: str, where: str, name: str, names: Collection[str], prefix: str, remedy: str) -> UsageError:
    """That there is no such option or key, and which one may have been meant."""
    guess = nearest(name, names)
    return UsageError(f"unknown {what} {prefix}{name}{where and f' {where}'}; {f'did you mean {prefix}{guess}?' if guess else remedy}")


def no_checkpoint(path: str) -> str:
    """What to say of a checkpoint that is not there."""
    hint = "; RUN stands for the folder of a run, such as lightning_logs/version_0" if path.startswith("RUN/") else ""
    where = "" if Path(path).expanduser().is_absolute() else f" in {Path.cwd()}"
    return f"there is no checkpoint {path}{where}{hint}"
