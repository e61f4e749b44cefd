"""The secret files that nodes and the neighbourhood service receive when they are registered. Only their owners may
read them.

The person who makes these files is trusted not to keep them: with all of them, everything that is sealed can be opened.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from perfedrec.core.errors import ConfigError, reason
from perfedrec.runtimes.flower import Bundle, public_of

BUNDLE, KEYS, SERVICE = "node.bundle", "service.keys", "service"
"""Names of the node's file, of the service's file, and of the service itself among keys and folders."""


@dataclass(frozen=True)
class ServiceKeys:
    """The service's ``private`` key, and the public key that all ``nodes`` have in common [32 bytes each]."""

    private: bytes = field(repr=False)
    nodes: bytes


def deal(nodes: Path, names: Iterable[str], service: Path) -> None:
    """Write a bundle into the folder ``nodes/NAME`` of each name, and the service's keys into the folder ``service``.

    If there is a bundle under ``nodes`` already, new bundles get its secret, and the service's keys stay as they are.
    Raises :class:`ConfigError` for a name that is in use, and where the service has keys but no bundle is left.
    """
    keys, targets = service / KEYS, [nodes / name / BUNDLE for name in names]
    for target in targets:
        if target.parent.name == SERVICE or target.exists():
            raise ConfigError(f"{target.parent.name} is taken already; expected names of new nodes")
    if dealt := sorted(nodes.glob(f"*/{BUNDLE}")):
        first = read_bundle(dealt[0])
        secret, public = first.secret, first.service
    elif keys.exists():
        raise ConfigError(
            f"{nodes}: has no {BUNDLE} from which those of new nodes could be made; expected that of an old node"
        )
    else:
        secret, private = secrets.token_bytes(32), secrets.token_bytes(32)
        public = public_of(private)
        _write(keys, {"private": private, "nodes": public_of(Bundle(secret, public, b"").common)})
    for target in targets:
        _write(target, {"secret": secret, "service": public, "own": secrets.token_bytes(32)})


def read_bundle(path: Path) -> Bundle:
    """A node's bundle. Raises :class:`ConfigError` where it cannot be read."""
    return Bundle(**_read(path, ("secret", "service", "own"), "a node's bundle"))


def read_keys(path: Path) -> ServiceKeys:
    """The service's keys. Raises :class:`ConfigError` where they cannot be read."""
    return ServiceKeys(**_read(path, ("private", "nodes"), "the keys of a neighbourhood service"))


def _read(path: Path, names: tuple[str, ...], what: str) -> dict[str, bytes]:
    try:
        tree = json.loads(path.read_bytes())
        values = {name: bytes.fromhex(tree.get(name, "")) for name in names}
        if tree.keys() != values.keys() or any(len(value) != 32 for value in values.values()):
            raise ValueError(f"it should have {', '.join(names)}, 32 bytes each")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)}); expected {what}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: is not {what} ({reason(error)}); make some with perfedrec federation bundles"
        ) from None
    return values


def _write(path: Path, values: Mapping[str, bytes]) -> None:
    """Write a new file. From its first byte on, only its owner can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump({name: value.hex() for name, value in values.items()}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
