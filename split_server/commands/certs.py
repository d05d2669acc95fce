"""The subcommand ``split-server certs``: what ``serve --certs`` needs on a network."""

from __future__ import annotations

import datetime
import ipaddress
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protocol.errors import InvalidField
from split_model.files import write_durably
from split_server.runtime.process import private_files
from split_server.settings import CA_FILE, CERT_FILE, JOIN_TOKEN_FILE, KEY_FILE

# Imported in functions: the package is not among the first words of a command.
if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_CA_KEY_FILE = "ca-key.pem"

_PRIVATE = 0o600

_HERE = ("localhost", "127.0.0.1", "::1")  # for the operator's commands on the server itself

_CA_DAYS, _SERVER_DAYS = 3650, 825  # longer certificates of servers are refused by some clients

_MAX_NAME = 64  # characters of a common name


def certs(
    host: Annotated[
        list[str], typer.Option(help="Name or address of the server; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
) -> None:
    """Make a certificate authority, a certificate of this server, and a join token.

    A second call replaces the server's certificate alone: devices keep what they have.
    """
    with private_files():
        authority, key = _open_authority(out)
        _write_certificate(out, [*host, *_HERE], authority, key)
        if not (out / JOIN_TOKEN_FILE).exists():
            _write(out / JOIN_TOKEN_FILE, f"{secrets.token_urlsafe(24)}\n".encode())
    typer.echo(f"{out}: certificate of {', '.join(host)}, and a join token")
    typer.echo(f"server:  split-server serve --host 0.0.0.0 --certs {out}")
    typer.echo(
        f"devices: copy {CA_FILE} and {JOIN_TOKEN_FILE} to them, and add "
        f"--ca-file {CA_FILE} --join-token-file {JOIN_TOKEN_FILE}"
    )


def _open_authority(out: Path) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    """Return certificate and key of the folder's authority, made at the first call.

    Raises:
        InvalidField: the files are no certificate and key.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if not (out / CA_FILE).exists() and not (out / _CA_KEY_FILE).exists():
        return _make_authority(out)
    try:
        certificate = x509.load_pem_x509_certificate((out / CA_FILE).read_bytes())
        key = load_pem_private_key((out / _CA_KEY_FILE).read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidField(
            f"the folder has no usable authority ({error})",
            field="out",
            value=str(out),
            hint=f"restore {CA_FILE} and {_CA_KEY_FILE}, or choose an empty folder",
        ) from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise InvalidField(
            "the authority's key is of another kind", field="out", value=str(out / _CA_KEY_FILE)
        )
    return certificate, key


def _make_authority(out: Path) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("SFPrompt authority")
    usage = _usage(signs_certificates=True)
    certificate = _sign(
        _builder(name, name, key, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True),
        key,
        key,
    )
    _write_key(out / _CA_KEY_FILE, key)
    _write_pem(out / CA_FILE, certificate)
    return certificate, key


def _write_certificate(
    out: Path, hosts: list[str], authority: x509.Certificate, authority_key: EllipticCurvePrivateKey
) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    names = [_alternative_name(host) for host in dict.fromkeys(hosts)]
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _sign(
        _builder(_name(hosts[0]), authority.subject, key, _SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        ),
        key,
        authority_key,
    )
    _write_key(out / KEY_FILE, key)
    _write_pem(out / CERT_FILE, certificate)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _sign(
    builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey, signer: EllipticCurvePrivateKey
) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256

    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    return (
        builder.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        )
        .add_extension(authority, critical=False)
        .sign(signer, SHA256())
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_name(host: str) -> x509.GeneralName:
    """Return a host's name or address as the certificate has it.

    Raises:
        InvalidField: it is neither.
    """
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    is_name = host.isascii() and host and not set(host) & set(" /:@")
    if not is_name or len(host) > 253:
        raise InvalidField(
            "a host is a name or an address, without scheme and port",
            field="host",
            value=host,
            hint="for example --host gpu-node or --host 10.0.0.5",
        )
    return x509.DNSName(host)


def _name(text: str) -> x509.Name:
    from cryptography import x509

    attribute = x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, text[:_MAX_NAME])
    return x509.Name([attribute])


def _write_key(path: Path, key: EllipticCurvePrivateKey) -> None:
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _write_pem(path: Path, certificate: x509.Certificate) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding

    _write(path, certificate.public_bytes(Encoding.PEM))


def _write(path: Path, content: bytes) -> None:
    write_durably(path, content, mode=_PRIVATE)
