"""Bodies under torch.compile: ready before they are needed, and the same numbers."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import nn

from protocol.frames import decode_frame
from split_model.backbone.weights import open_backbone
from split_model.parts.build import build_body
from tests.support.federation import SMALL, run_settings, smashed
from tests.support.server import joined, labels, measured, running_server, wait_until


def test_the_body_of_a_run_is_compiled_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced both ways as ever, but not turned into machine code, which takes a minute.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    settings = run_settings(min_participants=1)
    model = SMALL.model_copy(update={"cut": 11})  # a body of one block: compiling takes its time
    settings = settings.model_copy(update={"model": model})
    with running_server(tmp_path, compile=True) as server:
        run = server.operator().create(settings).id
        bodies = "sfprompt_engine_bodies", labels()
        wait_until(lambda: measured(server)[bodies] == 1, seconds=120)
        device = joined(server, run)
        device.assignment(run)
        answer = device.step("forward", smashed(batch=3), "s")
    found = decode_frame(bytearray(answer.content)).tensor("features")
    split = model
    file = next((tmp_path / "backbones").glob("*.safetensors"))
    body = build_body(split, open_backbone(file))
    torch.testing.assert_close(found, body(smashed(batch=3)), rtol=1e-4, atol=1e-4)
