"""The texts of pages: one table a language, with the same keys, chosen by the reader."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Any

from markupsafe import Markup

LANGUAGES = ("en", "de")
"""Languages that there is a table for; the first one is shown to everybody else."""


@dataclass(frozen=True)
class Texts:
    """The texts of one ``language``, by keys such as ``rules.title``."""

    language: str
    table: dict[str, Any]

    def __call__(self, key: str, **values: Any) -> str:
        """A text with its values. Of a text with forms ``one`` and ``other``, ``n`` chooses; a number has the
        separators of the language."""
        found: Any = self.table
        for part in key.split("."):
            found = found[part]
        if isinstance(found, dict):
            found = found["one" if values["n"] == 1 else "other"]
        shown = {name: self.number(value) for name, value in values.items()}
        # A text about something marked up is marked up itself; what else is put into it is escaped.
        marked = any(isinstance(value, Markup) for value in values.values())
        return Markup(found).format(**shown) if marked else str(found).format(**shown)

    def has(self, key: str) -> bool:
        """Whether there is a text of this key."""
        section, _, name = key.partition(".")
        return name in self.table.get(section, {})

    def number(self, value: Any, digits: int = 2) -> str:
        """A number as it is written in the language; anything else as it is."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value if isinstance(value, str) else str(value)
        written = f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}".rstrip("0").rstrip(".")
        return written.translate(str.maketrans(",.", self.table["format"]["separators"]))

    def bytes(self, count: float) -> str:
        """An amount of data, as in 1.4 MB."""
        for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if count >= size:
                return f"{self.number(count / size, 1)} {unit}"
        return f"{self.number(int(count))} B"

    def day(self, seconds: float) -> str:
        """The day of a time in seconds since 1970, as it is written here."""
        when = datetime.fromtimestamp(seconds)
        month = self.table["format"]["months"][when.month - 1]
        return str(self.table["format"]["day"]).format(day=when.day, month=month, year=when.year)

    def clock(self, seconds: float) -> str:
        """Hours and minutes of a time in seconds since 1970."""
        return f"{datetime.fromtimestamp(seconds):%H:%M}"

    def listed(self, words: Iterable[str]) -> str:
        """Words one after the other: ``a, b and c``."""
        *first, last = words
        marked: type[str] = Markup if isinstance(last, Markup) else str
        return marked(self.table["format"]["listed"]).format(marked(", ").join(first), last) if first else last


@cache
def texts(language: str) -> Texts:
    """The texts of one of :data:`LANGUAGES`."""
    content = (resources.files("perfedrec.web") / "texts" / f"{language}.toml").read_text(encoding="utf-8")
    return Texts(language, tomllib.loads(content))


def chosen(accepted: str, wanted: str | None = None) -> str:
    """The language to show: the one ``wanted``, or else the first that the header ``Accept-Language`` prefers."""
    if wanted in LANGUAGES:
        return str(wanted)
    ranked: list[tuple[float, str]] = []
    for entry in accepted.split(","):
        name, _, rest = entry.strip().partition(";")
        weight = re.fullmatch(r"\s*q=([0-9]*\.?[0-9]+)\s*", rest)
        ranked.append((float(weight.group(1)) if weight else 1.0, name.partition("-")[0].lower()))
    known = [(weight, name) for weight, name in ranked if name in LANGUAGES and weight > 0]
    return max(known, key=lambda each: each[0])[1] if known else LANGUAGES[0]
