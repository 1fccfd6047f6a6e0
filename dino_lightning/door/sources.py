"""Functions as their sources declare them, without importing these: torch and Lightning take seconds."""

import ast
import builtins
import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent.name


def function(module: str, name: str) -> ast.FunctionDef | None:
    """A function of a module, or a method (``Class.method``); None where there is none."""
    owner, _, method = name.partition(".")
    found = _definition(module, owner)
    inside = getattr(found, "body", []) if method else [found]
    return next((node for node in inside if isinstance(node, ast.FunctionDef) and node.name == (method or owner)), None)


def docstring(module: str, name: str) -> str:
    """Of a function or a class of a module; empty where there is none."""
    node = _definition(module, name)
    return (ast.get_docstring(node) or "") if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""


def stub(module: str, node: ast.FunctionDef) -> Callable[..., None]:
    """The function with its signature and docstring, doing nothing. What annotations and defaults name is looked up in the sources."""
    bare = copy.copy(node)
    documented = ast.get_docstring(node) is not None
    bare.body, bare.decorator_list, bare.returns = node.body[:1] if documented else [ast.Pass()], [], None
    names = _Names(module)
    code = compile(ast.fix_missing_locations(ast.Module([bare], [])), f"<{module}>", "exec")
    exec(code, {"__name__": __name__}, names)
    return names[node.name]


def light_part(module: str, node: ast.FunctionDef) -> ast.FunctionDef:
    """The function with only those of its optional arguments whose types and defaults need no import but typing's."""

    def is_light(*parts: ast.expr | None) -> bool:
        names = {name.id for part in parts if part for name in ast.walk(part) if isinstance(name, ast.Name)}
        sources = [getattr(_definition(module, name), "module", None) for name in names if not hasattr(builtins, name)]
        return all(source in ("typing", "collections.abc") for source in sources)

    given = node.args
    defaults = [*zip(given.args[::-1], given.defaults[::-1])][::-1] + [*zip(given.kwonlyargs, given.kw_defaults)]
    kept = [(argument, default) for argument, default in defaults if default and is_light(argument.annotation, default)]
    bare = copy.copy(node)
    bare.args = ast.arguments([], [], None, [argument for argument, _ in kept], [default for _, default in kept], None, [])
    return bare


class _Names(dict):
    """The names that a module's source defines or imports, each computed when it is asked for."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self._module = module

    def __missing__(self, name: str) -> Any:
        node = _definition(self._module, name)
        if isinstance(node, ast.Assign):
            self[name] = eval(compile(ast.Expression(node.value), f"<{name}>", "eval"), {}, self)
        elif isinstance(node, ast.ImportFrom):
            names = _Names(node.module) if node.module.split(".")[0] == _PACKAGE else vars(importlib.import_module(node.module))
            self[name] = names[next(alias.name for alias in node.names if name == (alias.asname or alias.name))]
        else:
            raise KeyError(name)  # a builtin
        return self[name]


def _definition(module: str, name: str) -> ast.stmt | None:
    """The statement that gives a module this name."""
    tree = _tree(module)
    for node in tree.body if tree else []:
        if isinstance(node, ast.ImportFrom) and any(name == (alias.asname or alias.name) for alias in node.names):
            return node
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
            return node
    return None


@functools.cache
def _tree(module: str) -> ast.Module | None:
    """The source of a module; None where there is none."""
    first, *rest = module.split(".")
    spec = importlib.util.find_spec(first)  # imports nothing
    path = Path(spec.origin).parent.joinpath(*rest) if spec else Path()
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None
