"""Certificates and keys of a deployment: who the server is, and which clients may join."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from visiontrain.core.durable import replace_file
from visiontrain.core.errors import ConfigError

DAYS = 825
HERE = ("localhost", "127.0.0.1")
CA, CERTIFICATE, KEY, CLIENTS = "ca.crt", "server.crt", "server.key", "clients"
PUBLIC = ".pub"


def make_certificates(folder: Path, names: Sequence[str]) -> list[str]:
    """Write ca.crt, server.crt and server.key for a server that is reached under these names.

    The authority's own key is not kept: it has signed all it ever will.

    Returns:
        The names, and those that were added: the server's own programs reach it by them.

    Raises:
        ConfigError: there are some already.
    """
    hosts = [*dict.fromkeys([*names, *HERE])]
    if (folder / KEY).exists():
        raise ConfigError(f"keys: {folder / KEY} is there; remove it, or name another folder")
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "visiontrain federated")])
    root = _certificate(name, name, authority.public_key())
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    usage = dict.fromkeys(USAGES, False) | {"key_cert_sign": True, "crl_sign": True}
    signed = root.add_extension(x509.KeyUsage(**usage), critical=True).sign(
        authority, hashes.SHA384()
    )
    usage = dict.fromkeys(USAGES, False) | {"digital_signature": True}
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    made = _certificate(subject, name, server.public_key())
    for extension, critical in (
        (x509.SubjectAlternativeName([_named(host) for host in hosts]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.KeyUsage(**usage), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
    ):
        made = made.add_extension(extension, critical=critical)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CLIENTS).mkdir(exist_ok=True)
    (folder / CA).write_bytes(signed.public_bytes(Encoding.PEM))
    (folder / CERTIFICATE).write_bytes(
        made.sign(authority, hashes.SHA384()).public_bytes(Encoding.PEM)
    )
    _write_private(folder / KEY, _private(server, PrivateFormat.PKCS8))
    return hosts


USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _named(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def make_key(path: Path) -> Path:
    """Write a client's key to `path` and what the server is to know of it beside it.

    Returns:
        The file for the server.

    Raises:
        ConfigError: there is one already.
    """
    public = path.with_name(path.name + PUBLIC)
    if path.exists() or public.exists():
        raise ConfigError(f"key: {path} is there; a client keeps its key, or name another file")
    made = ec.generate_private_key(ec.SECP384R1())
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_private(path, _private(made, PrivateFormat.OpenSSH))
    public.write_bytes(made.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return public


def _private(key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def _write_private(path: Path, text: bytes) -> None:
    """Write a file that nobody else may read, at no time."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)


def pem_of(text: str) -> bytes:
    """Turn what a client's .pub holds into what Flower calls its key.

    Raises:
        ConfigError: it holds something else.
    """
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"key: no public key ({error}); take the .pub of a client") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError("key: of another kind; make it with `visiontrain federated key`")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def register(public: Path, folder: Path) -> Path:
    """Let a client join the runs of a server from its next start on.

    Args:
        public: what the client's key file has beside it.
        folder: of the server's keys.

    Returns:
        Where it lies now.

    Raises:
        ConfigError: it is no public key, or another client has the name or the key.
    """
    check_folder(folder)
    if not public.is_file():
        raise ConfigError(f"key: no file {public}; give the .pub that the client made")
    text = public.read_text()
    mine = pem_of(text)
    name = public.name.removesuffix(PUBLIC).removesuffix(".key")
    place = folder / CLIENTS / f"{name}{PUBLIC}"
    for known in registered(folder):
        if pem_of(known.read_text()) == mine:
            raise ConfigError(f"key: {public} is registered already, as {known.stem}")
    if place.exists():
        raise ConfigError(f"key: another client is called {place.stem}; rename {public}")
    replace_file(place, text.encode())
    return place


def check_folder(folder: Path) -> None:
    """Refuse a folder that lacks a server's certificates.

    Raises:
        ConfigError: it does.
    """
    for name in (CA, CERTIFICATE, KEY):
        if not (folder / name).is_file():
            raise ConfigError(
                f"keys: {folder / name} is missing; make it with "
                f"`visiontrain federated cert keys={folder} hosts=NAME`"
            )


def registered(folder: Path) -> list[Path]:
    """List the keys of the clients that may join, in the order of their names."""
    return sorted((folder / CLIENTS).glob(f"*{PUBLIC}"))
