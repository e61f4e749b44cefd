"""The catalogue of a federation, which all parties share.

It holds the items in the order by which all parties number them, the attributes of the items, and the encoding by which
the attributes of users become numbers.
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from perfedrec.core.counted import counted
from perfedrec.core.errors import DataError
from perfedrec.core.nearest import listing
from perfedrec.data.attributes import read_encoding, write_encoding
from perfedrec.data.dataset import Attributes, Dataset, Encoding
from perfedrec.data.interactions import Ids, Interactions, encode, id_series
from perfedrec.data.quotes import enclosed
from perfedrec.data.roles import names_role
from perfedrec.data.source import attributes_beside
from perfedrec.data.text import clean, fail, read_bytes
from perfedrec.data.values import parse_ids
from perfedrec.data.write import write_attributes

ENCODING = "user_encoding.csv"


@dataclass(frozen=True, eq=False)
class Catalogue:
    """``item_ids`` [m] (int64, or objects of str), the attributes of items, and the ``encoding`` of users' attributes.

    Attributes and encoding are ``None`` where the federation does not use any.
    """

    item_ids: Ids
    item_attributes: Attributes | None = None
    encoding: Encoding | None = None

    @staticmethod
    def of(dataset: Dataset, attributes: bool = False) -> Catalogue:
        """The catalogue of a data set, with ``attributes`` or without.

        Raises :class:`DataError` where attributes are wanted and the data set has none, and where users are held out
        from training.
        """
        _check_all_train(dataset)
        users, items, item_ids = dataset.user_attributes, dataset.item_attributes, dataset.train.item_ids
        if not attributes:
            return Catalogue(item_ids)
        if users is None and items is None:
            raise DataError(
                "model.attributes is true, but the data set has no attributes; expected user_attributes.csv or "
                "item_attributes.csv in the folder of the data"
            )
        return Catalogue(item_ids, items, None if users is None else users.encoding)

    def number(self, dataset: Dataset) -> Dataset:
        """A data set with its items numbered as in the catalogue, without users' attributes.

        Interactions with other items are left out, which the notes of the result say. Raises :class:`DataError` where
        no training interaction is left, and where users are held out from training.
        """
        _check_all_train(dataset)
        place = encode(id_series(dataset.train.item_ids), self.item_ids)
        parts, user_ids = [], dataset.train.user_ids
        for part in (dataset.train, dataset.valid, dataset.test):
            kept = place[part.items] >= 0
            times = None if part.timestamps is None else part.timestamps[kept]
            rows = part.users_of_rows()[kept], place[part.items][kept]
            parts.append(Interactions.from_rows(user_ids, self.item_ids, *rows, times))
        if not parts[0].n_interactions:
            raise DataError(
                f"{dataset.name}: none of its {dataset.n_items:,} items is among the {len(self.item_ids):,} items of "
                f"the federation's catalogue; expected ids such as {self.item_ids[0]}"
            )
        remarks = dataset.notes.remarks
        if unknown := int((place < 0).sum()):
            count = sum(part.n_interactions for part in (dataset.train, dataset.valid, dataset.test))
            count -= sum(part.n_interactions for part in parts)
            left = f"{counted(count, 'interaction')} with {counted(unknown, 'item')}"
            remarks += (f"{left} that the federation's catalogue does not have: left out",)
        notes = replace(dataset.notes, remarks=remarks)
        train, valid, test = parts
        return Dataset(dataset.name, train, valid, test, notes, item_attributes=self.item_attributes)

    @property
    def n_user_attributes(self) -> int:
        return 0 if self.encoding is None else len(self.encoding.names)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on the ids, their order, and the encoding of users' attributes."""
        text = "\0".join(map(str, self.item_ids.tolist()))
        text += "" if self.encoding is None else f"\0\0{self.encoding}"
        return hashlib.sha256(f"{len(self.item_ids)};{text}".encode()).hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Write files that :func:`read_catalogue` can read."""
        path.write_text("".join(f"{_quoted(str(each))}\n" for each in self.item_ids.tolist()), encoding="utf-8")
        write_attributes(path.parent, "item", self.item_ids, self.item_attributes)
        if self.encoding is not None:
            write_encoding(path.parent / ENCODING, self.encoding)


def _check_all_train(dataset: Dataset) -> None:
    """Refuse data with new users, who are on no node."""
    if dataset.new_users is not None:
        raise DataError(
            f"{dataset.name}: users are held out from training (data.split = users), which a federation cannot do; "
            "expected another split, or train, which simulates a federation"
        )


def read_catalogue(path: str | Path) -> Catalogue:
    """Read a catalogue from a file, and from ``item_attributes.csv`` and ``user_encoding.csv`` in the same folder.

    The file has one id on each line, and may start with a header ``item``; or it is a parquet file with a column of
    that name. Ids are int64 if all are plain integers, otherwise objects of str. Raises :class:`DataError`, which names
    the line, for an id that is missing or repeated.
    """
    path = Path(path)
    item_ids, encoding = _read_ids(path), path.parent / ENCODING
    attributes, _ = attributes_beside(path.parent, "item", item_ids)
    return Catalogue(item_ids, attributes, read_encoding(encoding) if encoding.is_file() else None)


def _unquoted(line: str) -> str:
    """An id without the quotes that enclose it; any other quote is a character."""
    return line[1:-1].replace('""', '"') if len(line) > 1 and line[0] == line[-1] == '"' else line


def _quoted(item: str) -> str:
    """The line of an id, from which :func:`_unquoted` makes it again."""
    return enclosed(item) if item[:1] == '"' else item


def _read_ids(path: Path) -> Ids:
    data = read_bytes(path)
    if data[:4] == b"PAR1":
        try:
            table = pl.read_parquet(io.BytesIO(data))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path}: is not a readable parquet file ({str(error).splitlines()[0]})") from None
        named = [name for name in table.columns if names_role(name, "item", ids=True)]
        if len(named) != 1:
            raise DataError(f"{path}: expected one column of items; the columns are {listing(table.columns)}")
        values, first = table[named[0]], 1
    else:
        lines = [_unquoted(line.strip()) for line in clean(path, data).decode().split("\n")]
        named = [cell.strip().strip('"') for cell in re.split("[,;\t]", lines[0])]
        if len(named) > 1 and any(names_role(cell, role) for cell in named for role in ("user", "item")):
            problem = f"has {len(named)} columns, {listing(named)}; expected one item id on each line"
            raise DataError(f"{path}: {problem}")
        first = 2 if names_role(lines[0], "item", ids=True) else 1
        values = pl.Series(lines[first - 1 :], dtype=pl.String)
    ids, bad = parse_ids(values)
    if bad is not None:
        fail(path, bad[0] + first, f"item {bad[1]}")
    if ids.n_unique() < ids.len():
        place = int((~ids.is_first_distinct()).arg_max() or 0)
        fail(path, place + first, f"item {ids[place]!r} occurs a second time; expected each item once")
    return ids.to_numpy() if ids.dtype.is_integer() else np.array(ids.to_list(), dtype=object)
