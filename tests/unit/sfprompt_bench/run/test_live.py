"""The live view of a run shows all phases of a device."""

import io

import pytest
from rich.console import Console

from sfprompt_bench.run.live import LiveView


@pytest.mark.parametrize("phase", ["prune", "local", "split", "neurons", "evaluate", "sums"])
def test_every_phase_of_a_device_has_its_place(phase: str) -> None:
    event = {"event": "progress", "phase": phase, "done": 1, "total": 2}
    with LiveView(Console(file=io.StringIO()), ["device-1"], 2) as view:
        view.show_event("device-1", event)


@pytest.mark.parametrize("more", [{}, {"seconds": 3.0}], ids=["for others", "for the server"])
def test_a_device_that_waits_says_why(more: dict[str, float]) -> None:
    """What `edge_client.participant` reports while others join, `edge_client.cli` in outages."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    with LiveView(console, ["device-1"], 2) as view:
        view.show_event("device-1", {"event": "waiting", "reason": "1 of 2 devices", **more})
    assert "1 of 2 devices" in written.getvalue()
