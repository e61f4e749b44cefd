"""Writing a data set as files that :func:`perfedrec.data.load` can read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import polars as pl

from perfedrec.core.errors import DataError, reason
from perfedrec.data.dataset import Attributes, Dataset, SplitReport
from perfedrec.data.formats import check_name
from perfedrec.data.interactions import Ids, id_series
from perfedrec.data.values import POSITION

SEQUENCE_POSITION = "sequence_position"
"""The name of the column with the places in the order of time. It is read again by this name."""

WRITABLE = ("csv", "parquet")
REPORT = "split.json"


def write(dataset: Dataset, folder: str | Path, format: str = "csv") -> Path:
    """Write train, valid and test to ``folder`` as "csv" or "parquet" (``format``), attributes as CSV, and a report of
    the split as ``split.json``.

    Where users are held out from training, what is known of them is written as new_users. The files have the ids of the
    data. Interactions that the split left out are not written. A data set that is loaded from the folder has the same
    fingerprint and the same report. The folder appears only when it is complete. Raises :class:`DataError` where the
    folder exists and is not empty, and where it cannot be written. Returns the folder.
    """
    check_name(format, WRITABLE, "format to write")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder}: exists already and is not an empty folder; nothing was written, expected a new folder"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({reason(error)})") from None
    try:
        for name in ("train", "valid", "test", "new_users"):
            if (part := getattr(dataset, name)) is None:
                continue
            frame = part.frame().rename({POSITION: SEQUENCE_POSITION}, strict=False)
            if format == "csv":
                frame.write_csv(scratch / f"{name}.csv")
            else:
                frame.write_parquet(scratch / f"{name}.parquet")
        stored = {"fingerprint": dataset.fingerprint, "report": dataset.notes.stored()}
        (scratch / REPORT).write_text(json.dumps(stored, indent=1), encoding="utf-8")
        write_attributes(scratch, "user", dataset.train.user_ids, dataset.user_attributes)
        write_attributes(scratch, "item", dataset.train.item_ids, dataset.item_attributes)
        scratch.chmod(0o755)  # mkdtemp makes a folder that only its owner can read
        if folder.exists():
            folder.rmdir()
        os.replace(scratch, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({reason(error)})") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def written_report(folder: Path, data: Dataset) -> SplitReport | None:
    """The report of the split that was written to ``folder`` with the ``data``.

    It is None where there is none, and where the files have changed since.
    """
    try:
        stored = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        return SplitReport.read(stored["report"]) if stored["fingerprint"] == data.fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_attributes(folder: Path, kind: str, ids: Ids, attributes: Attributes | None) -> None:
    """Write the encoded ``attributes`` of ``ids`` [n] to ``KIND_attributes.csv``; nothing where they are ``None``."""
    if attributes is not None:
        columns = {name: attributes.values[:, i] for i, name in enumerate(attributes.names)}
        pl.DataFrame({kind: id_series(ids), **columns}).write_csv(folder / f"{kind}_attributes.csv")
