"""Quotes in CSV: which of them enclose a field, and which are characters.

A field that starts with a quote is enclosed up to the next quote that a separator or the end of the line follows; a
doubled quote inside stands for one. Everywhere else a quote is a character, also in ``"big" deal``.
"""

from __future__ import annotations

import re
from pathlib import Path

from perfedrec.data.text import all_lines, fail

LONGEST = 10_000  # lines of one field


def settle_quotes(path: Path, text: bytes, separator: str) -> tuple[bytes, int]:
    """The text with all quotes in the form that every CSV reader understands alike.

    Also returns how many lines continue a field of the line before. Line numbers do not change. Raises
    :class:`DataError`, with the line, for a quote that never closes, and for one that closes in a later line although
    each of these lines is a whole row if quotes are characters.
    """
    if b'"' not in text:
        return text, 0
    sign = re.escape(separator)
    field = rf'(?:"(?:[^"]|"")*"|[^"{sign}]*)'
    lines = all_lines(text)["line"].fill_null("")
    regular = lines.str.contains(rf"^{field}(?:{sign}{field})*$")
    if regular.all():
        return text, 0
    content, is_regular = lines.to_list(), regular.to_list()
    width, inner = 0, 0
    done: list[str] = []
    while len(done) < len(content):
        start = len(done)
        if is_regular[start] and width:
            done.append(content[start])
            continue
        fields, end = _record(path, content, start, separator, width)
        width = width or (len(fields) if content[start] else 0)
        record = separator.join(
            enclosed(each) if any(mark in each for mark in ('"', "\n", separator)) else each for each in fields
        )
        done += record.split("\n")
        inner += end - start - 1
    return "\n".join(done).encode(), inner


def enclosed(field: str) -> str:
    """A field in quotes, which are doubled within it."""
    return '"' + field.replace('"', '""') + '"'


def _is_row(line: str, separator: str, width: int) -> bool:
    """Whether a line has the fields of a row, if quotes are characters or if they enclose whole fields."""
    sign = re.escape(separator)
    bare = re.sub(rf'(?:^|(?<={sign}))"(?:[^"]|"")*"(?={sign}|$)', "", line)
    return width in (line.count(separator) + 1, bare.count(separator) + 1)


def _record(path: Path, lines: list[str], start: int, separator: str, width: int) -> tuple[list[str], int]:
    """The fields of the record that begins in line ``start``, and the line after its end."""
    sign = re.escape(separator)
    closing = re.compile(rf'((?:[^"]|""|"(?!"|\Z|{sign}))*)"(?:\Z|{sign})')
    fields: list[str] = []
    rest, line, more = lines[start], start, True
    while more:
        value, found, after = rest.partition(separator)
        match = closing.match(rest, 1) if rest.startswith('"') else None
        if rest.startswith('"') and match is None and value.count('"') % 2:
            first, parts = line, [rest]
            while match is None:
                line += 1
                if line in (len(lines), first + LONGEST):
                    fail(path, first + 1, "opens a quote that never closes; double it if it is a character")
                parts.append(lines[line])
                if '"' in lines[line]:
                    match = closing.match("\n".join(parts), 1)
            rest = "\n".join(parts)
            if all(_is_row(each, separator, width) for each in lines[start : line + 1]):
                fail(
                    path,
                    first + 1,
                    f"opens a quote that closes in line {line + 1}, but each of these lines looks like a row; double "
                    "the quotes that are characters",
                )
        if match is None:
            fields.append(value)
            more, rest = bool(found), after
        else:
            fields.append(match[1].replace('""', '"'))
            more, rest = match[0].endswith(separator), rest[match.end() :]
    return fields, line + 1
