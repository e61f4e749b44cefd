"""The certificates of a coordinator are checked before it starts, as nodes check them."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from perfedrec.core.errors import ConfigError
from perfedrec.federation import certificates
from perfedrec.federation.certificates import checked, make_certificates


def check(ca: Path, server: Path, key: Path | None = None) -> tuple[str, ...]:
    """The names in a certificate, where the three files come from different folders."""
    return checked(ca / "ca.crt", server / "server.pem", (key or server) / "server.key")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ((), ("localhost", "127.0.0.1", "::1")),
        (("fed.example.org",), ("fed.example.org",)),
        (("*.example.org", "[2001:db8::7]"), ("*.example.org", "2001:db8::7")),
        (("föd.example.org", "10.0.0.7"), ("xn--fd-fka.example.org", "10.0.0.7")),
    ],
)
def test_a_certificate_is_for_the_names_that_it_was_made_for(
    tmp_path: Path, given: tuple[str, ...], names: tuple[str, ...]
) -> None:
    make_certificates(tmp_path, given)
    assert check(tmp_path, tmp_path) == names
    make_certificates(tmp_path)
    assert check(tmp_path, tmp_path) == names


@pytest.mark.parametrize("name", ["fed.example.org:18000", "https://fed.example.org", "a b", "", "*", "a.*.org"])
def test_what_is_no_host_is_in_no_certificate(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^--name .*: expected a name or an IP address and nothing else"):
        make_certificates(tmp_path / "new", [name])
    assert not (tmp_path / "new").exists()


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for each in (one, other):
        make_certificates(each)
    with pytest.raises(
        ConfigError, match=rf"^{other}/server.pem: nodes with {one}/ca.crt do not trust it \(.*; renew it"
    ):
        check(one, other)
    with pytest.raises(ConfigError, match=rf"^{other}/server.key: is the key of another .* key of {one}/server.pem"):
        check(one, one, other)
    (other / "server.key").unlink()
    with pytest.raises(ConfigError, match=r"server.key: no such file; make certificates with perfedrec federation"):
        check(one, one, other)


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    path = tmp_path / "server.key"
    key: Any = serialization.load_pem_private_key(path.read_bytes(), None)
    form, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(form, kind, serialization.BestAvailableEncryption(b"secret")))
    with pytest.raises(
        ConfigError, match=r"server.key: cannot be read as a private key \(it has a password\); expected"
    ):
        check(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("days", "message"),
    [
        (400, r"server.pem: has expired; renew it with perfedrec federation certificates"),
        (4000, r"ca.crt: has expired; make certificates in a new folder, and give the nodes its ca.crt"),
        (-1, r"ca.crt: is valid from .* UTC on; set the clock of this machine, or"),
    ],
)
def test_a_certificate_out_of_date_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, message: str
) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.now(tz) + datetime.timedelta(days=days)

    make_certificates(tmp_path)
    monkeypatch.setattr(certificates, "datetime", Clock)
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, tmp_path)


def test_a_certificate_without_names_is_refused(tmp_path: Path) -> None:
    """It has a common name, which clients have not looked at for years."""
    make_certificates(tmp_path)
    path = tmp_path / "server.pem"
    signer: Any = serialization.load_pem_private_key((tmp_path / "ca.key").read_bytes(), None)
    old = x509.load_pem_x509_certificate(path.read_bytes())
    new = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), old.serial_number)
    new = new.not_valid_before(old.not_valid_before_utc).not_valid_after(old.not_valid_after_utc)
    path.write_bytes(new.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    with pytest.raises(ConfigError, match=r"server.pem: is for no host; renew it with .* --name HOST$"):
        check(tmp_path, tmp_path)
