"""Backbones of one run are cached for the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfprompt_bench.run.preflight import shared_backbones


@pytest.fixture(params=["links", "no links"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFPROMPT_CACHE", str(tmp_path / "cache"))
    if request.param == "no links":

        def refuse(place: Path, target: Path) -> None:
            raise PermissionError(place)

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    return tmp_path / "cache" / "backbones"


def test_what_one_server_makes_the_next_one_finds(cache: Path, tmp_path: Path) -> None:
    with shared_backbones(tmp_path / "one"):
        first = tmp_path / "one" / "backbones"
        first.mkdir(parents=True)
        (first / "vit.safetensors").write_bytes(b"weights")
        (first / "vit.json").write_text("{}")
        (first / ".vit.safetensors.x7").write_bytes(b"half")
    assert {file.name for file in cache.iterdir()} == {"vit.safetensors", "vit.json"}
    with shared_backbones(tmp_path / "two"):
        second = tmp_path / "two" / "backbones"
        assert (second / "vit.safetensors").read_bytes() == b"weights"
        (second / "other.whl").write_bytes(b"wheel")
    assert (cache / "other.whl").read_bytes() == b"wheel"
    assert not (tmp_path / "one" / "backbones" / "other.whl").exists()


def test_a_run_that_fails_keeps_what_it_had_made(cache: Path, tmp_path: Path) -> None:
    def fail_after(name: str) -> None:
        (tmp_path / "one" / "backbones").mkdir(parents=True)
        (tmp_path / "one" / "backbones" / name).write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), shared_backbones(tmp_path / "one"):
        fail_after("vit.json")
    assert (cache / "vit.json").is_file()
