"""``--config auto``: settings that fit the images, the device and the time, each with its reason."""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from lightning.fabric.plugins.environments import LSFEnvironment, MPIEnvironment, SLURMEnvironment, TorchElasticEnvironment

from dino_lightning import continuation, recipes
from dino_lightning.auto.choices import Choice, Choices, length, schedules, settings
from dino_lightning.auto.facts import Facts, look
from dino_lightning.auto.pace import images_per_second
from dino_lightning.door.commands import said
from dino_lightning.door.errors import UsageError
from dino_lightning.tools.costs import KNOWN, run_of
from dino_lightning.tools.fit_options import built, parsed
from dino_lightning.weights.files import read_checkpoint

_TOLD = "DINO_LIGHTNING_AUTO"  # environment variable: the processes that Lightning starts take what rank 0 has chosen
_LAUNCHERS = (TorchElasticEnvironment, SLURMEnvironment, MPIEnvironment, LSFEnvironment)
_LENGTHS = ("trainer.max_epochs", "trainer.max_steps", "trainer.fast_dev_run")
_FEW = 200  # images
_FILLED = 0.8  # share of a GPU's memory: what libraries and the allocator take comes on top


def in_place(args: Sequence[str]) -> tuple[list[str], str]:
    """The arguments of ``fit`` with settings in place of ``--config auto`` and ``--minutes``, and a table of these; all else wins.

    A run that goes on keeps those of its ``config.yaml``. Arguments without ``auto`` stay as they are, and the table is empty.

    Raises:
        UsageError: if nothing says how long the run may be, or several processes were started by others, each of which would choose.
    """
    rest, minutes = _without_auto(args)
    if rest is None or {"--help", "-h"} & set(args):
        return list(args), ""
    given = said(rest)
    if given.get("ckpt_path") not in (None, "null"):
        return _going_on(rest, given)
    told = json.loads(os.environ.get(_TOLD, "null"))
    if told and told["args"] == rest and os.environ.get("LOCAL_RANK", "0") != "0":
        return _with(rest, told["config"]), ""
    if int(given.get("trainer.num_nodes") or 1) > 1 or any(kind.detect() and kind().world_size() > 1 for kind in _LAUNCHERS):
        raise UsageError(
            "--config auto chooses in one process; where others start several, write its choices first: "
            "dino-lightning fit --config auto ... --print_config > run.yaml"
        )
    facts, choices = _chosen(rest, given, _seconds(given, minutes))
    text, table = _recipe(choices), _table(facts, choices)
    os.environ[_TOLD] = json.dumps({"args": rest, "config": text})
    print(table, file=sys.stderr, flush=True)
    return _with(rest, text), table


def _seconds(given: Mapping[str, Any], minutes: str | None) -> float | None:
    """Seconds that the run may take; None where its length is said otherwise."""
    lengths = [name for name in _LENGTHS if given.get(name) not in (None, "null", -1, "-1", False, "false")]
    if lengths and minutes is not None:
        raise UsageError(f"--minutes says how long the run is, and so does {lengths[0]}={given[lengths[0]]}; leave one of them out")
    if not lengths and minutes is None:
        raise UsageError("--config auto needs to know how long the run may be: add --minutes 60, or --trainer.max_epochs")
    if minutes is None:
        return None
    try:
        found = float(minutes)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise UsageError(f"--minutes must be a number above 0, got {minutes!r}")
    return 60 * found


def _chosen(rest: Sequence[str], given: Mapping[str, Any], seconds: float | None) -> tuple[Facts, Choices]:
    plain = [arg for arg in rest[rest.index("fit") + 1 :] if not arg.startswith("--print_config")]
    options = parsed(recipes.resolve_in(plain), "fit")
    facts = look({name: built(value) for name, value in options["data"].items()}, options["trainer"])
    if facts.images < _FEW:
        print(
            f"auto: {facts.images} images are few to learn from; published weights know more (--config warm_start)",
            file=sys.stderr,
            flush=True,
        )
    method, choices = settings(facts, given, seconds)
    if facts.memory and method in KNOWN:
        most = run_of(["--config", _recipe(choices), *plain], devices=1).step.largest_batch(_FILLED * facts.memory)
        choices.shrink_batch(most, f"{most} would fill {facts.memory / 2**30:.0f} GiB to four fifths (dino-lightning estimate)")
    if seconds is not None:
        print("auto: trying for a moment how fast this is", file=sys.stderr, flush=True)
        pace = images_per_second(["--config", _recipe(choices), *plain], seconds=min(20, max(6, round(seconds / 10))))
        length(choices, facts, seconds / 60, pace)
    elif choices.of("trainer.max_epochs"):
        schedules(choices, int(choices.of("trainer.max_epochs")), None)
    return facts, choices


def _without_auto(args: Sequence[str]) -> tuple[list[str] | None, str | None]:
    """The arguments of fit without --config auto and --minutes, None if there is no auto; and the minutes."""
    rest: list[str] = []
    minutes, found = None, False
    following = iter(args)
    for arg in following:
        name, equals, value = arg.partition("=")
        if name not in ("--config", "-c", "--minutes"):
            rest.append(arg)
            continue
        given = [arg] if equals else [arg, *([behind] if (behind := next(following, None)) is not None else [])]
        if name == "--minutes":
            minutes = given[-1] if not equals else value
        elif (value if equals else given[-1]) == recipes.AUTO:
            found = True
        else:
            rest += given
    return (rest if found and "fit" in rest else None), minutes


def _with(rest: Sequence[str], config: str) -> list[str]:
    """The first --config of fit, which all others overrule."""
    at = rest.index("fit") + 1
    return [*rest[:at], "--config", config, *rest[at:]]


def _going_on(rest: Sequence[str], given: Mapping[str, Any]) -> tuple[list[str], str]:
    path = continuation.checkpoint_at(
        given["ckpt_path"], given.get("trainer.default_root_dir"), given.get("checkpoint.dirpath"), given.get("data.root")
    )
    config = continuation.run_of(path, read_checkpoint(path)) / "config.yaml"
    if not config.exists():
        raise UsageError(
            f"--config auto: a run that goes on keeps its settings, but there is no {config}; give them with --config instead of auto"
        )
    lines = config.read_text(encoding="utf-8").splitlines()
    table = [line.removeprefix("# ") for line in lines if line.startswith(("# auto: ", "#   "))]
    return _with(rest, str(config)), "\n".join(table)


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
