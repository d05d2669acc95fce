"""The example runs as a process: the cut changes nothing, and the loss falls."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

EXAMPLE = Path(__file__).parents[3] / "examples" / "split_step.py"


def test_the_example_cuts_a_model_and_tunes_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=EXAMPLE.parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "equals the uncut model: True" in done.stdout
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 10
    assert losses[-1] < 0.5 * losses[0]
    assert sum(after < before for before, after in pairwise(losses)) >= 7


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 80
