"""The help of fit, validate, test and predict that fits a few screens; Lightning's own has 1,800 lines."""

import textwrap

import docstring_parser

from dino_lightning import recipes
from dino_lightning.door import faces
from dino_lightning.door.sources import docstring
from dino_lightning.methods import METHODS, home

OWN = {  # options of fit that are neither Lightning's nor of a class
    "config": "a recipe, a YAML file, or auto; several add up, and what is said later wins",
    "method": f"how to train: {', '.join(METHODS)}, each with --model options",
    "minutes": "of the run that --config auto chooses settings for",
    "ckpt_path": "last, or a checkpoint to go on from",
    "checkpoint_every": "minutes between two checkpoints within an epoch; 0 is never",
    "seed_everything": "of weights, order and augmentation",
    "print_config": "shows all options with their values, instead of running",
    "help_all": "explains all options, Lightning's too",
}
_EXAMPLES = """  dino-lightning fit --config quickstart
  dino-lightning fit --config auto --minutes 60 --data.root photos
  dino-lightning fit --config small_images --data.root photos --data.batch_size 32 --trainer.max_epochs 50"""


def of(command: str, method: str) -> str:
    """Its options: ours each with a line, Lightning's by name."""
    known = faces.options(command, method).groups
    shown = {
        "options": {f"--{name}": text for name, text in OWN.items()},
        "--data.NAME: images and views": _lines("dino_lightning.data.datamodule", "MultiCropDataModule", known["data"]),
        f"--model.NAME: of {method} (another: --method NAME --help)": _lines(*home(method), known["model"]),
    }
    listed = "\n\n".join(f"{title}:\n" + "\n".join(_row(name, text) for name, text in rows.items()) for title, rows in shown.items())
    theirs = "\n\n".join(
        f"--{group}.NAME: of Lightning's {owner}:\n{_filled(sorted(known[group] or ()))}"
        for group, owner in (("trainer", "Trainer"), ("checkpoint", "ModelCheckpoint"))
    )
    return f"""usage: dino-lightning {command} [options]

{faces.COMMANDS[command]}

{_EXAMPLES}

{listed}

{theirs}

recipes for --config (dino-lightning --help says what they are for):
{_filled([recipes.AUTO, *recipes.names()])}"""


def _lines(module: str, owner: str, names: set[str] | None) -> dict[str, str]:
    """The options that a class explains, each with the beginning of its explanation."""
    explained = docstring_parser.parse(docstring(module, owner)).params
    return {p.arg_name: " ".join((p.description or "").split()) for p in explained if p.arg_name in (names or ())}


def _filled(names: list[str]) -> str:
    return textwrap.fill(", ".join(names), 118, initial_indent="  ", subsequent_indent="  ")


def _row(name: str, text: str) -> str:
    return f"  {name:<27}{textwrap.shorten(text, 90, placeholder=' ...')}"
