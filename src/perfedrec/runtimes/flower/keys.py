"""Keys of nodes, as files."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from perfedrec.core.errors import PerfedrecError


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key of a node, from an OpenSSH or PEM file. Raises :class:`PerfedrecError` for any other file."""
    try:
        content = path.read_bytes()
        load = serialization.load_ssh_private_key if b"OPENSSH" in content else serialization.load_pem_private_key
        key = load(content, None)
    except OSError as error:
        raise PerfedrecError(f"{path}: cannot be read ({error.strerror}); expected a private key") from None
    except (ValueError, TypeError):
        raise PerfedrecError(
            f"{path}: cannot be read as a private key; expected what perfedrec federation key wrote, without .pub"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PerfedrecError(f"{path}: expected a private key on a NIST curve, as ssh-keygen -t ecdsa makes it")
    return key


def public_key(path: Path) -> bytes:
    """The public key of a node in PEM, from an OpenSSH or PEM file. Raises :class:`PerfedrecError` for any other
    file."""
    try:
        content = path.read_bytes()
        load = serialization.load_pem_public_key if b"BEGIN" in content else serialization.load_ssh_public_key
        key = load(content)
    except (OSError, ValueError) as error:
        raise PerfedrecError(
            f"{path}: cannot be read as a public key ({error}); expected a file .pub of perfedrec federation key"
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise PerfedrecError(f"{path}: expected a public key on a NIST curve, as ssh-keygen -t ecdsa makes it")
    return public_key_to_bytes(key)
