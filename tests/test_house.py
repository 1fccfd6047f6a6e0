"""The house: data and imports flow one way."""

import ast
import tomllib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dino_lightning"

# Each room may import those before it, and files of its own.
ORDER = [
    "listing", "recipes", "losses", "backbones", "training", "data", "evaluation", "weights", "classifiers", "methods", "pictures",
    "callbacks", "finished", "door", "tools", "continuation", "auto", "cli", "__init__", "__main__",
]  # fmt: skip
NO_LIGHTNING = ("losses", "backbones", "evaluation")


def imported(file):
    """The absolute names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(file):
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def test_no_import_points_up():
    files = sorted(PACKAGE.rglob("*.py"))
    assert {room(file) for file in files} == set(ORDER) and len(files) > 80
    up = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in files
        for name in imported(file)
        if name.startswith("dino_lightning.") and not name.split(".")[1].startswith("__version")
        if ORDER.index(name.split(".")[1]) > ORDER.index(room(file))
    ]
    assert not up


def test_every_room_is_in_the_wheel():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    rooms = {".".join(file.parent.relative_to(PACKAGE.parent).parts) for file in PACKAGE.rglob("*.py")}
    assert rooms <= set(project["tool"]["setuptools"]["packages"])


def test_losses_backbones_and_evaluation_know_no_trainer():
    for file in PACKAGE.rglob("*.py"):
        if room(file) in NO_LIGHTNING:
            assert not [name for name in imported(file) if name.split(".")[0] == "lightning"], file
