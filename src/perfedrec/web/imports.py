"""Files that somebody brings into a node by a browser."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import polars as pl

from perfedrec.core.errors import DataError, PerfedrecError
from perfedrec.data import read_with_report
from perfedrec.data.interactions import encode
from perfedrec.data.roles import NoUserError

if TYPE_CHECKING:
    from perfedrec.federation.owner import Node

ATTRIBUTES = "user_attributes.csv"
"""A file that describes the users of another one, and comes together with it."""

WITH_OPTIONS = "import it with perfedrec node import and its options"


@dataclass(frozen=True)
class Brought:
    """What a file has brought: the number of ``things`` that are new for somebody, the ``people`` in the file by id,
    how many of them are ``new`` on the node, and how many things were ``skipped``, since the catalogue lacks them."""

    things: int
    people: list[str]
    new: int
    skipped: int


class NotImportedError(DataError):
    """A file that was not imported: the exact reason, and the ``key`` of a text in the section ``not_imported``."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(" ".join(reason.split()))
        self.key = key


def import_files(node: Node, files: Sequence[tuple[str, bytes]], user: str, skip_unknown: bool) -> Brought:
    """Import a file, its name and its content, as ``perfedrec node import`` does: completely or not at all. The users'
    attributes may come with it, as a second file ``user_attributes.csv``. A file that names no users has the things of
    the ``user`` who looks at the page.

    Raises :class:`NotImportedError` for a file that cannot be read, and for unknown items without ``skip_unknown``.
    """
    from perfedrec.federation.offline import import_file
    from perfedrec.runtimes.node import Store

    named = {PurePosixPath(name.replace("\\", "/")).name or "file": content for name, content in files}
    mains = [name for name in named if name != ATTRIBUTES]
    if len(mains) != 1:
        found = ", ".join(mains) or "none"
        what = f"expected one file of interactions, and {ATTRIBUTES} beside it at most; found {found}"
        raise NotImportedError("one_file", what)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in named.items():
            (Path(folder) / name).write_bytes(content)
        key = "unreadable"
        try:
            frame = _read(Path(folder) / mains[0], user)
            with Store.open(node.path) as store:
                known = encode(frame["item"], store.item_ids) >= 0
                key = "not_stored" if skip_unknown or known.all() else "unknown"
                new, things, skipped, _ = import_file(store, Path(folder) / mains[0], frame, skip_unknown)
        except PerfedrecError as error:
            said = str(error).replace(f"{folder}/", "").replace(str(node.path), node.path.name)
            said = said.replace("--skip-unknown", "the tick that leaves others out")
            said = re.sub(r"(see --format|name them with --columns).*", WITH_OPTIONS, said)
            raise NotImportedError(key, said) from None
    people = frame.filter(known)["user"].cast(pl.String).unique(maintain_order=True).to_list()
    return Brought(things, people, new, skipped)


def _read(file: Path, user: str) -> pl.DataFrame:
    try:
        return read_with_report(file, "auto", held_out=True)[0]
    except NoUserError:
        if not user.strip():
            raise
        return read_with_report(file, "auto", held_out=True, user=user)[0]
