"""Certificates and tokens: what `split-server certs` makes, and what `serve` refuses without."""

from __future__ import annotations

import logging
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from protocol.errors import InvalidField
from protocol.tls import create_ssl_context
from split_server.address import Address, read_address, write_address
from split_server.cli import app
from split_server.settings import load_settings


def certs(out: Path, *hosts: str) -> str:
    words = [word for host in hosts for word in ("--host", host)]
    done = CliRunner().invoke(app, ["certs", *words, "--out", str(out)], catch_exceptions=False)
    return done.output


def test_all_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    shown = certs(tmp_path / "certs", "gpu-node", "10.0.0.5")
    names = {"ca.pem", "ca-key.pem", "cert.pem", "key.pem", "join.token"}
    assert {path.name for path in (tmp_path / "certs").iterdir()} == names
    for path in (tmp_path / "certs").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "certs").stat().st_mode) == 0o700
    assert "--ca-file ca.pem --join-token-file join.token" in shown


def shake_hands(certs: Path, ca_file: Path, name: str) -> None:
    """A whole TLS handshake in memory, with the client that the device uses."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certs / "cert.pem", certs / "key.pem")
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = create_ssl_context(ca_file).wrap_bio(back, there, server_hostname=name)
    server = serving.wrap_bio(there, back, server_side=True)
    for _ in range(3):
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


@pytest.mark.parametrize("trusted", ["ca.pem", "cert.pem"])
def test_a_device_trusts_the_server_under_each_of_its_names_and_no_other(
    tmp_path: Path, trusted: str
) -> None:
    certs(tmp_path, "gpu-node", "10.0.0.5")
    for name in ("gpu-node", "10.0.0.5", "localhost", "127.0.0.1"):
        shake_hands(tmp_path, tmp_path / trusted, name)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(tmp_path, tmp_path / trusted, "other-node")


def test_another_authority_is_not_trusted(tmp_path: Path) -> None:
    certs(tmp_path / "own", "gpu-node")
    certs(tmp_path / "other", "gpu-node")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path / "other", tmp_path / "own" / "ca.pem", "gpu-node")


def test_a_second_call_keeps_what_devices_have(tmp_path: Path) -> None:
    certs(tmp_path, "gpu-node")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    certs(tmp_path, "new-node")
    changed = {path.name for path in tmp_path.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"cert.pem", "key.pem"}
    shake_hands(tmp_path, tmp_path / "ca.pem", "new-node")


def test_a_server_certificate_signs_no_others(tmp_path: Path) -> None:
    certs(tmp_path, "gpu-node")
    certificate = x509.load_pem_x509_certificate((tmp_path / "cert.pem").read_bytes())
    limits = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (limits.value.ca, limits.critical) == (False, True)


@pytest.mark.parametrize("host", ["https://gpu-node", "gpu-node:8500", "", "a b", "ü"])
def test_what_is_no_host_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(InvalidField) as caught:
        certs(tmp_path, host)
    assert caught.value.field == "host"


def test_a_damaged_authority_is_named_and_stays(tmp_path: Path) -> None:
    certs(tmp_path, "gpu-node")
    (tmp_path / "ca-key.pem").write_text("damaged")
    with pytest.raises(InvalidField, match="no usable authority"):
        certs(tmp_path, "gpu-node")
    assert (tmp_path / "ca-key.pem").read_text() == "damaged"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "gpu-node", ""])
def test_the_server_does_not_listen_to_others_without_tls_and_a_join_token(
    tmp_path: Path, host: str
) -> None:
    certs(tmp_path, "gpu-node")
    pair = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    token = {"join_token_file": tmp_path / "join.token"}
    lacking: list[tuple[dict[str, object], str]] = [
        ({}, "lacks TLS and a join token"),
        (dict(pair), "lacks a join token"),
        (dict(token), "lacks TLS"),
    ]
    for given, words in lacking:
        with pytest.raises(InvalidField, match=words) as caught:
            load_settings({"host": host, **given})
        for advice in ("split-server certs --host NAME", "--certs certs", "--insecure"):
            assert advice in str(caught.value)
    assert load_settings({"host": host, **pair, **token}).exposed == []
    assert load_settings({"host": host, "certs": tmp_path}).exposed == []
    assert load_settings({"host": host, "insecure": True}).exposed == ["TLS", "a join token"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_on_loopback_nothing_is_required(host: str) -> None:
    assert load_settings({"host": host}).exposed == []


def test_an_insecure_server_says_so_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("split_server.app.serve_until_stopped", lambda *_: None)
    monkeypatch.setattr("split_server.commands.serve.set_up_logging", lambda _: None)
    words = ["serve", "--host", "0.0.0.0", "--insecure", "--data-dir", str(tmp_path)]
    with caplog.at_level(logging.WARNING, "split_server"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning == "insecure: others can reach 0.0.0.0, without TLS and a join token"


def test_tokens_come_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "join").write_text("  the-join-token\n")
    (tmp_path / "operator").write_text("the-operator\n")
    given = {
        "join_token_file": tmp_path / "join",
        "operator_token_file": str(tmp_path / "operator"),
    }
    settings = load_settings(given)
    assert settings.join_token is not None
    assert settings.operator_token is not None
    assert settings.join_token.get_secret_value() == "the-join-token"
    assert settings.operator_token.get_secret_value() == "the-operator"
    with pytest.raises(InvalidField, match="join_token or join_token_file"):
        load_settings({**given, "join_token": "another-token"})
    (tmp_path / "join").write_text("\n")
    with pytest.raises(InvalidField, match="empty"):
        load_settings(given)
    with pytest.raises(InvalidField, match="cannot be read"):
        load_settings({"join_token_file": tmp_path / "none"})
    monkeypatch.setenv("SPLIT_SERVER_OPERATOR_TOKEN_FILE", str(tmp_path / "operator"))
    assert load_settings().operator_token == settings.operator_token


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "https://127.0.0.1:99"),
        ("::", "https://[::1]:99"),
        ("gpu-node", "https://gpu-node:99"),
        ("10.0.0.5", "https://10.0.0.5:99"),
        ("fd00::5", "https://[fd00::5]:99"),
    ],
)
def test_the_operators_commands_find_the_server_of_a_data_folder(
    tmp_path: Path, host: str, url: str
) -> None:
    certs(tmp_path / "certs", "gpu-node")
    given = {"host": host, "port": 99, "certs": tmp_path / "certs", "data_dir": tmp_path}
    write_address(load_settings(given))
    assert read_address(tmp_path) == Address(url, tmp_path / "certs" / "cert.pem")


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '"x"'])
def test_without_an_address_the_default_is_used(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "address.json").write_text(text)
    assert read_address(tmp_path) == Address("http://127.0.0.1:8500", None)
