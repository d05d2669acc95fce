"""The head file's quantised weights against error bounds derived by hand."""

import pytest
import torch

from protocol.errors import MalformedFrame
from split_model.checkpoints.head_file import HeadDtype, Unpacked, packed, packed_bytes

WEIGHTS = {
    "blocks.0.mlp.fc1.weight": torch.randn(96, 64, generator=torch.Generator().manual_seed(0)),
    "patch_embed.proj.weight": torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    "pos_embed": torch.randn(1, 80, 64, generator=torch.Generator().manual_seed(2)) * 1e-3,
    "blocks.0.mlp.fc1.bias": torch.linspace(-1, 1, 96),
    "odd.weight": torch.randn(70, 75, generator=torch.Generator().manual_seed(3)),
    "rope.table": torch.arange(5000),
}


def test_float32_is_exact() -> None:
    assert all(packed(WEIGHTS, "float32")[name] is tensor for name, tensor in WEIGHTS.items())


@pytest.mark.parametrize(
    "name", ["blocks.0.mlp.fc1.weight", "patch_embed.proj.weight", "pos_embed"]
)
def test_the_error_of_an_int8_weight_is_at_most_half_a_scale(name: str) -> None:
    back = Unpacked(packed(WEIGHTS, "int8"))[name]
    weight = WEIGHTS[name]
    rows = weight.flatten(1) if weight.ndim == 4 else weight.flatten(0, -2)
    bound = rows.abs().amax(dim=1, keepdim=True) / 254 * 1.0001
    assert bool(((back.reshape(rows.shape) - rows).abs() <= bound).all())
    assert back.dtype == torch.float32


def test_small_and_integer_tensors_do_not_become_int8() -> None:
    stored = packed(WEIGHTS, "int8")
    assert stored["blocks.0.mlp.fc1.bias"].dtype == torch.float16
    assert torch.equal(stored["rope.table"], WEIGHTS["rope.table"])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_names_are_unchanged(dtype: HeadDtype) -> None:
    back = Unpacked(packed(WEIGHTS, dtype))
    assert set(back) == set(WEIGHTS)
    assert len(back) == len(WEIGHTS)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_row_of_zeros_stays_zero(dtype: HeadDtype) -> None:
    weights = {"a.weight": torch.zeros(64, 64)}
    assert torch.equal(Unpacked(packed(weights, dtype))["a.weight"], weights["a.weight"])


MATRICES = ["blocks.0.mlp.fc1.weight", "patch_embed.proj.weight", "odd.weight"]


@pytest.mark.parametrize("name", MATRICES)
def test_the_error_of_an_int4_weight_is_at_most_half_its_group_s_scale(name: str) -> None:
    back = Unpacked(packed(WEIGHTS, "int4"))[name]
    weight = WEIGHTS[name]
    assert back.shape == weight.shape
    assert back.dtype == torch.float32
    pairs = zip(back.flatten(1).split(64, 1), weight.flatten(1).split(64, 1), strict=True)
    for decoded, group in pairs:
        bound = group.abs().amax(dim=1, keepdim=True) / 14 * 1.0001
        # The scale is truncated to 8 bits: the largest code may lie 2^-8 below its weight.
        bound = bound.maximum(group.abs() / 128)
        assert bool(((decoded - group).abs() <= bound).all())


def test_with_int4_tables_and_small_tensors_are_as_with_int8() -> None:
    fine, coarse = packed(WEIGHTS, "int8"), packed(WEIGHTS, "int4")
    for name in ("pos_embed", "pos_embed.scale", "blocks.0.mlp.fc1.bias", "rope.table"):
        assert torch.equal(fine[name], coarse[name])


def test_damaged_int4_tensors_are_a_typed_error() -> None:
    stored = packed(WEIGHTS, "int4")
    for part in (".scale", ".shape"):
        broken = {**stored, "odd.weight" + part: stored["odd.weight" + part][:1]}
        with pytest.raises(MalformedFrame):
            Unpacked(broken)["odd.weight"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_the_calculated_bytes_are_those_of_the_tensors(dtype: HeadDtype) -> None:
    shapes = {name: tensor.to("meta") for name, tensor in WEIGHTS.items()}
    stored = packed(WEIGHTS, dtype).values()
    assert packed_bytes(shapes, dtype) == sum(tensor.nbytes for tensor in stored)


def nbytes(dtype: HeadDtype) -> int:
    stored = packed({"fc.weight": torch.randn(384, 1536)}, dtype)
    return sum(tensor.nbytes for tensor in stored.values())


def test_int8_takes_a_quarter_of_the_bytes_and_int4_an_eighth() -> None:
    assert nbytes("int8") < 0.26 * nbytes("float32")
    assert nbytes("int4") < 0.134 * nbytes("float32")
