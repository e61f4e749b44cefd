"""What is wrong with options, as one line of plain English: the mistakes that pydantic finds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from perfedrec.core.dotted import is_section, keys
from perfedrec.core.nearest import MEANT, nearest

EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "string": "text",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "{pattern}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "tuple": "a list",
    "dict": "a section",
    "model": "a section",
    "path": "a path",
    "missing": "a value, and there is none",
}
"""What is expected where pydantic finds a mistake, by the type of the mistake or by its first word."""

_KINDS = {"int", "float", "bool", "str"}
"""What pydantic appends to the place of a mistake where an option may have values of several types."""


def explain(errors: Iterable[ErrorDetails], kind: type[BaseModel], section: str = "") -> str:
    """The mistakes that pydantic found in options of class ``kind``, in one line.

    Each option is named with its value and with what was expected. An option that does not exist, and a value that is
    none of those that an option has, are named with the nearest one. ``section`` is written before each option, as in
    ``pretraining.options.`` or ``--``.
    """
    expected: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    for entry in errors:
        place = _place(entry)
        dotted = ".".join(map(str, place))
        if entry["type"] == "extra_forbidden":
            expected[_unknown(entry, kind, place, section)] = []
            continue
        text, near = wanted(entry)
        given[dotted] = _given(entry) + near
        expected.setdefault(dotted, []).append(text)
        if entry["type"].endswith(("_parsing", "_type")) and _may_be_off(kind, place):
            expected[dotted].append("expected off")
    return "; ".join(
        f"{section + key if key else section.rstrip('.') or 'configuration'}: {_joined(texts)}{given[key]}"
        if texts
        else key
        for key, texts in expected.items()
    )


def wanted(entry: ErrorDetails) -> tuple[str, str]:
    """What was expected, in our words, and the nearest of several values that were possible. What our own validators
    say stays as it is."""
    text = EXPECTED.get(entry["type"]) or EXPECTED.get(entry["type"].partition("_")[0])
    if text is None:
        said, mark, near = entry["msg"].removeprefix("Value error, ").partition(MEANT)
        return said, mark + near
    values, value = entry.get("ctx", {}), entry["input"]
    near = ""
    if entry["type"] == "literal_error" and isinstance(value, str):
        near = nearest(value, re.findall("'([^']+)'", values["expected"]))
    return "expected " + text.format(**values).replace("'", "").strip("^$"), near


def _place(entry: ErrorDetails) -> tuple[int | str, ...]:
    """The parts of the key that a mistake is about."""
    place = entry["loc"]
    return place[:-1] if len(place) > 1 and place[-1] in _KINDS else place


def _unknown(entry: ErrorDetails, kind: type[BaseModel], place: tuple[int | str, ...], section: str) -> str:
    """The text for a key that does not exist."""
    dotted, is_tree = ".".join(map(str, place)), isinstance(entry["input"], dict)
    nearby, prefix = _neighbours(kind, place)
    hint = nearest(dotted.removeprefix(prefix), nearby.model_fields if is_tree else keys(nearby), section + prefix)
    found = f"there is no {'section' if is_tree else 'option'} {section}{dotted}{hint}"
    of_run = "algorithm" in kind.model_fields
    if (is_tree and len(place) == 1) or (not hint and of_run):  # perhaps an option of another method
        found += "; perfedrec config keys --algorithm NAME lists what a method has"
    return found


def _given(entry: ErrorDetails) -> str:
    """The value that was given, in brackets; nothing where there is none, or where it is a whole section."""
    if entry["type"] == "missing" or (entry["type"] == "value_error" and isinstance(entry["input"], dict)):
        return ""
    return f" (given: {_shown(entry['input'])})"


def _joined(texts: list[str]) -> str:
    """What is expected of an option that may have values of several types. Whole numbers are numbers."""
    if "expected a number" in texts and "expected a whole number" in texts:
        texts = [each for each in texts if each != "expected a whole number"]
    texts = sorted(dict.fromkeys(texts), key=lambda each: each == "expected off")  # the last of all
    return " or ".join([texts[0], *(each.removeprefix("expected ") for each in texts[1:])])


def _may_be_off(kind: type[BaseModel], place: tuple[int | str, ...]) -> bool:
    """Whether the option at a ``place`` may have no value."""
    here: Any = kind
    annotation: Any = None
    for part in place:
        fields = {field.alias or name: field.annotation for name, field in getattr(here, "model_fields", {}).items()}
        if part not in fields:
            return False
        annotation = fields[str(part)]
        here = next((each for each in (annotation, *get_args(annotation)) if is_section(each)), None)
    return type(None) in get_args(annotation)


def _shown(value: Any) -> str:
    """A value as a person writes it."""
    if value is None or isinstance(value, bool):
        return "off" if value is None else str(value).lower()
    return "a section" if isinstance(value, dict) else repr(value)


def _neighbours(kind: type[BaseModel], place: tuple[int | str, ...]) -> tuple[type[BaseModel], str]:
    """The class among whose keys the nearest name is looked for, and the dotted way to it.

    It is the whole configuration. For a key in an entry of a table with free names, or in a section that may be absent,
    it is the class of that entry or section.
    """
    found, prefix, here, parts = kind, "", kind, list(place[:-1])
    while parts:
        fields: dict[str, Any] = {field.alias or name: field.annotation for name, field in here.model_fields.items()}
        annotation, used = fields.get(str(parts[0])), 1
        if not is_section(annotation):
            used = 2 if get_origin(annotation) is dict else 1
            annotation = next((each for each in get_args(annotation) if is_section(each)), None)
            if annotation is None:
                break
            depth = len(place) - 1 - len(parts) + used
            found, prefix = annotation, ".".join(map(str, place[:depth])) + "."
        here, parts = annotation, parts[used:]
    return found, prefix
