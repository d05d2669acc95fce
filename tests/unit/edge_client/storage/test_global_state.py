"""States and updates as changes: what both ends hold, and what is left over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edge_client.storage.blob_cache import BlobCache
from edge_client.storage.global_state import GlobalStates
from edge_client.storage.states import state_bytes
from protocol.errors import MalformedFrame, NotFound
from protocol.federation import FederationSettings
from protocol.frames import Frame, decode_frame, encode_frame, join_frame
from protocol.messages import BlobRef, UpdateMeta
from protocol.plan import ModelPlan, RunPlan, WirePlan
from split_model.checkpoints.state import load_state
from split_model.checkpoints.state import state_bytes as server_bytes
from split_server.aggregation.publishing import publish
from split_server.storage.run_files import RunFiles, StateRefs
from split_server.storage.tensor_files import read_tensors

META = UpdateMeta(round=1, attempt=0, samples=3)


@dataclass
class Origin:
    """The server's files of a run, and the updates that came."""

    files: RunFiles
    whole: int = 0  # states that were downloaded as files
    updates: list[tuple[UpdateMeta, dict[str, np.ndarray]]] = field(default_factory=list)
    spoil: bool = False

    def state(self, _run: str, ref: BlobRef, start: int) -> bytes:
        self.whole += start == 0
        return self.files.state(ref.sha256).read_bytes()[start:]

    def delta(self, _run: str, ref: BlobRef, base: BlobRef) -> Frame:
        path = self.files.delta(ref.sha256, base.sha256)
        if not path.is_file():
            raise NotFound("no such file", field="sha256")
        frame = decode_frame(bytearray(path.read_bytes()))
        if not self.spoil:
            return frame
        tensors = {name: (tensor + 1, "float32") for name, tensor in frame.tensors().items()}
        return decode_frame(join_frame(encode_frame("delta", {}, tensors)))

    def send_update(
        self,
        _run: str,
        meta: UpdateMeta,
        state: Mapping[str, Tensor],
        codec: str,
        extra: Mapping[str, Tensor] | None,
    ) -> None:
        assert not extra
        tensors = {name: (tensor, codec) for name, tensor in state.items()}
        frame = decode_frame(join_frame(encode_frame("update", {}, tensors)))
        self.updates.append((meta, frame.tensors()))


def run(**wire: object) -> RunPlan:
    return RunPlan(
        model=ModelPlan(prompt_at="cut"),
        federation=FederationSettings(),
        wire=WirePlan.model_validate({"update_deltas": True, **wire}),
    )


def device(origin: Origin, folder: Path, settings: RunPlan) -> GlobalStates:
    return GlobalStates(origin, "r", settings.wire, BlobCache(folder))  # type: ignore[arg-type]


def tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """As the server has them."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def state(value: float) -> dict[str, np.ndarray]:
    return {
        "tail.a": np.array([4.0, 3.0, 2.0, 1.0], np.float32) * np.float32(value),
        "tail.b": np.full(2, value, np.float32),
    }


@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "topk:0.25"])
def test_a_device_makes_the_very_state_of_the_server_from_a_change(
    tmp_path: Path, codec: str
) -> None:
    settings, origin = run(updates=codec), Origin(RunFiles(tmp_path / "run"))
    first = origin.files.write_state(tensors(state(1.0)) | {"prompts": torch.ones(1, 2, 3)}, "cut")
    states = device(origin, tmp_path / "blobs", settings)
    states.fetch(first.device)
    second = publish(
        tensors(state(1.37)) | {"prompts": torch.zeros(1, 2, 3)}, first, settings, origin.files
    )
    path = states.fetch(second.device)
    assert origin.whole == 1
    assert path.read_bytes() == origin.files.state(second.device.sha256).read_bytes()
    assert set(load_state(path)) == {"tail.a", "tail.b"}  # the prompts stay where they are
    assert second.server is not None
    server_state = read_tensors(origin.files.server_state(second.server.sha256))
    assert np.array_equal(server_state["prompts"], torch.zeros(1, 2, 3))


def test_a_device_that_missed_a_state_gets_the_whole_file(tmp_path: Path) -> None:
    settings, origin = run(updates="float16"), Origin(RunFiles(tmp_path / "run"))
    refs = [origin.files.write_state(tensors(state(1.0)), "cut")]
    states = device(origin, tmp_path / "blobs", settings)
    states.fetch(refs[0].device)
    for value in (2.0, 3.0):
        refs.append(publish(tensors(state(value)), refs[-1], settings, origin.files))
    states.fetch(refs[-1].device)
    assert origin.whole == 2


def test_a_change_that_leads_elsewhere_is_not_taken(tmp_path: Path) -> None:
    settings, origin = run(updates="float16"), Origin(RunFiles(tmp_path / "run"), spoil=True)
    first = origin.files.write_state(tensors(state(1.0)), "cut")
    states = device(origin, tmp_path / "blobs", settings)
    states.fetch(first.device)
    second = publish(tensors(state(2.0)), first, settings, origin.files)
    path = states.fetch(second.device)
    assert path.read_bytes() == origin.files.state(second.device.sha256).read_bytes()


def test_a_change_beyond_the_codecs_range_is_published_whole(tmp_path: Path) -> None:
    settings, origin = run(updates="float16"), Origin(RunFiles(tmp_path / "run"))
    first = origin.files.write_state(tensors(state(1.0)), "cut")
    second = publish(tensors(state(1e6)), first, settings, origin.files)
    assert np.array_equal(
        read_tensors(origin.files.state(second.device.sha256))["tail.a"], state(1e6)["tail.a"]
    )
    with pytest.raises(NotFound):
        origin.delta("r", second.device, first.device)


def test_the_codec_s_error_in_an_update_is_sent_with_the_next_one(tmp_path: Path) -> None:
    settings, origin = run(updates="topk:0.25"), Origin(RunFiles(tmp_path / "run"))
    refs = origin.files.write_state(tensors(state(0.0)), "cut")
    states = device(origin, tmp_path / "blobs", settings)
    states.fetch(refs.device)
    states.send(META, state(1.0))
    assert origin.updates[0][1]["tail.a"].tolist() == [4.0, 0.0, 0.0, 0.0]
    assert origin.updates[0][0].base == refs.device.sha256
    after = StateRefs(origin.files.write_state(tensors(state(9.0)), "cut").device)
    states.fetch(after.device)
    states.send(META, state(9.0))  # no change of its own: what was left over is sent
    assert origin.updates[1][1]["tail.a"].tolist() == [0.0, 3.0, 0.0, 0.0]


def test_a_repeated_round_sends_the_change_once(tmp_path: Path) -> None:
    settings, origin = run(updates="topk:0.25"), Origin(RunFiles(tmp_path / "run"))
    refs = origin.files.write_state(tensors(state(0.0)), "cut")
    states = device(origin, tmp_path / "blobs", settings)
    states.fetch(refs.device)
    for attempt in (0, 1):
        states.send(META.model_copy(update={"attempt": attempt}), state(1.0))
    assert origin.updates[1][1]["tail.a"].tolist() == [4.0, 0.0, 0.0, 0.0]


def test_a_change_of_other_tensors_is_refused(tmp_path: Path) -> None:
    settings, origin = run(), Origin(RunFiles(tmp_path / "run"))
    first = origin.files.write_state(tensors(state(1.0)), "cut")
    states = device(origin, tmp_path / "blobs", settings)
    states.fetch(first.device)
    second = origin.files.write_state({"tail.a": torch.ones(9)}, "cut")
    frame = join_frame(encode_frame("delta", {}, {"tail.a": (torch.ones(9), "float32")}))
    origin.files.delta(second.device.sha256, first.device.sha256).write_bytes(bytes(frame))
    with pytest.raises(MalformedFrame):
        states.fetch(second.device)


def test_equal_states_have_equal_bytes() -> None:
    one, other = state(1.0), dict(reversed(state(1.0).items()))
    assert state_bytes(one) == state_bytes(other) == server_bytes(tensors(one))
