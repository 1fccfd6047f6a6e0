"""The arguments of fit, validate, test and predict (and of estimate), as far as they can be judged without Lightning's parser."""

from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dino_lightning import recipes
from dino_lightning.door import faces
from dino_lightning.door.arguments import given_options, no_checkpoint, read_config, unknown
from dino_lightning.door.errors import UsageError
from dino_lightning.door.parser_errors import brief
from dino_lightning.listing import is_address
from dino_lightning.methods import METHODS

_GROUPS = ("--trainer", "--data", "--model", "--checkpoint")


def check(command: str, args: Sequence[str]) -> None:
    """Judges the names of options, files and folders; of a name with dots the first two parts.

    Raises:
        UsageError: if the command has no such option, an option of a plain type is given another value, or there are no images.
        FileNotFoundError: if a config file, a recipe or the folder of images is not there.
    """
    found = said(args)
    method = found.get("method") or (None if found.get("ckpt_path") else "dino")  # a checkpoint is of any method
    if method not in (None, *METHODS):
        raise unknown("method", "", method, METHODS, "", f"there are {', '.join(METHODS)}")
    known = faces.options(command, method)
    given = list(given_options(args))
    for name, _ in given:
        if not known.have(name[2:]):
            raise unknown("option", f"of {command}", name[2:], known.names(), "--", f"dino-lightning {command} --help lists them")
    if args and not args[0].startswith("-"):
        meant = "--config" if args[0] in (recipes.AUTO, *recipes.names()) else "--data.root"
        raise UsageError(f"{command} takes options only, got {args[0]!r}; did you mean {meant} {args[0]}?")
    asked = dict(given).get("--method")
    for config in [value for name, value in given if name == "--config" and value]:
        content = _in_config(config)
        if asked and content.get("method", asked) != asked:
            raise UsageError(f"--method {asked}, but {config} says method: {content['method']}; leave one of them out")
        for key in content:
            if not known.have(key):
                raise unknown("key", f"in {config}", key, known.names(), "", f"dino-lightning {command} --help lists them")
    configs = [value for name, value in given if name == "--config"]
    if recipes.AUTO in configs and command != "fit":
        raise UsageError(f"--config auto is for fit; give {command} the config.yaml of a run instead")
    if recipes.AUTO not in configs and found.get("minutes") is not None:
        raise UsageError("--minutes says how long --config auto may make the run; without that, give --trainer.max_epochs")
    _check_checkpoint(found.get("ckpt_path"))
    asks = any(name.endswith(".help") for name, _ in given)
    if not asks and not {"--help", "--help_all", "--print_config"} & {name for name, _ in given} and "-h" not in args:
        _check_images(command, found)
    _check_values(command, given, method or "dino")


def said(args: Sequence[str]) -> dict[str, Any]:
    """What arguments and the files behind their --config say, by names down to the second level, with dots; later ones win."""
    found: dict[str, Any] = {}
    for name, value in given_options(args):
        if name == "--config" and value:
            found.update(_in_config(value))
        elif name in _GROUPS and value and Path(value).is_file():  # a file of its own
            found.update({f"{name[2:]}.{key}": inner for key, inner in read_config(value).items()})
        else:
            found[name[2:]] = value
    return found


def _check_values(command: str, given: Sequence[tuple[str, str | None]], method: str) -> None:
    from jsonargparse import ArgumentParser  # half a second, which the errors before need not wait

    parser = ArgumentParser(exit_on_error=False)
    for group, stub in faces.stubs(method).items():
        parser.add_function_arguments(stub, group, fail_untyped=False, sub_configs=True)
    known = {option for action in parser._actions for option in action.option_strings}
    plain = [f"{name}={value}" for name, value in given if name in known and name.count(".") == 1 and value is not None]
    try:
        parser.parse_args(plain)
    except ArgumentError as error:
        raise UsageError(brief(str(error), command)) from error


def _in_config(config: str) -> dict[str, Any]:
    """The keys of a config file down to the second level, with dots."""
    return dict(_two_levels(read_config(recipes.resolve(config))))


def _two_levels(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and "." not in str(key) and "class_path" not in value:
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield str(key), value


def _check_checkpoint(path: str | None) -> None:
    keyword = path is None or path in ("null", "last", "best", "hpc") or path.startswith("registry") or "://" in path
    if not keyword and not Path(path).expanduser().exists():
        raise FileNotFoundError(no_checkpoint(path))


def _check_images(command: str, given: dict[str, Any]) -> None:
    sources = {name: value for name, value in given.items() if name.partition(".")[0] == "data"}
    if "data" in sources:  # a file of its own
        return
    root = sources.get("data.root")
    if not isinstance(root, str | None):
        raise UsageError(f"data.root takes a folder, got {root}")
    if root is not None and not is_address(root) and not Path(root).expanduser().exists():
        raise FileNotFoundError(f"there is no image folder {root}: check the path")
    generated = any(name.startswith("data.dataset") and value not in (None, "null") for name, value in sources.items())
    needs = command != faces.LIKE_FIT
    if needs and root is not None and generated:
        raise UsageError(
            f"there are two sources of images: data.root {root}, and data.dataset (the quickstarts generate their images). Take another "
            "recipe for yours, or add --data.dataset null"
        )
    if needs and root is None and not generated:
        raise UsageError(f"{command} needs images: add --data.root FOLDER (a folder of images), or data.dataset")
