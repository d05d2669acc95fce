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
