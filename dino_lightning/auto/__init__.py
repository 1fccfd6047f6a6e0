"""``--config auto``: settings that fit the images, the device and the time, each with its reason."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dino_lightning import continuation, recipes
from dino_lightning.auto.choices import Choice, Choices, length, settings
from dino_lightning.auto.facts import Facts, look
from dino_lightning.auto.pace import images_per_second
from dino_lightning.door.commands import said
from dino_lightning.door.errors import UsageError
from dino_lightning.tools.costs import KNOWN, run_of
from dino_lightning.tools.fit_options import built, parsed

_TOLD = "DINO_LIGHTNING_AUTO"  # environment variable: the processes that Lightning starts take what rank 0 has chosen
_LENGTHS = ("trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches")
_FILLED = 0.8  # share of a GPU's memory: what libraries and the allocator take comes on top


def in_place(args: Sequence[str]) -> tuple[list[str], str]:
    """The arguments of ``fit`` with settings in place of ``--config auto`` and ``--minutes``, and a table of these; all else wins.

    A run that goes on keeps those of its ``config.yaml``. Arguments without ``auto`` stay as they are, and the table is empty.

    Raises:
        UsageError: if nothing says how long the run may be, or several processes were started by others, each of which would choose.
    """
    rest, minutes = _without_auto(args)
    if len(rest) == len(args):
        return rest, ""
    given = said(rest)
    if given.get("ckpt_path"):
        return _with(rest, _config_of(given)), ""
    if _TOLD in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        return _with(rest, os.environ[_TOLD]), ""
    if max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_NTASKS")) > 1:
        raise UsageError(
            "--config auto measures the pace of one process; where others start several, write its choices first: "
            "dino-lightning fit --config auto ... --print_config > run.yaml"
        )
    facts, choices = _chosen(rest, given, minutes)
    os.environ[_TOLD] = text = _recipe(choices)
    table = _table(facts, choices)
    print(table, flush=True)
    return _with(rest, text), table


def _chosen(rest: Sequence[str], given: Mapping[str, Any], minutes: float | None) -> tuple[Facts, Choices]:
    said_length = [name for name in _LENGTHS[:2] if name in given]
    if said_length and minutes is not None:
        raise UsageError(f"--minutes and --{said_length[0]} both say how long the run is; leave one of them out")
    if not said_length and minutes is None:
        raise UsageError("--config auto needs to know how long the run may be: add --minutes 60, or --trainer.max_epochs")
    options = parsed(recipes.resolve_in(rest[1:]), "fit")
    facts = look({name: built(value) for name, value in options["data"].items()}, options["trainer"])
    method, choices = settings(facts, given)
    if facts.memory and method in KNOWN:
        most = run_of(_with(rest, _recipe(choices))[1:], devices=1).step.largest_batch(_FILLED * facts.memory)
        choices.shrink_batch(most, f"{most} would fill {facts.memory / 2**30:.0f} GiB to four fifths (dino-lightning estimate)")
    if minutes is not None:
        print("auto: trying for a moment how fast this is", flush=True)
        pace = images_per_second(_with(rest, _recipe(choices))[1:], seconds=min(20, max(3, round(6 * minutes))))
        length(choices, facts, method, minutes, pace)
    return facts, choices


def _without_auto(args: Sequence[str]) -> tuple[list[str], float | None]:
    """The arguments without --config auto and, if that is there, --minutes; and the minutes."""
    rest, minutes, found = [], None, False
    following = iter(args)
    for arg in following:
        name, equals, value = arg.partition("=")
        if name in ("--config", "-c", "--minutes"):
            value = value if equals else next(following, "")
            if name == "--minutes":
                minutes = float(value)
            elif value == recipes.AUTO:
                found = True
            else:
                rest += [name, value]
        else:
            rest.append(arg)
    return (rest, minutes) if found else (list(args), None)


def _with(rest: Sequence[str], config: str) -> list[str]:
    """The first --config, which all others overrule."""
    return [rest[0], "--config", config, *rest[1:]]


def _config_of(given: Mapping[str, Any]) -> str:
    path = given["ckpt_path"]
    if path == "last":
        folders = [given.get("trainer.default_root_dir") or ".", given.get("checkpoint.dirpath")]
        path = continuation.find_last([folder for folder in folders if folder])
    config = Path(path).resolve().parents[1] / "config.yaml"
    if not config.exists():
        raise UsageError(
            f"--config auto: a run that goes on keeps its settings, but there is no {config}; give them with --config instead of auto"
        )
    return str(config)


def _recipe(choices: Sequence[Choice]) -> str:
    """As YAML, in groups."""
    groups: dict[str, Any] = {}
    for option, value, _ in choices:
        group, dot, name = option.partition(".")
        if dot:
            groups.setdefault(group, {})[name] = value
        else:
            groups[group] = value
    return yaml.safe_dump(groups, sort_keys=False)


def _table(facts: Facts, choices: Sequence[Choice]) -> str:
    shown = [(option, _short(value), why) for option, value, why in choices]
    widths = [max(map(len, column)) for column in zip(*shown)]
    lines = [f"  {option:<{widths[0]}}  {value:<{widths[1]}}  {why}" for option, value, why in shown]
    return "\n".join([f"auto: {facts}", *lines])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['class_path'].rpartition('.')[2]}({', '.join(f'{name}={inner}' for name, inner in value['init_args'].items())})"
    return str(value)
