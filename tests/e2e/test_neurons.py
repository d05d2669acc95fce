"""A server that is killed while it distils a run's proxy again."""

from __future__ import annotations

from pathlib import Path

from protocol.messages import Results, RunStatus
from protocol.plan import RunPlan
from split_server.storage.run_files import RunFiles
from tests.e2e.conftest import ServerProcess, small_run
from tests.e2e.test_federation import run_to_the_end


def neuron_run() -> RunPlan:
    """Two rounds on a proxy that is distilled again, for seconds, between them."""
    given = small_run(devices=1, seed=4, split_epochs=0, keep_fraction=1).model_dump()
    given["model"] |= {"proxy": "pruned", "proxy_width": 24, "tune": "lora", "lora_rank": 2}
    given["model"] |= {"cut": 12, "prompt_count": 0}
    given["distillation"] |= {"epochs": 20, "samples": 8, "batch_size": 8, "every": 1}
    return RunPlan.model_validate(given)


def test_a_server_that_is_killed_while_it_distils_ends_with_the_same_head_and_state(
    server: ServerProcess, tmp_path: Path
) -> None:
    undisturbed, _ = run_to_the_end(server, neuron_run(), 1)
    assert undisturbed.run.status is RunStatus.FINISHED
    crashing = ServerProcess(tmp_path / "crashing")
    killed: list[bool] = []

    def kill_while_it_distils(results: Results) -> None:
        files = RunFiles(crashing.data_dir / "runs" / results.run.id)
        closed = [view.round for view in results.rounds if view.closed_at is not None]
        if closed == [1] and len(results.rounds) == 1 and not killed:
            crashing.process.kill()
            killed.append(files.weights_after(1).exists())
            crashing.start()

    try:
        disturbed, devices = run_to_the_end(crashing, neuron_run(), 1, kill_while_it_distils)
    finally:
        crashing.process.stop()
    assert killed == [False], "in the middle of it"
    assert [view.round for view in disturbed.rounds] == [1, 2]
    assert disturbed.run.head == undisturbed.run.head
    assert disturbed.run.state == undisturbed.run.state
    taken = [one["sha256"] for one in devices.events["device-1"] if one["event"] == "head-taken"]
    assert taken == [disturbed.run.head.sha256]
