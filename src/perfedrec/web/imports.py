"""Files that somebody brings into a node by a browser."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from perfedrec.core.errors import DataError, PerfedrecError
from perfedrec.data import read_with_report

if TYPE_CHECKING:
    from perfedrec.federation.owner import Node

ATTRIBUTES = "user_attributes.csv"
"""A file that describes the users of another one, and comes together with it."""


def import_files(node: Node, files: Sequence[tuple[str, bytes]], skip_unknown: bool) -> tuple[int, int, int]:
    """Import a file, its name and its content, as ``perfedrec node import`` does: completely or not at all. The users'
    attributes may come with it, as a second file ``user_attributes.csv``.

    Returns the numbers of new interactions, of users in the file, and of interactions that were left out because their
    items are not in the catalogue, which needs ``skip_unknown``. Raises :class:`DataError` for a file that cannot
    be read, and for unknown items.
    """
    named = {PurePosixPath(name.replace("\\", "/")).name or "file": content for name, content in files}
    mains = [name for name in named if name != ATTRIBUTES]
    if len(mains) != 1:
        found = ", ".join(mains) or "none"
        raise DataError(f"expected one file of interactions, and {ATTRIBUTES} beside it at most; found {found}")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in named.items():
            (Path(folder) / name).write_bytes(content)
        try:
            return _import(node, Path(folder) / mains[0], skip_unknown)
        except PerfedrecError as error:
            said = str(error).replace(f"{folder}/", "").replace(str(node.path), node.path.name)
            said = said.replace("--skip-unknown", "the tick that leaves others out")
            said = re.sub(r"see --format.*", "import it with perfedrec node import and its options", said)
            raise DataError(said) from None


def _import(node: Node, file: Path, skip_unknown: bool) -> tuple[int, int, int]:
    from perfedrec.federation.offline import import_file
    from perfedrec.runtimes.node import Store

    frame, _ = read_with_report(file, "auto", held_out=True)
    with Store.open(node.path) as store:
        _, things, skipped, _ = import_file(store, file, frame, skip_unknown)
    return things, frame["user"].n_unique(), skipped
