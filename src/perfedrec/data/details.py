"""What people see of items: titles, pictures and attributes, from a table or from the item files of MovieLens."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from perfedrec.core.counted import counted
from perfedrec.core.errors import DataError, reason
from perfedrec.core.nearest import listing
from perfedrec.data.quotes import settle_quotes
from perfedrec.data.roles import names_role, plain_name
from perfedrec.data.text import Layout, clean, fail, read_bytes, records

PICTURE_BYTES = 512 * 1024
"""The most bytes of a picture."""

TITLES = frozenset(
    ["title", "name", "itemname", "itemtitle", "movietitle", "filmtitle", "booktitle", "producttitle", "productname"]
)
PICTURES = frozenset(["picture", "image", "photo", "poster", "cover", "thumbnail", "img"])
"""Names of columns in plain form (:func:`perfedrec.data.roles.plain_name`)."""

MEDIA = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
"""The first bytes of pictures, and their media types; WebP is looked for apart."""

NOTHING = "(no genres listed)"
"""What MovieLens writes in place of genres."""


@dataclass(frozen=True)
class Details:
    """What is known of an item beside its id: the ``title``, the ``picture`` as its media type and its bytes, and
    ``attributes`` by name."""

    item: str
    title: str | None = None
    picture: tuple[str, bytes] | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)


def read_details(path: str | Path) -> list[Details]:
    """Read the details of items from a file, each item once.

    The file is a table with a header: CSV (or with semicolons or tabs) or parquet. One column has the items' ids. A
    column ``title`` has titles, and a column ``picture`` names files (PNG, JPEG, GIF or WebP, of at most
    :data:`PICTURE_BYTES`) in the folder of the table or below it. Every other column is an attribute. Or the file is
    ``u.item`` of MovieLens 100K, with ``u.genre`` beside it for the names of genres, or ``movies.dat``; ``movies.csv``
    is such a table. Empty cells are left out. In a column ``genres`` a list is separated by ``|``.

    Raises :class:`DataError`, which names the line, for a broken line, an item that is missing or repeated, and a
    picture that cannot be used.
    """
    path = Path(path)
    data = read_bytes(path)
    names, rows = _from_parquet(path, data) if data[:4] == b"PAR1" else _from_text(path, data)
    found: dict[str, Details] = {}
    own = _column(path, names)
    for place, cells in rows:
        item = cells[own]
        if not item:
            fail(path, place, "item is missing; expected an id")
        if item in found:
            fail(path, place, f"item {item!r} occurs a second time; expected each item once")
        found[item] = _details(path, place, item, dict(zip(names, cells, strict=True)), names[own])
    if not found:
        raise DataError(f"{path}: has no items; expected a line for each item")
    return list(found.values())


def _column(path: Path, names: list[str]) -> int:
    """The column of the ids."""
    plain = [plain_name(name) for name in names]
    for wanted in ({"item", "itemid"}, {"id"}):
        if len(exact := [place for place, name in enumerate(plain) if name in wanted]) == 1:
            return exact[0]
    known = [place for place, name in enumerate(names) if names_role(name, "item", ids=True)]
    if len(known) != 1:
        raise DataError(f"{path}: expected one column item; the columns are {listing(names)}")
    return known[0]


def _details(path: Path, place: int | str, item: str, cells: dict[str, str], own: str) -> Details:
    title, picture, attributes = None, None, {}
    for name, value in cells.items():
        if name == own or not value or value == NOTHING:
            continue
        if plain_name(name) in TITLES and title is None:
            title = value
        elif plain_name(name) in PICTURES and picture is None:
            picture = _picture(path, place, value)
        else:
            attributes[name] = ", ".join(value.split("|")) if plain_name(name) in ("genre", "genres") else value
    return Details(item, title, picture, attributes)


def _picture(path: Path, place: int | str, name: str) -> tuple[str, bytes]:
    """A picture in the folder of the table, which may come from somebody else: no other file is read."""
    folder = path.parent.resolve()
    file = (folder / name).resolve()
    if not file.is_relative_to(folder):
        fail(path, place, f"picture {name} is not in the folder of the table; expected the name of a file there")
    try:
        with open(file, "rb") as stream:
            content = stream.read(PICTURE_BYTES + 1)
    except OSError as error:
        fail(path, place, f"picture {name} cannot be read ({reason(error)}); expected a file beside the table")
    if len(content) > PICTURE_BYTES:
        fail(path, place, f"picture {name} has more than {PICTURE_BYTES // 1024} kB; expected a smaller one")
    media = next((kind for start, kind in MEDIA.items() if content.startswith(start)), None)
    if media is None and content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        media = "image/webp"
    if media is None:
        fail(path, place, f"picture {name} is none of PNG, JPEG, GIF and WebP; expected one of these")
    return media, content


Rows = Iterator[tuple[int | str, list[str]]]


def _from_parquet(path: Path, data: bytes) -> tuple[list[str], Rows]:
    try:
        table = pl.read_parquet(io.BytesIO(data))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: is not a readable parquet file ({str(error).splitlines()[0]})") from None
    listed = [name for name, kind in table.schema.items() if isinstance(kind, pl.List)]
    text = table.with_columns(pl.col(listed).cast(pl.List(pl.String)).list.join(", "))
    try:
        text = text.with_columns(pl.all().cast(pl.String).fill_null("").str.strip_chars())
    except pl.exceptions.PolarsError:
        raise DataError(f"{path}: has a nested column; expected texts, numbers or lists of texts") from None
    return table.columns, ((f"row {row}", list(cells)) for row, cells in enumerate(text.iter_rows(), start=1))


def _from_text(path: Path, data: bytes) -> tuple[list[str], Rows]:
    text = clean(path, data)
    first = text.partition(b"\n")[0].decode()
    if "::" in first:
        return ["item", "title", "genres"], _rows(path, text, "::", 3)
    if first.count("|") > 20 and first.partition("|")[0].isdecimal():
        return _from_ml_100k(path, text)
    separator = max("\t,;", key=first.count)
    if separator == "\t":
        rows = _rows(path, text, separator, first.count(separator) + 1)
    else:
        settled, _ = settle_quotes(path, text, separator)
        rows = _rows(path, settled, separator)
    header = next(rows)[1]
    if len(set(header)) < len(header) or not all(header):
        fail(path, 1, f"expected a header of different names; found {listing(header)}")
    return header, rows


def _rows(path: Path, text: bytes, separator: str, width: int | None = None) -> Rows:
    for place, cells in records(path, text, Layout(separator)):
        if not cells:
            continue
        width = width or len(cells)
        if len(cells) != width:
            fail(path, place, f"has {counted(len(cells), 'column')}; expected {width} as in the first line")
        yield place, [cell.strip() for cell in cells]


def _from_ml_100k(path: Path, text: bytes) -> tuple[list[str], Rows]:
    """Titles, dates and genres of MovieLens 100K; its addresses of pages are left out. Without ``u.genre`` beside the
    file the genres have no names, and are left out as well."""
    listed = path.parent / "u.genre"
    genres = []
    if listed.is_file():
        genres = [cells[0] for _, cells in _rows(listed, clean(listed, read_bytes(listed)), "|", 2)]

    def rows() -> Rows:
        for place, cells in _rows(path, text, "|"):
            item, title, released, flags = cells[0], cells[1], cells[2], cells[5:]
            own = [name for name, flag in zip(genres, flags, strict=False) if flag == "1"]
            yield place, [item, title, released, "|".join(own)]

    return ["item", "title", "released", "genres"], rows()
