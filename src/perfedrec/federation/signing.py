"""Signatures of certificates: the operator signs, and whoever has the operator's public key checks."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from perfedrec.core.errors import ConfigError
from perfedrec.runs.certificate import Certificate
from perfedrec.runtimes.flower import public_key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """The SHA-256 of a public key as ``ssh-keygen -l`` prints it."""
    encoding = serialization.Encoding
    content = key.public_bytes(encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(content.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def fingerprint_of(path: Path) -> str:
    """The fingerprint of the public key in a file. Raises :class:`PerfedrecError` where there is none."""
    return fingerprint(_public(path))


def sign(certificate: Certificate, key: ec.EllipticCurvePrivateKey) -> Certificate:
    """The certificate with the signature (ECDSA, SHA-256) of a private key, in place of any other one."""
    value = key.sign(certificate.signed, ec.ECDSA(hashes.SHA256())).hex()
    return replace(certificate, signature={"key": fingerprint(key.public_key()), "value": value})


def verified(path: Path, operator: Path) -> Certificate:
    """The certificate in the file ``path``, if it is whole and signed with the key whose public half is in the file
    ``operator``.

    Raises :class:`ConfigError` for any other, which says what is wrong.
    """
    found, key = Certificate.read_file(path), _public(operator)
    expected, given = fingerprint(key), found.signature
    if not given:
        raise ConfigError(
            f"{path}: is not signed; expected one that the operator has signed (perfedrec federation forget --sign)"
        )
    if given.get("key") != expected:
        raise ConfigError(
            f"{path}: is signed with another key, {given.get('key', 'which it does not name')!s:.60}; expected "
            f"{expected}, the key in {operator}"
        )
    try:
        key.verify(bytes.fromhex(given.get("value", "")), found.signed, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError, TypeError):
        raise ConfigError(
            f"{path}: was altered after it was signed, or not signed with {expected}; expected the file as the "
            "operator wrote it"
        ) from None
    return found


def _public(path: Path) -> ec.EllipticCurvePublicKey:
    key = serialization.load_pem_public_key(public_key(path))
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key
