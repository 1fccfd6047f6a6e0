"""jsonargparse's messages, which list all that they tried, in a line each."""

import re

_KEY = re.compile(r'Parser key "([\w.]+)":\s*')
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':\s*(.+)")
_UNION = re.compile(r"Subtypes: \[([^\n]*)\]\n.*^\s*Given value: ([^\n]*)", flags=re.DOTALL | re.MULTILINE)
_PLAIN = re.compile(r"Expected an? (.*)\. Got value: (.*)")
_NESTED = re.compile(r"NestedArg\(key='([\w.]+)', val=(.*)\)")
_TYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>|(?:\w+\.)+(\w+)")
_MISSING = re.compile(r"the following arguments are required: (.*)")


def brief(message: str, command: str, listed: str | None = None) -> str:
    """One line: the option, what it takes and what it was given. ``listed`` stands on the command line without an option."""
    key = _KEY.match(message)
    option = f"--{key[1]}" if key else ""
    if refused := _CLASS.search(message):
        return f"{option}: {refused[1]}: {refused[2]}"
    if found := _UNION.search(message) or _PLAIN.search(message):
        if nested := _NESTED.fullmatch(found[2]):
            return f"{option}.{nested[1]}: what {option} is set to has no such option"
        return f"{option} takes {_types(found[1])}, got {found[2]}"
    if missing := _MISSING.search(message):
        names = [name.upper() if name == listed else f"--{name}" for name in missing[1].split(", ")]
        return f"{command} needs {', '.join(names)}; dino-lightning {command} --help explains"
    return " ".join(message.replace(key[0], f"{option}: ").split() if key else message.split())


def _types(listed: str) -> str:
    """``<class 'int'>, typing.Literal['a', 'b'], <class 'NoneType'>`` as ``int, 'a', 'b' or null``."""
    named = _TYPE.sub(lambda found: found[1] or found[2], listed).replace("NoneType", "null").replace(", null", " or null")
    return re.sub(r"Literal\[([^\]]*)\]", r"\1", named)
