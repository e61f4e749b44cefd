"""Checkpoints: safetensors for tensors, JSON for the rest; written atomically, and verified when they are read.

A checkpoint is a folder ``round-000050`` with one safetensors file for each record and a manifest. A record that grows
is stored in segments: a segment is written once, and later checkpoints have the same file under a name of their own (a
hard link), so that a checkpoint costs what changed, and each is complete. The manifest holds the SHA-256 digests of the
files, the scalars, the format version, and what the checkpoint belongs to: the fingerprint of the data and a digest of
the configuration. The folder is written under a temporary name, flushed to the disk and renamed, so that it is either
complete or absent. The last two checkpoints are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from perfedrec.core.algorithm import Algorithm
from perfedrec.core.errors import CheckpointError, ConfigError, reason
from perfedrec.core.records import Scalar, Segment, flatten

FORMAT = 6
READABLE = (2, 3, 4, 5, FORMAT)
"""Formats that can be read. In format 2 some fields of records have other names, which
:func:`perfedrec.core.records.unflatten` knows. Up to format 4 client states are those of all users; in format 5
they are what was written (:meth:`perfedrec.runtimes.population.Population.stored`). In format 6 a checkpoint of a
simulation has them in segments, and each segment in a file of its own."""

KEPT = 2
"""How many checkpoints of a run are kept."""

_MANIFEST = "checkpoint.json"

Records = dict[str, tuple[Any, dict[str, Scalar]]]
"""Records in their flat form: by name of the record, its tensors and its scalars, each by dotted field name. A record
that is stored in segments has a tuple of them in place of its tensors."""


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint in a ``folder``: its ``format``, its ``records``, the ``extra`` values beside them, and
    what it ``belongs`` to."""

    folder: Path
    format: int
    records: Records
    extra: dict[str, Any]
    belongs: dict[str, str]


def save(folder: Path, records: Mapping[str, Any], belongs: Mapping[str, str], extra: Mapping[str, Any]) -> None:
    """Write ``records`` by name to ``folder``, and replace what is there.

    A record is a dataclass of tensors and scalars, a mapping of tensors by name, or a tuple of segments. ``belongs``
    identifies the data and the configuration; :func:`load` compares it. ``extra`` is stored as JSON. Raises OSError
    where the disk is full, and leaves what was there.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, records, belongs, extra)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # A folder cannot be replaced in one step: the old one is renamed first and removed last.
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    temporary.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)
    for name, own in records.items():
        for place, segment in enumerate(own if isinstance(own, tuple) else ()):
            segment.file = folder / _of_segment(name, place)


def _write(folder: Path, records: Mapping[str, Any], belongs: Mapping[str, str], extra: Mapping[str, Any]) -> None:
    """Write the files of a checkpoint to an empty ``folder``."""
    manifest: dict[str, Any] = {"format": FORMAT, "belongs": dict(belongs), "extra": dict(extra), "records": {}}
    segments = {name: record for name, record in records.items() if isinstance(record, tuple)}
    for name, own in segments.items():
        digests = [_keep(segment, folder / _of_segment(name, place)) for place, segment in enumerate(own)]
        manifest["records"][name] = {"segments": digests, "scalars": {}}
    for name, record in records.items():
        if name in segments:
            continue
        tensors, scalars = (record, {}) if isinstance(record, Mapping) else flatten(record)
        path = folder / f"{name}.safetensors"  # written and read without a copy in memory: a model may be large
        save_tensors({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, path)
        _flush(path)
        manifest["records"][name] = {"sha256": _digest(path), "scalars": scalars}
    write_atomic(folder / _MANIFEST, json.dumps(manifest, indent=1).encode())


def save_tensors(tensors: dict[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """Write ``tensors`` to a file, with what is said ``about`` them. The file can be read by whom other new files can:
    safetensors 0.8 makes one that its owner alone can read.

    Raises OSError where the system does not let it. safetensors says so in an error of its own, which names the
    system's error in its text alone.
    """
    with path.open("wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    try:
        save_file(tensors, path, about)
        path.chmod(mode)
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None


def _of_segment(name: str, place: int) -> str:
    """The name of the file with a segment of a record."""
    return f"{name}-{place:04d}.safetensors"


def _keep(segment: Segment, path: Path) -> str:
    """Have a segment in the file ``path``, which is the file that it was stored in before, where there is one. Returns
    the digest of the content."""
    if segment.file is None or not segment.file.exists():
        save_tensors({name: tensor.contiguous().cpu() for name, tensor in segment.tensors.items()}, path)
        _flush(path)
        segment.digest = _digest(path)
        segment.tensors = load_file(path)  # which are read from the file when they are needed
    else:
        try:
            os.link(segment.file, path)
        except OSError:  # a disk without hard links
            shutil.copyfile(segment.file, path)
            _flush(path)
    segment.file = path
    return segment.digest


def load(folder: Path, belongs: Mapping[str, str] | None = None) -> Loaded:
    """Read and verify a checkpoint.

    Raises :class:`CheckpointError` where it is damaged, has another format, or differs in one of the entries of
    ``belongs``.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        form, theirs, stored = manifest["format"], manifest["belongs"], manifest["records"]
        extra = manifest["extra"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: damaged checkpoint: {_MANIFEST} cannot be read ({reason(error)})") from None
    if form not in READABLE:
        raise CheckpointError(f"{folder}: written in format {form}; expected format {' or '.join(map(str, READABLE))}")
    for what, expected in (belongs or {}).items():
        if theirs.get(what) != expected:
            other = (
                "data set than this run's; expected that of the run" if what == "data" else f"{what} than this run's"
            )
            raise CheckpointError(f"{folder}: foreign checkpoint: it was made with another {other}")
    records: Records = {}
    known: dict[str, Segment] = {}  # by digest: the best round has the first segments of the last one
    path = folder
    for name, entry in stored.items():
        try:
            if "segments" in entry:
                own = []
                for place, digest in enumerate(entry["segments"]):
                    path = folder / _of_segment(name, place)
                    if digest not in known:
                        known[digest] = Segment(_verified(path, digest), path, digest)
                    own.append(known[digest])
                records[name] = (tuple(own), entry["scalars"])
            else:
                path = folder / f"{name}.safetensors"
                records[name] = (_verified(path, entry["sha256"]), entry["scalars"])
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged checkpoint: {reason(error)}") from None
    return Loaded(folder, form, records, extra, theirs)


def _verified(path: Path, digest: str) -> dict[str, Tensor]:
    if _digest(path) != digest:
        raise CheckpointError(f"{path}: damaged checkpoint: its content does not match the recorded SHA-256")
    return load_file(path)


def check_phases(loaded: Loaded, algorithm: Algorithm[Any, Any, Any]) -> None:
    """Refuse to resume a run that played a phase which its ``algorithm`` no longer has.

    FedMF of 0.1.0 released item degrees under secure sums, in a phase before training. Such a run can be opened, but
    its rounds are counted in another way. Raises :class:`CheckpointError`.
    """
    if loaded.format < 4 and algorithm.protection.secure:
        raise CheckpointError(
            f"{loaded.folder}: made by a version before 0.3.0, which opened secure sums by item; expected it to be "
            "trained anew"
        )
    released = loaded.format == 2 and algorithm.protection.sums and "degrees" in loaded.records["state"][0]
    if released and all(phase.name != "degrees" for phase in algorithm.phases):
        raise CheckpointError(
            f"{loaded.folder}: made by 0.1.0, whose fedmf released item degrees in a phase of its own; "
            "expected it to be trained anew"
        )


def folders(root: Path) -> list[Path]:
    """The checkpoints under ``root``, newest first."""
    found = [path for path in root.glob("round-*") if path.is_dir()]
    return sorted(found, key=lambda path: path.name, reverse=True)


def folder_of(root: Path, number: int) -> Path:
    """The folder of the checkpoint after ``number`` rounds."""
    return root / f"round-{number:06d}"


def number_of(folder: Path) -> int:
    """The number of rounds after which the checkpoint in a ``folder`` was written."""
    return int(folder.name.rpartition("-")[2])


def prune(root: Path) -> None:
    """Remove all but the last :data:`KEPT` checkpoints, and incomplete ones that a killed process left."""
    for old in (*folders(root)[KEPT:], *root.glob(".round-*")):
        shutil.rmtree(old, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raise :class:`ConfigError` where a ``folder``, which may not exist yet, cannot be written to."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise ConfigError(f"{folder}: cannot be written to, because {there} is a file; expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot be written to, because {there} is not writable; expected another folder")


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is either complete or absent, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _flush(path.parent)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Bring a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
