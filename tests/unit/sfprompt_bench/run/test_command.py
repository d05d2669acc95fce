"""``sfprompt-bench run`` refuses wrong options before it starts a process."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge_client.data.errors import PartitionError
from protocol.errors import NotFound, SFPromptError
from sfprompt_bench.cli import app


@pytest.mark.parametrize(
    ("words", "error", "value"),
    [
        (("--partition", "dirichlet:much"), PartitionError, "dirichlet:much"),
        (("--data", "letters"), NotFound, "letters"),
    ],
)
def test_nothing_is_made_for_a_run_that_cannot_be(
    words: tuple[str, ...], error: type[SFPromptError], value: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["run", *words, "--out", str(tmp_path / "run")])
    assert isinstance(result.exception, error)
    assert result.exception.value == value
    assert not (tmp_path / "run").exists()
