"""The head file's quantised weights against error bounds derived by hand."""

import pytest
import torch

from split_model.checkpoints.head_file import Unpacked, packed

WEIGHTS = {
    "blocks.0.mlp.fc1.weight": torch.randn(96, 64, generator=torch.Generator().manual_seed(0)),
    "patch_embed.proj.weight": torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    "pos_embed": torch.randn(1, 80, 64, generator=torch.Generator().manual_seed(2)) * 1e-3,
    "blocks.0.mlp.fc1.bias": torch.linspace(-1, 1, 96),
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


def test_names_are_unchanged() -> None:
    back = Unpacked(packed(WEIGHTS, "int8"))
    assert set(back) == set(WEIGHTS)
    assert len(back) == len(WEIGHTS)


def test_a_row_of_zeros_stays_zero() -> None:
    weights = {"a.weight": torch.zeros(64, 64)}
    assert torch.equal(Unpacked(packed(weights, "int8"))["a.weight"], weights["a.weight"])


def test_int8_takes_a_quarter_of_the_bytes() -> None:
    def nbytes(dtype: str) -> int:
        stored = packed({"w": torch.randn(384, 1536)}, dtype)  # type: ignore[arg-type]
        return sum(tensor.nbytes for tensor in stored.values())

    assert nbytes("int8") < 0.26 * nbytes("float32")
