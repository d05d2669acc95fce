"""The example of docs/adding-a-method.md is a method."""

from __future__ import annotations

import re
import sys
import tomllib
import types
from pathlib import Path

import pytest

from protocol.errors import InvalidField
from protocol.messages import parse_message
from protocol.method import register
from protocol.settings import RunSettings

PAGE = (Path(__file__).parents[3] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[number]


def test_the_pages_example_is_a_method_in_under_forty_lines() -> None:
    source = block("python")
    assert len(source.splitlines()) <= 40
    module = types.ModuleType("my_package_settings")
    sys.modules[module.__name__] = module
    exec(compile(source, "adding-a-method.md", "exec"), module.__dict__)
    register(module.TailTuning)

    run = parse_message(RunSettings, tomllib.loads(block("toml", 1)))
    assert run.method.name == "tail-tuning"
    assert (run.plan.training.keep_fraction, run.plan.training.batch_size) == (0.3, 8)
    assert (run.plan.model.prompt_count, run.plan.model.tune) == (0, "tail")
    assert RunSettings.model_validate_json(run.model_dump_json()) == run
    with pytest.raises(InvalidField) as caught:
        parse_message(RunSettings, {"method": {"name": "tail-tuning", "keep_fraction": 2}})
    assert caught.value.field == "method.keep_fraction"


def test_the_page_names_the_entry_point_group() -> None:
    assert "sfprompt.methods" in tomllib.loads(block("toml"))["project"]["entry-points"]
