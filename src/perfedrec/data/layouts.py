"""Which files of a folder are a data set: the parts of a split by their names, or one file with all interactions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfedrec.core.errors import DataError
from perfedrec.core.nearest import listing

NEW_USERS = "new_users"
"""The name of the file with the known interactions of users who are held out from training."""

PARTS = ("train", "valid", "test")
SUFFIXES = (".txt", ".csv", ".tsv", ".parquet", ".inter", ".dat", ".data", ".json", ".jsonl", ".rating")
PACKED = (".gz", ".zip")
_ENDINGS = (*SUFFIXES, *PACKED)
WHOLE = ("u.data", "ratings.dat", "ratings.csv")  # the files of interactions of MovieLens
WORDS = {
    "train": ("train", "training", "trn", "base"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing", "tst"),
}
"""The names by which the parts of a split go; ``base`` is that of MovieLens 100K."""

_WORDS = {word: part for part, words in WORDS.items() for word in words}
_NAME = re.compile(rf"(?:(?P<before>.+)[._-])?(?P<word>{'|'.join(_WORDS)})(?:[._-](?P<after>.+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """The files of a data set: the ``parts`` of a split by their names, or one ``whole`` file.

    ``name`` is the name of the data set, and ``remarks`` are sentences about files that are not used.
    """

    name: str
    parts: dict[str, Any]
    whole: Path | None = None
    remarks: tuple[str, ...] = ()


def find(path: Path) -> Found:
    """The data set that ``path`` names: a file, a folder, or FOLDER/u1 for u1.base and u1.test in a folder.

    A folder is searched, in this order, for train and test (valid may be missing, and new_users may be there); a known
    file of MovieLens; one pair of files whose names have these words in them; a training part alone; and one ``.inter``
    file. Raises :class:`DataError` where nothing or too much is found.
    """
    if path.is_dir():
        return _in_folder(path)
    splits = _splits(path.parent) if path.parent.is_dir() else {}
    if path.exists():
        mine = next((each for each in splits.values() if each.get("train") == path and "test" in each), None)
        remark = f"only {path.name} is read, and split; name the folder to use {mine['test'].name} too" if mine else ""
        return Found(path.stem, {}, path, remarks=(remark,) if remark else ())
    if path.name in splits and {"train", "test"} <= set(splits[path.name]):
        return Found(path.name, splits[path.name], remarks=_negatives(path.parent, path.name))
    return Found(path.stem, {}, path)


def _in_folder(folder: Path) -> Found:
    splits = _splits(folder)
    whole = [found for name in WHOLE if (found := _packed(folder, name)) is not None]
    complete = [name for name, parts in splits.items() if {"train", "test"} <= set(parts)]
    name = folder.resolve().name
    if "" in complete:
        return Found(name, splits[""] | _new_users(folder))
    if "" in splits and set(splits[""]) != {"train"}:
        missing = " and ".join(part for part in ("train", "test") if part not in splits[""])
        there = listing(path.name for path in splits[""].values())
        raise DataError(
            f"{folder}: a split needs train and test, and valid if there is one; there is {there}, missing: {missing}"
        )
    if len(whole) == 1:
        others = tuple(
            f"not used: the given splits {listing(complete)}; name one as {folder}/{complete[0]}" for _ in complete[:1]
        )
        return Found(name, {}, whole[0], others)
    if len(complete) == 1:
        return Found(name, splits[complete[0]], remarks=_negatives(folder, complete[0]))
    if complete:
        raise DataError(f"{folder}: holds the splits {listing(complete)}; expected one of them: {folder}/{complete[0]}")
    alone = [parts["train"] for parts in splits.values() if set(parts) == {"train"}] if not whole else []
    if len(alone) == 1:
        return Found(name, {}, alone[0], remarks=(f"there is no test file: {alone[0].name} is split",))
    whole = whole or sorted(folder.glob("*.inter"))
    if len(whole) != 1:
        raise DataError(
            f"{folder}: expected train and test files by names such as train.txt and test.txt, one of "
            f"{', '.join(WHOLE)}, or one .inter file; "
            f"found {listing(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'}{_way_out(folder)}"
        )
    return Found(name, {}, whole[0])


def _way_out(folder: Path) -> str:
    """What to do about a folder in which no name says what is what; nothing where it has no file that may be data."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.lower().endswith(_ENDINGS)]
    named = {word: [path for path in files if word in path.name.lower()] for word in ("train", "test")}
    if len(files) == 1:
        return f"; if this is the data, name the file itself: {files[0]}"
    if all(len(each) == 1 for each in named.values()) and named["train"] != named["test"]:
        (train,), (test,) = named.values()
        return f"; rename {train.name} and {test.name}, or give them with --train {train} --test {test}"
    return "; rename the files, or give them with --train and --test, or a single one with --data" if files else ""


def _splits(folder: Path) -> dict[str, dict[str, Path]]:
    """The files of a folder that are named like parts of a split, by the rest of their names: "" for train.csv, "u1"
    for u1.base, "ml-1m" for ml-1m.train.rating."""
    splits: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        matched = _NAME.fullmatch(_bare(path.name))
        if matched is None or not path.is_file():
            continue
        rest = ".".join(filter(None, (matched["before"], matched["after"])))
        part = _WORDS[matched["word"].lower()]
        parts = splits.setdefault(rest, {})
        if part in parts:
            raise DataError(f"{folder}: holds {parts[part].name} and {path.name}; expected only one of them")
        parts[part] = path
    return splits


def _new_users(folder: Path) -> dict[str, Path]:
    """The file with the known interactions of users who are held out from training, if there is one."""
    found = [path for path in sorted(folder.iterdir()) if _bare(path.name) == NEW_USERS and path.is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: holds {found[0].name} and {found[1].name}; expected only one of them")
    return {NEW_USERS: found[0]} if found else {}


def _bare(name: str) -> str:
    """The name of a file without the endings that say how it is packed and written."""
    for endings in (PACKED, SUFFIXES):
        for ending in endings:
            name = name.removesuffix(ending)
    return name


def _packed(folder: Path, name: str) -> Path | None:
    """The file of this name, which may be packed."""
    return next((path for end in ("", *PACKED) if (path := folder / (name + end)).is_file()), None)


def _negatives(folder: Path, name: str) -> tuple[str, ...]:
    """A remark about negatives that a split is published with."""
    path = folder / f"{name}.test.negative"
    if not path.is_file():
        return ()
    return (
        f"{path.name} is not used: all items are ranked; with run.sampled_negatives=99 each test item is also ranked "
        "among 99 random ones",
    )
