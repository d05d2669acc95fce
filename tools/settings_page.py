"""Writes `docs/settings.md` from the settings classes: `python -m tools.settings_page`.

The classes' JSON schemas carry all that the page needs: names, types, bounds, defaults and
descriptions. Nested classes become sections, and so does each installed method.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from protocol.codec_names import FLOAT_CODECS, LOSSLESS_SUFFIX
from protocol.method import MethodSettings, installed_method_names, method_class
from protocol.settings import RunSettings
from split_server.settings import ENV_PREFIX, ServerSettings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

_INTRODUCTION = f"""\
# Settings

<!-- Written by `make docs` from the classes' descriptions; edits here are lost. -->

A run's settings are the TOML file that `split-server create-run --config` reads;
`run.example.toml` is one. The server's settings are flags of `split-server serve`, environment
variables with the prefix `{ENV_PREFIX}`, or lines of the TOML file that `serve --config` reads, in
this order of precedence. `edge-client join --help` lists
the options of the device, some of which have a variable too.
"""

_CODECS = f"""\
## Codecs

A setting that names a codec takes one of the names below. A letter behind a colon stands for a
parameter; `{LOSSLESS_SUFFIX}` behind a name compresses the result without loss.
[SPEC.md](../protocol/SPEC.md) defines each codec and its error bound.
"""

_METHODS = """\
## Methods

`method.name` chooses a method; the other fields of `[method]` are the method's own. A method also
sets defaults in other tables, which the file overrides.
"""

Schema = Mapping[str, Any]


def render() -> str:
    """The whole page as Markdown."""
    server = ServerSettings.model_json_schema()
    blocks = [
        _INTRODUCTION,
        "## Run",
        *_run_blocks(),
        "## Server",
        _table(server, server.get("$defs", {})),
        _CODECS,
        ", ".join(f"`{name}`" for name in FLOAT_CODECS),
    ]
    return "\n\n".join(block.strip() for block in blocks if block) + "\n"


def _run_blocks() -> Iterator[str]:
    yield from _class_blocks(RunSettings, ("method",))
    yield _METHODS
    nested: dict[str, None] = {}
    for name in installed_method_names():
        first, *rest = _class_blocks(method_class(name), (), ("method",))
        yield f'### `[method]` `name = "{name}"`\n\n{first}'
        yield _method_defaults(method_class(name).model_validate({}))
        nested |= dict.fromkeys(rest)  # tables that methods share appear once
    yield from nested


def _method_defaults(method: MethodSettings) -> str:
    """What a method sets in other tables unless the file says otherwise, and its source."""
    lines = []
    for part, values in method.defaults({}).items():
        shown = ", ".join(f"`{name} = {json.dumps(value)}`" for name, value in values.items())
        lines.append(f"Defaults in `[{part}]`: {shown}.")
    if method.source:
        lines.append(f"Source: {method.source}.")
    return "\n\n".join(lines)


def _class_blocks(
    cls: type[BaseModel], left_out: tuple[str, ...], path: tuple[str, ...] = ()
) -> Iterator[str]:
    """The table of a class, then those of the classes nested in it, each with its title."""
    schema = cls.model_json_schema()
    definitions: Schema = schema.get("$defs", {})
    yield "\n\n".join(filter(None, (_summary(schema) if path else "", _table(schema, definitions))))
    for name, field in schema["properties"].items():
        part = _nested(field, definitions)
        if part is not None and name not in left_out:
            title = f"### `[{'.'.join((*path, name))}]`"
            yield "\n\n".join((title, _summary(part), _table(part, definitions)))


def _summary(schema: Schema) -> str:
    return str(schema.get("description", "")).split("\n\n")[0].replace("\n", " ")


def _nested(field: Schema, definitions: Schema) -> Schema | None:
    """The table that a field holds; None where it is a plain value."""
    if "$ref" not in field:
        return None
    part: Schema = definitions[field["$ref"].rsplit("/", 1)[-1]]
    return part if "properties" in part else None


def _table(schema: Schema, definitions: Schema) -> str:
    rows = [
        _row(name, field, definitions)
        for name, field in schema["properties"].items()
        if "const" not in field  # the name that chooses the table
    ]
    if not rows:
        return "No settings."
    return "\n".join(["| setting | value | default | |", "|---|---|---|---|", *rows])


def _row(name: str, field: Schema, definitions: Schema) -> str:
    text = str(field.get("description", "")).replace("|", "\\|")
    part = _nested(field, definitions)
    if part is None:
        default = _shown(field["default"]) if "default" in field else "required"
        return f"| `{name}` | {_value(field, definitions)} | {default} | {text} |"
    text = str(field.get("description", "")) if field.get("description") else ""
    changed = [
        f"`{key} = {json.dumps(value)}`"
        for key, value in (field.get("default") or {}).items()
        if value != part["properties"].get(key, {}).get("default")
    ]
    return f"| `{name}` | table | {', '.join(changed) or 'defaults'} | {text or _summary(part)} |"


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
    return {"boolean": "true, false", "object": "table"}.get(kind, kind) + _bounds(field)


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
