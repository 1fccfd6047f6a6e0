"""The recipes: YAML files in ``configs/`` that hold what differs from the defaults, found by name."""

import difflib
from collections.abc import Sequence
from pathlib import Path

AUTO = "auto"  # in place of a recipe: settings that are chosen for the images, the device and the time
_PACKAGE = Path(__file__).resolve().parent


def folder() -> Path:
    """Where the recipes lie: in the package when it was installed from a wheel, beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Of all recipes, sorted, without .yaml."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def summaries() -> dict[str, str]:
    """What --config takes, each with a line."""
    return {AUTO: "Settings that fit the images, the device and --minutes, each with its reason."} | {
        name: summary(name) for name in names()
    }


def summary(name: str) -> str:
    """The first comment line of a recipe."""
    first_line = (folder() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first_line.lstrip("# ")


def resolve(config: str) -> str:
    """A path as it is; the name of a recipe (``vit_small``, with or without .yaml) becomes its path; ``auto``, whose settings are chosen
    later, becomes an empty configuration (``{}``).

    Raises:
        FileNotFoundError: if it is neither, listing the recipes.
    """
    if config == AUTO:
        return "{}\n"
    if "\n" in config or Path(config).exists():
        return config
    recipe = folder() / f"{Path(config).name.removesuffix('.yaml')}.yaml"
    if recipe.exists() and Path(config).name == config:
        return str(recipe)
    near = difflib.get_close_matches(Path(config).name.removesuffix(".yaml"), names(), 1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    raise FileNotFoundError(f"there is no config file {config!r} and no recipe of that name; {guess}recipes: {', '.join(summaries())}")


def resolve_in(args: Sequence[str]) -> list[str]:
    """Arguments of a command with paths in place of the recipes' names behind --config."""
    resolved = []
    for i, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option in ("--config", "-c") and equals:
            arg = f"{option}={resolve(value)}"
        elif i > 0 and args[i - 1] in ("--config", "-c"):
            arg = resolve(arg)
        resolved.append(arg)
    return resolved
