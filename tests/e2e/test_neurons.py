"""A server that is killed while it distils a run's proxy again."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from protocol.messages import Results, RunStatus
from protocol.plan import RunPlan
from split_server.client import OperatorClient
from split_server.storage.run_files import RunFiles
from tests.e2e.conftest import ServerProcess, small_run
from tests.e2e.devices import DeviceThreads, run_to_the_end
from tests.support.federation import OPERATOR
from tests.support.server import RunningServer


def redistillation_run() -> RunPlan:
    """Two rounds; between them the server distils the proxy again, for some seconds."""
    values = small_run(devices=1, seed=4, split_epochs=0, keep_fraction=1).model_dump()
    values["model"] |= {"mlp_widths": (0, *[24] * 10, 0), "tune": "lora", "lora_rank": 2}
    # A larger model than the other runs have, so that the server can be killed meanwhile.
    larger = {"backbone": "vit_tiny_patch16_224", "cut": 12, "prompt_count": 0}
    values["model"] |= larger
    distillation = {"epochs": 20, "samples": 8, "batch_size": 8, "every": 1}
    values["method"] |= {"distillation": distillation}
    return RunPlan.model_validate(values)


def test_a_server_killed_during_redistillation_ends_with_the_same_head_and_state(
    node: RunningServer, server: ServerProcess, tmp_path: Path
) -> None:
    with closing(OperatorClient(node.url, OPERATOR)) as operator:
        undisturbed, _ = run_to_the_end(
            operator,
            redistillation_run(),
            lambda run: DeviceThreads(node.url, run, 1, tmp_path / "undisturbed"),
        )
    assert undisturbed.run.status is RunStatus.FINISHED
    killed: list[bool] = []

    def kill_during_redistillation(results: Results) -> None:
        files = RunFiles(server.data_dir / "runs" / results.run.id)
        closed = [view.round for view in results.rounds if view.closed_at is not None]
        if closed == [1] and len(results.rounds) == 1 and not killed:
            server.process.kill()
            killed.append(files.weights_after(1).exists())
            server.start()

    with closing(server.operator()) as operator:
        disturbed, devices = run_to_the_end(
            operator,
            redistillation_run(),
            lambda run: DeviceThreads(server.url, run, 1, tmp_path / "disturbed"),
            kill_during_redistillation,
        )
    assert killed == [False], "the new proxy was not yet complete"
    assert [view.round for view in disturbed.rounds] == [1, 2]
    assert disturbed.run.head == undisturbed.run.head
    assert disturbed.run.state == undisturbed.run.state
    events = devices.events["device-1"]
    taken = [event["sha256"] for event in events if event["event"] == "head-taken"]
    assert taken == [disturbed.run.head.sha256]
