"""Names in messages, and the near ones of names that do not exist; without pydantic, for which readers do not wait."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

HERE, ELSEWHERE = 0.6, 0.8
"""How alike (0 to 1) a name has to be to be suggested: an option of the section that was named, and one of another."""

_ALIASES = {"gpu": "cuda"}
"""Other words for a name, which are nearer to a wrong one."""

MEANT = "; did you mean "
"""How a near name begins: it is the last part of a message."""


def quoted(name: str) -> str:
    """A name that a user chose, as messages have it: in quotes where one would not see where it begins and ends, which
    is where it is empty or has spaces, commas or quotes."""
    return name if name and not re.search(r"""[\s,;"']""", name) else f'"{name}"'


def listing(names: Iterable[str]) -> str:
    """Names with commas between them, each as :func:`quoted` has it."""
    return ", ".join(map(quoted, names))


def nearest(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """``; did you mean X?`` with the candidate nearest to ``name``, or nothing where none is near.

    Only the last parts of dotted keys are compared: keys of one section look alike by its name alone. The section of
    ``name`` comes first; an option of another section has to have nearly the same name. Capital letters count as small
    ones, dashes as underscores, and + as p, as in perfedrec_pp. ``prefix`` is written before the candidate, which is
    :func:`quoted`.
    """
    section, last = _apart(_ALIASES.get(name.lower(), name))
    near: dict[str, tuple[bool, float, float]] = {}
    for candidate in candidates:
        there, own = _apart(candidate)
        likeness, place = SequenceMatcher(None, own, last).ratio(), SequenceMatcher(None, there, section).ratio()
        at_home = not section or place > 0.75
        if at_home and (set(last.split("_")) <= set(own.split("_")) or (len(last) > 2 and own.startswith(last))):
            likeness = max(likeness, HERE)  # a part of a name, as dim of embedding_dim
        if likeness >= (HERE if at_home else ELSEWHERE):
            near[candidate] = at_home, likeness, place
    return f"{MEANT}{prefix}{quoted(max(near, key=near.__getitem__))}?" if near else ""


def _apart(dotted: str) -> tuple[str, str]:
    """The section of a dotted key, and its last part, as they are compared."""
    section, _, last = dotted.lower().replace("-", "_").replace("+", "p").rpartition(".")
    return section, last
