"""The layers of a vision transformer in NumPy, float32. Functions may overwrite their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

Activation = Callable[[Floats], Floats]

_CHUNK = 16_384  # numbers that stay in a core's first cache through all steps of an activation

# ½ · erfc(z) = (c1 t + … + c5 t⁵) · exp(-z²) with t = 1 / (1 + p z), to 8e-8 for z ≥ 0.
# Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
_P = 0.3275911 / math.sqrt(2)  # the argument is z = x / √2

_C = tuple(c / 2 for c in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        weight: [I, O]: in this order a few rows are multiplied twice as fast.
        bias: [O]; None: there is none.
    """

    weight: Floats
    bias: Floats | None = None

    @classmethod
    def read(cls, tensors: Mapping[str, Floats], name: str) -> Linear:
        """Read the layer of this name, whose weight is stored as [O, I]."""
        return cls.of(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    @classmethod
    def of(cls, weight: Floats, bias: Floats | None) -> Linear:
        """Return the layer with this weight [O, I]."""
        return cls(np.ascontiguousarray(weight.T), bias)

    @classmethod
    def joined(cls, layers: Sequence[Linear]) -> Linear:
        """Return one layer with the outputs of several, one after the other."""
        weight = np.concatenate([layer.weight for layer in layers], axis=1)
        if all(layer.bias is None for layer in layers):
            return cls(weight)
        biases = [
            np.zeros(layer.outputs, np.float32) if layer.bias is None else layer.bias
            for layer in layers
        ]
        return cls(weight, np.concatenate(biases))

    @property
    def outputs(self) -> int:
        """The number of outputs O."""
        return int(self.weight.shape[1])

    def __call__(self, inputs: Floats) -> Floats:
        """[n, I] to [n, O]."""
        outputs = inputs @ self.weight
        if self.bias is not None:
            outputs += self.bias
        return outputs

    def after(self, norm: Norm | None) -> Linear:
        """Return a layer that also does the weight and the bias of the norm before it."""
        if norm is None:
            return self
        bias = self.bias
        if norm.bias is not None:
            shift = norm.bias @ self.weight
            bias = shift if bias is None else bias + shift
        return Linear(self.weight * norm.weight[:, None], bias)

    def scaled(self, factor: Floats | float | None) -> Linear:
        """Return a layer whose outputs are multiplied by a factor, [O] or one."""
        if factor is None:
            return self
        scale = np.asarray(factor, np.float32)
        return Linear(self.weight * scale, None if self.bias is None else self.bias * scale)


@dataclass(frozen=True)
class Norm:
    """A layer norm, or an RMS norm.

    Attributes:
        weight: [D].
        bias: [D]; None: there is none.
        epsilon: added to the variance.
        is_rms: whether the mean is not subtracted.
    """

    weight: Floats
    bias: Floats | None
    epsilon: float
    is_rms: bool

    def __call__(self, inputs: Floats) -> Floats:
        """Normalise the last axis of [..., D]; the inputs stay as they are."""
        outputs = self.normalise(inputs)
        outputs *= self.weight
        if self.bias is not None:
            outputs += self.bias
        return outputs

    def normalise(self, inputs: Floats) -> Floats:
        """Normalise without weight and bias."""
        outputs: Floats = inputs.copy()
        if not self.is_rms:
            outputs -= inputs.mean(axis=-1, keepdims=True)
        variance: Floats = np.einsum("...d,...d->...", outputs, outputs)[..., None]
        variance /= np.float32(inputs.shape[-1])
        variance += np.float32(self.epsilon)
        outputs *= 1 / np.sqrt(variance)
        return outputs


def softmax_sums(scores: Floats) -> Floats:
    """Replace scores [..., n] by exp(score - largest), in place; return the sums [..., 1]."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    sums: Floats = scores.sum(axis=-1, keepdims=True)
    return sums


def gelu(values: Floats) -> Floats:
    """x · Φ(x), in place."""

    def apply(x: Floats) -> None:
        size = np.abs(x)
        t = size * np.float32(_P)
        t += np.float32(1)
        np.divide(np.float32(1), t, out=t)
        tail = t * np.float32(_C[4])
        for c in _C[3::-1]:
            tail += np.float32(c)
            tail *= t
        np.multiply(x, x, out=t)
        t *= np.float32(-0.5)
        np.exp(t, out=t)
        tail *= t
        tail *= size  # |x| · Φ(-|x|)
        np.maximum(x, np.float32(0), out=x)
        x -= tail

    return _in_chunks(values, apply)


def gelu_tanh(values: Floats) -> Floats:
    """The approximation of `gelu` by tanh, in place."""

    def apply(x: Floats) -> None:
        inner = x * x
        inner *= np.float32(0.044715)
        inner += np.float32(1)
        inner *= x
        inner *= np.float32(math.sqrt(2 / math.pi))
        np.tanh(inner, out=inner)
        inner += np.float32(1)
        inner *= np.float32(0.5)
        x *= inner

    return _in_chunks(values, apply)


def gelu_quick(values: Floats) -> Floats:
    """x · sigmoid(1.702 x), in place."""
    return _in_chunks(values, lambda x: _times_sigmoid(x, -1.702))


def silu(values: Floats) -> Floats:
    """x · sigmoid(x), in place."""
    return _in_chunks(values, lambda x: _times_sigmoid(x, -1.0))


def sigmoid(values: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):  # an infinite exponential gives the right 0
        result: Floats = np.float32(1) / (np.float32(1) + np.exp(-values))
    return result


ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": gelu,
    "gelu-tanh": gelu_tanh,
    "gelu-quick": gelu_quick,
    "silu": silu,
}


def _times_sigmoid(x: Floats, factor: float) -> None:
    with np.errstate(over="ignore"):
        inner = np.exp(x * np.float32(factor))
    inner += np.float32(1)
    x /= inner


def _in_chunks(values: Floats, apply: Callable[[Floats], None]) -> Floats:
    flat = values.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        apply(flat[start : start + _CHUNK])
    return values
