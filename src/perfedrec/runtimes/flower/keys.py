"""Keys of nodes, as files."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from perfedrec.core.errors import PerfedrecError, reason


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key of a node or of the operator, from an OpenSSH or PEM file. Raises :class:`PerfedrecError` for any
    other file."""
    content = _content(path, "private", "the file without .pub")
    load = serialization.load_ssh_private_key if b"OPENSSH" in content else serialization.load_pem_private_key
    try:
        key = load(content, None)
    except TypeError:  # both loaders say so that a password is missing
        raise PerfedrecError(
            f"{path}: has a password; expected a private key without one (ssh-keygen -p -f {path} takes it away)"
        ) from None
    except ValueError:
        raise PerfedrecError(
            f"{path}: is no private key; expected what perfedrec federation key wrote, the file without .pub"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PerfedrecError(f"{path}: expected a private key on a NIST curve, as ssh-keygen -t ecdsa makes it")
    return key


def public_key(path: Path) -> bytes:
    """The public key of a node in PEM, from an OpenSSH or PEM file. Raises :class:`PerfedrecError` for any other
    file."""
    content = _content(path, "public", "the file .pub")
    load = serialization.load_pem_public_key if b"BEGIN" in content else serialization.load_ssh_public_key
    try:
        key = load(content)
    except (ValueError, UnsupportedAlgorithm):
        what = "a private key, which belongs to its owner alone" if b"PRIVATE KEY" in content else "no public key"
        raise PerfedrecError(
            f"{path}: is {what}; expected what perfedrec federation key wrote, the file .pub"
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise PerfedrecError(f"{path}: expected a public key on a NIST curve, as ssh-keygen -t ecdsa makes it")
    return public_key_to_bytes(key)


def _content(path: Path, kind: str, which: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PerfedrecError(
            f"{path}: cannot be read ({reason(error)}); expected a {kind} key, as perfedrec federation key wrote it: "
            f"{which}"
        ) from None
