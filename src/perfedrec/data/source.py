"""One entrance to all data: a specification on the command line becomes a data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from perfedrec.core.errors import DataError
from perfedrec.data.dataset import Dataset
from perfedrec.data.formats import check_name
from perfedrec.data.interactions import Interactions
from perfedrec.data.split import from_files, split
from perfedrec.data.synthetic import synthetic

SUFFIXES = (".txt", ".csv", ".tsv", ".parquet", ".inter")
SYNTHETIC_KEYS = {
    "users": int,
    "items": int,
    "clusters": int,
    "interactions_per_user": float,
    "seed": int,
    "strength": float,
}


def load(
    spec: str | Path,
    *,
    format: str = "auto",
    split_how: str = "leave-one-out",
    order: str = "auto",
    seed: int = 0,
) -> Dataset:
    text = str(spec)
    if text == "synthetic" or text.startswith("synthetic:"):
        return _synthetic(text, split_how, order, seed)
    path = Path(spec)
    if path.is_dir():
        train, valid, test = (_part(path, part) for part in ("train", "valid", "test"))
        return from_files(train, valid, test, format)
    return split(Interactions.from_file(path, format), split_how, order, seed=seed)


def _part(folder: Path, part: str) -> Path:
    found = [folder / (part + suffix) for suffix in SUFFIXES if (folder / (part + suffix)).is_file()]
    if len(found) != 1:
        raise DataError(f"{folder}: expected one of {', '.join(part + suffix for suffix in SUFFIXES)}")
    return found[0]


def _synthetic(spec: str, how: str, order: str, seed: int) -> Dataset:
    chosen: dict[str, float] = {}
    for setting in filter(None, spec.partition(":")[2].split(",")):
        key, _, value = setting.partition("=")
        check_name(key.strip(), tuple(SYNTHETIC_KEYS), "setting of synthetic data")
        try:
            chosen[key.strip()] = SYNTHETIC_KEYS[key.strip()](value)
        except ValueError:
            raise DataError(f"synthetic data: {key.strip()} needs a number, got {value!r}") from None
    interactions, truth = synthetic(**chosen)  # type: ignore[arg-type]
    data = split(interactions, how, "time" if order == "auto" else order, seed=seed, name=spec)
    return replace(data, truth=truth.take(data.train.user_ids, data.train.item_ids))
