"""Foreign text acts on no terminal and writes no line of its own."""

from __future__ import annotations

import logging

import pytest

from protocol.errors import error_from_wire
from protocol.messages import Event
from protocol.printable import printable, printable_lines
from split_server.commands.runs import _event_line
from split_server.runtime.process import set_up_logging

HARMLESS = ["kitchen", "Küche 厨房", "a\u00a0b", "100 %", ""]

HARMFUL = {
    "\x1b[2Jgone": "\\x1b[2Jgone",
    "\x9b31m": "\\x9b31m",
    "a\r\nb": "a\\x0d\\x0ab",
    "a\u2028b": "a\\u2028b",
    "\u202egnp.exe": "\\u202egnp.exe",
    "\udcff": "\\udcff",
    "\U000e0001": "\\U000e0001",
}


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_stays(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(("text", "shown"), HARMFUL.items())
def test_what_would_act_is_shown_as_its_code(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).encode()


def test_long_text_is_cut() -> None:
    assert printable("a" * 5000) == "a" * 2000 + "…"
    assert printable_lines("a\x1b\nb") == "a\\x1b\nb"


def test_a_servers_error_is_printable_on_the_device() -> None:
    """Tried by a hostile server: to write to the device's terminal with an error's text."""
    evil = "\x1b]0;title\x07\n2026-01-01 INFO forged"
    wire = {"code": "busy", "message": evil, "field": evil, "hint": evil, "value": [evil]}
    text = str(error_from_wire({"error": {**wire, "limit": evil}}, 503))
    assert text.isprintable()
    assert "forged" in text


def test_a_devices_name_forges_no_line_of_watch() -> None:
    """Tried by a device: a name with line breaks, which looks like another event."""
    name = "a\n   2  run_finished          \x1b[A"
    event = Event(seq=1, at=0.0, kind="participant_joined", data={"name": name})
    assert _event_line(event).isprintable()


def test_a_path_forges_no_line_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Tried by a client: %0a and escape characters in a path, which the log repeats."""
    before = {name: logging.getLogger(name) for name in ("split_server", "uvicorn")}
    kept = {name: (log.handlers, log.level, log.propagate) for name, log in before.items()}
    try:
        set_up_logging("info")
        logging.getLogger("split_server").info("GET %s -> %d", "/x\n2026 forged \x1b[31m", 404)
    finally:
        for name, log in before.items():
            log.handlers, log.level, log.propagate = kept[name]
    [line] = capsys.readouterr().err.splitlines()
    assert "GET /x\\x0a2026 forged \\x1b[31m -> 404" in line
