"""Certificates and keys of a federation: an authority, the servers that it certifies, and the nodes' key pairs."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from perfedrec.core.address import parse_host
from perfedrec.core.errors import ConfigError, PerfedrecError, reason

CA, CERTIFICATE, KEY = "ca.crt", "server.pem", "server.key"
"""Names of the files in a folder of certificates; the authority's own key is ``ca.key``."""

LOCAL = ("localhost", "127.0.0.1", "::1")
"""The names that every machine has for itself."""


def make_certificates(folder: Path, names: Iterable[str] = (), days: int = 365) -> None:
    """Make an authority in ``folder``, unless there is one, and a server's certificate for ``names``: hosts, addresses.

    A second call renews the server's certificate under the same authority, so that nodes need no new file. Without
    ``names`` it is for those of the certificate that it replaces, or for this machine alone. It is valid for ``days``.
    Raises :class:`ConfigError` for a name that is not possible, and :class:`PerfedrecError` where the authority cannot
    be read.
    """
    alternatives = x509.SubjectAlternativeName(list(map(_host, tuple(names) or _names(folder / CERTIFICATE) or LOCAL)))
    folder.mkdir(parents=True, exist_ok=True)
    start = datetime.now(UTC) - timedelta(minutes=5)
    if not (folder / CA).exists():
        key, name = ec.generate_private_key(ec.SECP256R1()), _name("perfedrec federation")
        signing = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        authority = (
            _builder(name, name, key, start, 10 * days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(signing, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(folder / "ca.key", _private(key), secret=True)
        _write(folder / CA, authority.public_bytes(serialization.Encoding.PEM))
    try:
        authority = x509.load_pem_x509_certificate((folder / CA).read_bytes())
        signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else "one file is damaged"
        raise PerfedrecError(f"{folder}: the authority cannot be read ({why}); expected {CA} and ca.key") from None
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(_name("perfedrec coordinator"), authority.subject, key, start, days)
        .add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    _write(folder / KEY, _private(key), secret=True)
    _write(folder / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))


def checked(ca: Path, certificate: Path, key: Path) -> tuple[str, ...]:
    """The names that a server's ``certificate`` is for, once it has passed the checks that nodes make.

    A connection is made in memory, with the ``key`` on one side and the authority ``ca`` on the other. Raises
    :class:`ConfigError` where a file is missing, and where the certificate is out of date, is not from the authority,
    has no name, or does not belong to the key.
    """
    for path in (ca, certificate, key):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; make certificates with perfedrec federation certificates")
    renewal = f"renew it with perfedrec federation certificates {certificate.parent}"
    for path, remedy in (
        (ca, "make certificates in a new folder, and give the nodes its ca.crt"),
        (certificate, renewal),
    ):
        found = _read(path)
        if found.not_valid_after_utc <= datetime.now(UTC):
            raise ConfigError(f"{path}: has expired; {remedy}")
        if found.not_valid_before_utc > datetime.now(UTC):
            raise ConfigError(
                f"{path}: is valid from {found.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on; set the clock of this "
                f"machine, or {remedy}"
            )
    if not (names := _names(certificate)):
        raise ConfigError(f"{certificate}: is for no host; {renewal} --name HOST")
    try:
        _connect_in_memory(ca, certificate, key, names[0].replace("*", "any"))
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"{certificate}: nodes with {ca} do not trust it ({error.verify_message}); {renewal}"
        ) from None
    except (OSError, ValueError) as error:
        why = f"cannot be read as a private key ({reason(error)})"
        if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
            why = "is the key of another certificate"
        raise ConfigError(f"{key}: {why}; expected the key of {certificate}, without a password") from None
    return names


def end_of(path: Path) -> datetime:
    """When a certificate expires. Raises :class:`PerfedrecError` for another file."""
    return _read(path).not_valid_after_utc


def days_left(path: Path) -> float:
    """Days until a certificate expires; negative once it has. Raises :class:`PerfedrecError` for another file."""
    return (end_of(path) - datetime.now(UTC)) / timedelta(days=1)


def make_key(path: Path) -> None:
    """Make a node's key pair: the private key at ``path``, which only its owner can read, and the public key beside it,
    with ``.pub`` appended to the name.

    Raises :class:`PerfedrecError` where there is a key at ``path`` already, and where it cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    encoding = serialization.Encoding
    content = key.private_bytes(encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    public = key.public_key().public_bytes(encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content, secret=True)
        _write(path.with_name(path.name + ".pub"), public + b"\n")
    except OSError as error:
        raise PerfedrecError(
            f"{path}: cannot be written ({reason(error)}); expected a new file in a folder in which this user may write"
        ) from None


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _read(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        why = f"cannot be read ({reason(error)})" if isinstance(error, OSError) else "is no certificate"
        raise PerfedrecError(f"{path}: {why}; expected what perfedrec federation certificates wrote") from None


def _names(path: Path) -> tuple[str, ...]:
    """The names and addresses that a certificate is for; none where it cannot be read."""
    try:
        found = _read(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (PerfedrecError, ValueError, x509.ExtensionNotFound):
        return ()
    return tuple(str(each.value) for each in found if isinstance(each, x509.DNSName | x509.IPAddress))


def _host(text: str) -> x509.GeneralName:
    """A host as a certificate names it; ``*.`` before a domain stands for all hosts in it."""
    every, domain = ("*.", text[2:]) if text.startswith("*.") else ("", text)
    host = parse_host(domain, "--name")
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(every + host)


def _connect_in_memory(ca: Path, certificate: Path, key: Path, name: str) -> None:
    """Let a server and a client that calls it by ``name`` greet each other. Raises :class:`ssl.SSLError` where one of
    them would not."""

    def no_password() -> str:
        raise ValueError("it has a password")

    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(ca))
    ours.load_cert_chain(certificate, key, no_password)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    waiting = [theirs.wrap_bio(down, up, server_hostname=name), ours.wrap_bio(up, down, server_side=True)]
    while waiting:
        side = waiting.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(side)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, start: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, secret: bool = False) -> None:
    """Write a file. At no time can anybody but its owner read a secret one. A node's key is never overwritten."""
    if secret and path.suffix != ".key" and path.exists():
        raise PerfedrecError(f"{path}: exists already; expected a new file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600 if secret else 0o644)
    with open(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)
