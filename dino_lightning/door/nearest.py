"""What somebody may have meant."""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of the names; of dotted ones (data.batch_size) the part after the dot counts more than its group."""
    names, name = sorted(names), name.replace("-", "_")
    last = {each: each.rpartition(".")[2] for each in names}
    of_another_group = [each for each in names if last[each] == name.rpartition(".")[2]]
    found = of_another_group or difflib.get_close_matches(name, names, 1)
    if not found:
        similar = difflib.get_close_matches(name.rpartition(".")[2], last.values(), 1)
        found = [each for each in names if [last[each]] == similar]
    return found[0] if found else None
