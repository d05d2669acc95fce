"""Writes `docs/settings.md` from the settings classes: `python -m tools.settings_page`.

The classes' JSON schemas carry all that the page needs: names, types, bounds, defaults and
descriptions. Nested classes become sections; a union with a discriminator becomes one section for
each of its members.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from protocol.codec_names import FLOAT_CODECS, LOSSLESS_SUFFIX
from protocol.plan import RunPlan
from protocol.presets import FORMS, over_form
from split_server.settings import ENV_PREFIX, ServerSettings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

_INTRODUCTION = f"""\
# Settings

<!-- Written by `make docs` from the classes' descriptions; edits here are lost. -->

A run's settings are the TOML file that `split-server create-run --config` reads;
`run.example.toml` is one. The server's settings are flags of `split-server serve`, environment
variables with the prefix `{ENV_PREFIX}`, or lines of the TOML file that `serve --config` reads, in
this order of precedence. Commands of the device have flags only; `edge-client join --help` lists
them.
"""

_CODECS = f"""\
## Codecs

A setting that names a codec takes one of the names below. A letter behind a colon stands for a
parameter; `{LOSSLESS_SUFFIX}` behind a name compresses the result without loss.
[SPEC.md](../protocol/SPEC.md) defines each codec and its error bound.
"""

Schema = Mapping[str, Any]


def run_settings() -> type[BaseModel]:
    """The class that validates the user's file of run settings."""
    if importlib.util.find_spec("protocol.settings") is None:
        return RunPlan
    found: type[BaseModel] = importlib.import_module("protocol.settings").RunSettings
    return found


def render() -> str:
    """The whole page as Markdown."""
    run, server = run_settings().model_json_schema(), ServerSettings.model_json_schema()
    blocks = [_INTRODUCTION, "## Run"]
    for path, part in _sections(run, run["$defs"], ()):
        blocks.append(_table(path, part, run["$defs"]))
    blocks += ["## Server", _table((), server, server.get("$defs", {}))]
    blocks += [_CODECS, ", ".join(f"`{name}`" for name in FLOAT_CODECS)]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def _sections(
    schema: Schema, definitions: Schema, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Schema]]:
    """Every table of the file with its dotted path; what is nested comes after what holds it."""
    yield path, schema
    for name, field in schema["properties"].items():
        for part in _nested(field, definitions):
            yield from _sections(part, definitions, (*path, name))


def _nested(field: Schema, definitions: Schema) -> list[Schema]:
    """The tables that a field may hold; none where it is a plain value."""
    choices = [field, *field.get("oneOf", ()), *field.get("anyOf", ()), *field.get("allOf", ())]
    named = [choice["$ref"].rsplit("/", 1)[-1] for choice in choices if "$ref" in choice]
    return [definitions[name] for name in named if "properties" in definitions[name]]


def _table(path: tuple[str, ...], part: Schema, definitions: Schema) -> str:
    rows = [
        _row(path, name, field, definitions)
        for name, field in part["properties"].items()
        if not _nested(field, definitions)
    ]
    head = "| setting | value | default | |\n|---|---|---|---|"
    return "\n\n".join(filter(None, (_title(path, part), "\n".join([head, *rows]))))


def _title(path: tuple[str, ...], part: Schema) -> str:
    if not path:
        return ""
    kinds = [
        f"{name} = {json.dumps(field['const'])}"
        for name, field in part["properties"].items()
        if "const" in field
    ]
    title = f"### `[{'.'.join(path)}]`" + "".join(f" `{kind}`" for kind in kinds)
    summary = str(part.get("description", "")).split("\n\n")[0].replace("\n", " ")
    return f"{title}\n\n{summary}".strip()


def _row(path: tuple[str, ...], name: str, field: Schema, definitions: Schema) -> str:
    default = _default((*path, name), field)
    text = str(field.get("description", "")).replace("|", "\\|")
    return f"| `{name}` | {_value(field, definitions)} | {default} | {text} |"


def _default(path: tuple[str, ...], field: Schema) -> str:
    """The default of the default form, and that of the paper's where it differs."""
    if "default" not in field and "const" not in field:
        return "required"
    plain = field.get("default", field.get("const"))
    values = {form: _look_up(over_form(form, {}), path, plain) for form in FORMS}
    default = _shown(values.pop("default"))
    others = {form: _shown(value) for form, value in values.items()}
    extra = [f"{form}: {value}" for form, value in others.items() if value != default]
    return ", ".join([default, *extra])


def _look_up(values: Any, path: tuple[str, ...], plain: Any) -> Any:
    for name in path:
        if not isinstance(values, Mapping) or name not in values:
            return plain
        values = values[name]
    return values


def _shown(value: Any) -> str:
    return "none" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def _value(field: Schema, definitions: Schema) -> str:
    """The type, choices and bounds of a field in a few words."""
    if "$ref" in field:
        field = {**definitions[field["$ref"].rsplit("/", 1)[-1]], **field}
    if "anyOf" in field:
        choices = [choice for choice in field["anyOf"] if choice.get("type") != "null"]
        return " or ".join(_value(choice, definitions) for choice in choices)
    if "enum" in field or "const" in field:
        return ", ".join(f"`{choice}`" for choice in field.get("enum", [field.get("const")]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        return "list of " + _value(field.get("items", {}), definitions)
    if kind == "string":
        return "path" if field.get("format") == "path" else "text"
    return {"boolean": "true, false"}.get(kind, kind) + _bounds(field)


def _bounds(field: Schema) -> str:
    words = []
    for key, word in (
        ("minimum", "≥"),
        ("exclusiveMinimum", ">"),
        ("maximum", "≤"),
        ("exclusiveMaximum", "<"),
    ):
        if key in field:
            words.append(f"{word} {_number(field[key])}")
    return f", {', '.join(words)}" if words else ""


def _number(value: float) -> str:
    if value == 2**63:
        return "2^63"
    return f"{int(value):,}" if float(value).is_integer() else f"{value:g}"


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
