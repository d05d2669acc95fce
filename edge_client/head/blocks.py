"""A transformer block in NumPy, its weights joined where layers follow each other directly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edge_client.head.layers import ACTIVATIONS, Floats, Linear, Norm, sigmoid, softmax_sums
from edge_client.head.positions import relative_bias, turns_of
from protocol.architecture import Architecture

_SCORES = 1 << 19  # numbers that stay in a core's second cache through all steps of the softmax

Tensors = Mapping[str, Floats]


class Block:
    """One block.

    Args:
        architecture: of the backbone.
        tensors: the head's, by timm's names.
        number: of the block.
    """

    def __init__(self, architecture: Architecture, tensors: Tensors, number: int) -> None:
        name = f"blocks.{number}"
        norms = [read_norm(architecture, tensors, f"{name}.norm{place}") for place in (1, 2)]
        nothing = [None, None]
        self._after: Sequence[Norm | None] = norms if architecture.norm_after else nothing
        self._before: Sequence[Norm | None] = nothing if architecture.norm_after else norms
        scales = [_scale(tensors, name, place) for place in (1, 2)]
        self._layers: Sequence[Callable[[Floats], Floats]] = (
            Attention(architecture, tensors, number, self._before[0], scales[0]),
            MLP(architecture, tensors, f"{name}.mlp", self._before[1], scales[1]),
        )

    def __call__(self, tokens: Floats) -> Floats:
        """[B, T, D] to [B, T, D]; the inputs may be overwritten."""
        for layer, before, after in zip(self._layers, self._before, self._after, strict=True):
            change = layer(tokens if before is None else before.normalise(tokens))
            tokens += change if after is None else after(change)
        return tokens


class Attention:
    """Multi-head attention, after a norm without weights.

    Args:
        architecture: of the backbone.
        tensors: the head's.
        number: of the block.
        norm: before it, whose weight and bias are joined to the first layers; None: none.
        scale: of the outputs, [D]; None: 1.
    """

    def __init__(
        self,
        architecture: Architecture,
        tensors: Tensors,
        number: int,
        norm: Norm | None,
        scale: Floats | None,
    ) -> None:
        name = f"blocks.{number}.attn"
        self._heads = architecture.heads
        queries, keys, values = _projections(tensors, name)
        width = queries.outputs // self._heads
        self._norms = [
            read_norm(architecture, tensors, f"{name}.{side}_norm")
            if f"{name}.{side}_norm.weight" in tensors
            else None
            for side in ("q", "k")
        ]
        self._scale = np.float32(width**-0.5)
        if self._norms[0] is None:
            queries = queries.scaled(width**-0.5)
        self._shared = queries.outputs // keys.outputs  # queries of one key
        self._joint = Linear.joined([each.after(norm) for each in (queries, keys, values)])
        self._rows = [queries.outputs, keys.outputs, values.outputs]
        gate = f"{name}.gate"
        self._gate = Linear.read(tensors, gate).after(norm) if f"{gate}.weight" in tensors else None
        out = Linear.read(tensors, f"{name}.proj").scaled(scale)
        inner = f"{name}.norm"
        self._inner = (
            read_norm(architecture, tensors, inner) if f"{inner}.weight" in tensors else None
        )
        self._out = out if self._gate is not None else out.after(self._inner)
        self._turns = turns_of(architecture, tensors, number)
        self._bias = relative_bias(architecture, tensors, number)

    def __call__(self, tokens: Floats) -> Floats:
        """[B, T, D] to [B, T, D]."""
        batch, count, width = tokens.shape
        flat = tokens.reshape(-1, width)
        joint = self._joint(flat).reshape(batch, count, -1)
        queries, keys, values = self._split(joint)
        if self._norms[0] is not None and self._norms[1] is not None:
            queries, keys = self._norms[0](queries), self._norms[1](keys)
            queries *= self._scale
        if self._turns is not None:
            queries, keys = self._turns(queries), self._turns(keys)
        if self._shared > 1:
            keys, values = (np.repeat(each, self._shared, axis=1) for each in (keys, values))
        mixed = np.empty_like(queries, order="C")  # [B, H, T, d]
        together = max(1, _SCORES // count**2)
        for image in range(batch):
            for head in range(0, self._heads, together):
                self._mix(image, slice(head, head + together), queries, keys, values, mixed)
        inner = mixed.transpose(0, 2, 1, 3).reshape(batch * count, -1)
        if self._gate is not None:
            inner = inner if self._inner is None else self._inner(inner)
            inner *= sigmoid(self._gate(flat))
        elif self._inner is not None:
            inner = self._inner.normalise(inner)
        return self._out(inner).reshape(batch, count, -1)

    def _mix(
        self,
        image: int,
        heads: slice,
        queries: Floats,
        keys: Floats,
        values: Floats,
        mixed: Floats,
    ) -> None:
        scores = queries[image, heads] @ keys[image, heads].swapaxes(1, 2)  # [h, T, T]
        if self._bias is not None:
            scores += self._bias[heads]
        sums = softmax_sums(scores)
        np.matmul(scores, values[image, heads], out=mixed[image, heads])
        mixed[image, heads] /= sums

    def _split(self, joint: Floats) -> list[Floats]:
        """Divide [B, T, rows] in queries, keys and values [B, H, T, d], without a copy."""
        batch, count, _ = joint.shape
        parts, start = [], 0
        for rows, heads in zip(
            self._rows, (self._heads, *2 * [self._heads // self._shared]), strict=True
        ):
            part = joint[..., start : start + rows].reshape(batch, count, heads, -1)
            parts.append(part.transpose(0, 2, 1, 3))
            start += rows
        return parts


class MLP:
    """Two linear layers with an activation between; arguments as for `Attention`."""

    def __init__(
        self,
        architecture: Architecture,
        tensors: Tensors,
        name: str,
        norm: Norm | None,
        scale: Floats | None,
    ) -> None:
        self._activate = ACTIVATIONS[architecture.activation]
        self._gate = architecture.gate
        if f"{name}.fc1_g.weight" in tensors:
            parts = [Linear.read(tensors, f"{name}.{each}") for each in ("fc1_g", "fc1_x")]
            first = Linear.joined(parts)
        else:
            first = Linear.read(tensors, f"{name}.fc1")
        self._first = first.after(norm)
        second = Linear.read(tensors, f"{name}.fc2").scaled(scale)
        inner = f"{name}.norm"
        self._inner = (
            read_norm(architecture, tensors, inner) if f"{inner}.weight" in tensors else None
        )
        self._second = second.after(self._inner)

    def __call__(self, tokens: Floats) -> Floats:
        """[B, T, D] to [B, T, D]."""
        hidden = self._first(tokens.reshape(-1, tokens.shape[-1]))
        if self._gate == "none":
            hidden = self._activate(hidden)
        else:
            half = hidden.shape[1] // 2
            halves = hidden[:, :half], hidden[:, half:]
            gate, other = halves if self._gate == "first" else halves[::-1]
            hidden = self._activate(np.ascontiguousarray(gate))
            hidden *= other
        if self._inner is not None:
            hidden = self._inner.normalise(hidden)
        return self._second(hidden).reshape(*tokens.shape[:-1], -1)


def read_norm(
    architecture: Architecture, tensors: Tensors, name: str, epsilon: float | None = None
) -> Norm:
    """Read the norm of this name."""
    return Norm(
        tensors[f"{name}.weight"],
        tensors.get(f"{name}.bias"),
        epsilon or architecture.epsilon,
        architecture.norm == "rms",
    )


def _projections(tensors: Tensors, name: str) -> list[Linear]:
    """Read the layers of queries, keys and values."""
    if f"{name}.q_proj.weight" in tensors:
        return [Linear.read(tensors, f"{name}.{side}_proj") for side in "qkv"]
    weights = np.split(tensors[f"{name}.qkv.weight"], 3)
    if f"{name}.q_bias" in tensors:  # keys have none
        biases = [tensors[f"{name}.q_bias"], None, tensors[f"{name}.v_bias"]]
    elif f"{name}.qkv.bias" in tensors:
        biases = list(np.split(tensors[f"{name}.qkv.bias"], 3))
    else:
        biases = [None] * 3
    return [Linear.of(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _scale(tensors: Tensors, block: str, place: int) -> Floats | None:
    """Return the factor of attention's (1) or the MLP's (2) outputs, [D]; None: 1."""
    for name in (f"{block}.ls{place}.gamma", f"{block}.gamma_{place}"):
        if name in tensors:
            return tensors[name]
    return None
