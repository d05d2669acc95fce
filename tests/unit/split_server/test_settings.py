"""Settings: where they come from, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from protocol.errors import InvalidField
from split_server.cli import app
from split_server.runtime.device import choose_placement
from split_server.runtime.process import keep_large_buffers
from split_server.settings import DEFAULT_PORT, ServerSettings, load_settings
from split_server.storage.data_dir import lock_data_dir


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPLIT_SERVER_PORT", raising=False)


def written(folder: Path, text: str) -> Path:
    path = folder / "server.toml"
    path.write_text(text)
    return path


def test_flags_override_the_environment_which_overrides_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, 'port = 1\nhost = "from-file"\nqueue_mib = 7\n')
    monkeypatch.setenv("SPLIT_SERVER_PORT", "2")
    monkeypatch.setenv("SPLIT_SERVER_HOST", "from-environment")
    monkeypatch.setenv("SPLIT_SERVER_INSECURE", "true")  # others could reach such a host
    settings = load_settings({"port": 3, "host": None}, file)
    assert (settings.port, settings.host, settings.queue_mib) == (3, "from-environment", 7)
    assert load_settings().max_frame_mib == 256
    monkeypatch.delenv("SPLIT_SERVER_PORT")
    assert load_settings().port == DEFAULT_PORT


@pytest.mark.parametrize(
    ("flags", "field", "words"),
    [
        ({"port": 70_000}, "port", ["port", "65535", "70000", "--port"]),
        ({"device": "tpu"}, "device", ["device", "'cuda'", "tpu"]),
        ({"engine_memory_mib": 0}, "engine_memory_mib", ["--engine-memory-mib", "1"]),
        ({"step_timeout_s": -1}, "step_timeout_s", ["step_timeout_s", "-1"]),
        ({"tls_cert": "c.pem"}, "settings", ["tls_cert", "tls_key"]),
        (
            {"join_token": "same-token", "operator_token": "same-token"},
            "settings",
            ["join_token", "operator_token"],
        ),
    ],
)
def test_a_wrong_flag_is_named(flags: dict[str, object], field: str, words: list[str]) -> None:
    with pytest.raises(InvalidField) as caught:
        load_settings(flags)
    assert caught.value.field == field
    for word in words:
        assert word in str(caught.value)


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLIT_SERVER_PORT", "many")
    with pytest.raises(InvalidField, match="SPLIT_SERVER_PORT"):
        load_settings()


def test_a_wrong_or_unknown_setting_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match=r"server\.toml"):
        load_settings({}, written(tmp_path, 'log_level = "loud"'))
    with pytest.raises(InvalidField, match="no setting prot"):
        load_settings({}, written(tmp_path, "prot = 1"))
    with pytest.raises(InvalidField, match="TOML"):
        load_settings({}, written(tmp_path, "port ="))
    with pytest.raises(InvalidField, match="cannot be read"):
        load_settings({}, tmp_path / "none.toml")


def test_a_token_is_not_shown() -> None:
    with pytest.raises(InvalidField) as caught:
        load_settings({"operator_token": "hunter2"})
    assert caught.value.field == "operator_token"
    assert "hunter2" not in str(caught.value)
    assert "hunter-long" not in repr(load_settings({"operator_token": "hunter-long"}))


def test_placements() -> None:
    placement = choose_placement("cpu")
    assert (placement.device.type, placement.dtype, placement.dtype_name) == (
        "cpu",
        torch.float32,
        "float32",
    )
    half = choose_placement("cpu", "bfloat16")
    assert (half.dtype, half.flowing) == (torch.bfloat16, torch.float32)
    for device, dtype, field in (("tpu", "auto", "device"), ("cpu", "int8", "dtype")):
        with pytest.raises(InvalidField) as caught:
            choose_placement(device, dtype)
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("cuda", "bfloat16", "mps", "expected"),
    [
        (True, True, True, ("cuda", torch.bfloat16)),
        (True, False, False, ("cuda", torch.float32)),
        (False, False, True, ("mps", torch.float32)),
        (False, False, False, ("cpu", torch.float32)),
    ],
)
def test_the_fastest_available_device_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    cuda: bool,
    bfloat16: bool,
    mps: bool,
    expected: tuple[str, torch.dtype],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    placement = choose_placement()
    assert (placement.device.type, placement.dtype) == expected
    assert choose_placement("cpu").device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_an_unavailable_device_is_named() -> None:
    with pytest.raises(InvalidField, match="finds no such device"):
        choose_placement("cuda")


def test_the_allocator_is_configured_without_an_error() -> None:
    assert keep_large_buffers() in (True, False)


@pytest.mark.parametrize(
    "command", ["serve", "certs", "create-run", "runs", "watch", "cancel", "results", "export"]
)
def test_every_command_has_help(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "Usage" in shown.output


def test_the_help_of_serve_names_every_source_and_gives_examples() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for words in ("SPLIT_SERVER_PORT", "TOML", "--device", "split-server serve --host"):
        assert words in shown


def test_the_help_of_serve_has_every_setting_with_its_default() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300"}).output
    for name, setting in ServerSettings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in shown
        if setting.default is not None:
            assert f"Default: {setting.default}." in shown


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["create-run", "--set", "name=a", "--set", "name.x=1"], "set"),
        (["runs", "--url", "gpu-node:8500"], "url"),
        (["runs", "--url", "https://gpu-node:8500", "--ca-file", "no/such.pem"], "ca_file"),
        (["serve", "--tls-cert", "no/such.pem", "--tls-key", "no/such.pem"], "settings"),
    ],
)
def test_a_wrong_option_is_named(words: list[str], field: str) -> None:
    shown = CliRunner().invoke(app, words)
    assert isinstance(shown.exception, InvalidField)
    assert shown.exception.field == field


def test_a_folder_in_use_is_a_typed_error(tmp_path: Path) -> None:
    with lock_data_dir(tmp_path):
        shown = CliRunner().invoke(app, ["serve", "--port", "0", "--data-dir", str(tmp_path)])
    assert isinstance(shown.exception, InvalidField)
    assert shown.exception.field == "data_dir"


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("port = 1234", encoding="utf-8-sig")
    assert load_settings(file=file).port == 1234


def test_the_nearest_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="did you mean max_connections"):
        load_settings(file=written(tmp_path, "max_connection = 5"))


def test_a_misspelt_variable_is_refused_and_a_foreign_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPLIT_SERVER_SERVICE_HOST", "10.0.0.1")  # Kubernetes sets such ones
    load_settings()
    monkeypatch.setenv("SPLIT_SERVER_JOIN_TOKN", "secret-token")
    with pytest.raises(InvalidField, match="did you mean SPLIT_SERVER_JOIN_TOKEN") as caught:
        load_settings()
    assert "secret" not in str(caught.value)
