"""What the pages of the documentation take from the code, so that it cannot go out of date: ``{{ NAME ARGUMENTS }}`` in a page.

    {{ source losses/dino.py DINOLoss.forward }}       the file and the line where that stands
    {{ class dino_lightning.MultiCropDataModule data }}  its arguments as options --data.NAME
    {{ tool knn }}  {{ tools }}                          a tool's options; those of all
    {{ recipes }}                                        each recipe, with its comments
    {{ schedules }}                                      those of a run, drawn
    {{ code docs/segmentation.py }}                      a file
    {{ page benchmarks/README.md }}                      a page that lies elsewhere; links in it that lead nowhere here become text

A name that is not there is an error, and so is a page with one.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import docstring_parser

from dino_lightning import recipes
from dino_lightning.door import faces
from dino_lightning.methods.dino import DINOPlan
from dino_lightning.tools.page import Line, lines

ROOT = Path(__file__).parents[1]
_NOTE = re.compile(r"^> As a file this page lacks .*\n\n", re.MULTILINE)
_MACRO = re.compile(r"\{\{ *(\w+)((?: +[^ }]+)*) *\}\}")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs for each page."""
    return expand(markdown)


def expand(markdown: str) -> str:
    """A page with what its macros stand for, and without the note that the file lacks that."""
    return _MACRO.sub(lambda found: MACROS[found[1]](*found[2].split()), _NOTE.sub("", markdown))


def source(file: str, name: str) -> str:
    """Where a function, a class or a method is defined."""
    nodes: list[ast.AST] = [ast.parse((ROOT / "dino_lightning" / file).read_text(encoding="utf-8"))]
    for part in name.split("."):
        nodes = [child for node in nodes for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part]
    if len(nodes) != 1:
        raise LookupError(f"dino_lightning/{file} has {len(nodes)} times {name}")
    return f"`{file}:{nodes[0].lineno}` (`{name}`)"


def class_options(path: str, group: str) -> str:
    module, _, name = path.rpartition(".")
    return _table(getattr(importlib.import_module(module), name), f"--{group}.")


def tool(name: str) -> str:
    stub = faces.tools()[name]
    about = docstring_parser.parse(inspect.getdoc(stub) or "")
    usage = " ".join(f"{p.name.upper()}..." for p in inspect.signature(stub).parameters.values() if p.kind == p.VAR_POSITIONAL)
    said = "\n\n".join(filter(None, (about.short_description, about.long_description)))
    returns = f"\n\nIn Python, `dino_lightning.tools.{name}` returns: {_cell(about.returns.description)}" if about.returns else ""
    return f"## {name}\n\n`dino-lightning {' '.join(filter(None, (name, usage)))} [options]`\n\n{said}\n\n{_table(stub, '--')}{returns}"


def all_tools() -> str:
    return "\n\n".join(tool(name) for name in faces.tools())


def all_recipes() -> str:
    parts = []
    for name in recipes.names():
        text = (recipes.folder() / f"{name}.yaml").read_text(encoding="utf-8")
        comments = re.match(r"(#.*\n)*", text)[0]
        about = " ".join(line.lstrip("# ") for line in comments.splitlines())
        parts.append(f"## {name}\n\n{about}\n\n```yaml\n{text.removeprefix(comments).strip()}\n```")
    return "\n\n".join(parts)


def schedules() -> str:
    """Of a run of 100 epochs of 50 steps, with the reference's settings for a ViT-S."""
    plan = DINOPlan(
        total_steps=5000, steps_per_epoch=50, lr=2e-3, min_lr=1e-6, warmup_epochs=10, weight_decay=0.04, weight_decay_end=0.4,
        momentum_teacher=0.996, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=30,
    )  # fmt: skip
    values = [(step, plan.values_at(step)) for step in range(0, 5000, 10)]
    drawn = []
    for name in values[0][1]:
        svg = lines([Line(name, [(step / 50, value[name]) for step, value in values])], f"{name} against epochs", percent=False)
        drawn.append(f"**{name.replace('_', ' ')}** against epochs\n\n{svg}")
    return "\n\n".join(drawn)


def code(file: str) -> str:
    return f"```python\n{(ROOT / file).read_text(encoding='utf-8').strip()}\n```"


def page(file: str) -> str:
    text = (ROOT / file).read_text(encoding="utf-8")
    text = text.replace("](recipes.md)", "](cpu.md)")
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#|cpu\.md)[^)]+\)", r"\1", text)


MACROS: dict[str, Callable[..., str]] = {
    "source": source, "class": class_options, "tool": tool, "tools": all_tools, "recipes": all_recipes, "schedules": schedules, "code": code,
    "page": page,
}  # fmt: skip


def _table(function: Callable, prefix: str) -> str:
    """Its arguments with their defaults and what its docstring says of them; of a class, those of its constructor."""
    explained = {argument.arg_name: argument.description for argument in docstring_parser.parse(inspect.getdoc(function) or "").params}
    rows = ["| option | default | |", "|---|---|---|"]
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind == parameter.VAR_POSITIONAL:
            rows.append(f"| `{parameter.name.upper()}...` | | {_cell(explained[parameter.name])} |")
        else:
            default = "needed" if parameter.default is parameter.empty else f"`{_default(parameter.default)}`"
            rows.append(f"| `{prefix}{parameter.name}` | {default} | {_cell(explained[parameter.name])} |")
    return "\n".join(rows)


def _default(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return str(list(value) if isinstance(value, tuple) else int(value) if isinstance(value, int) else value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
