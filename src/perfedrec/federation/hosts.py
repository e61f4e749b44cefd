"""Which node hosts which users of a run: the coordinator writes it down, so that no other node can ask for them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from perfedrec.core.errors import CheckpointError, reason
from perfedrec.federation.parts import Parts
from perfedrec.runs.folder import RunFolder

NAME = "hosts.json"
"""The file of a coordinator's run: by name of each node the identities of its users."""


class Hosts:
    """The nodes of the users of the run in a ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def add(self, users: Mapping[str, Tensor]) -> None:
        """Write down the identities [k] of the ``users`` of each node, by its name. A user stays with the node that was
        the first to host it: a node that claims users of another one, which is away, does not get them."""
        known = self._read()
        nodes = {identity: node for node, identities in known.items() for identity in identities}
        for node, identities in sorted(users.items()):
            new = [each for each in identities.tolist() if nodes.setdefault(each, node) == node]
            known[node] = sorted({*known.get(node, ()), *new})
        RunFolder(self.path.parent).write(NAME, (json.dumps(known) + "\n").encode())

    def of(self, identity: int) -> str | None:
        """The name of the node that hosts a user; ``None`` where nobody has written it down. For a run of an older
        version the kept parts of nodes say it, where there are some. Raises :class:`CheckpointError` for a damaged
        file."""
        for node, identities in self._read().items():
            if identity in identities:
                return node
        parts = Parts(self.path.parent)
        found = (each.node for each in parts.all() if bool(torch.isin(identity, each.users)))
        return next(found, None)

    def nodes(self, without: Collection[int] = ()) -> list[str]:
        """The names of the nodes that host a user who is not among those ``without`` whom a run was made. Where nobody
        has written it down, they are those with kept parts."""
        left = [node for node, identities in sorted(self._read().items()) if set(identities) - set(without)]
        return left or Parts(self.path.parent).nodes()

    def _read(self) -> dict[str, list[int]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(node): [int(each) for each in identities] for node, identities in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({reason(error)}); expected the users of each node, as perfedrec serve "
                "wrote them"
            ) from None
