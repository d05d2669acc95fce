"""The arithmetic of the split plane: one body, one tensor, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import split_model
from protocol.errors import WrongShape
from split_model import Body
from split_server.engine.steps import Graph


def run_forward(
    body: Body,
    smashed: Tensor,
    prompts: Tensor | None,
    num_tokens: int | None,
    known_bytes: int | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Smashed data [B, T, D] to the leaf, the features [B, T', D] and the bytes that they keep.

    Args:
        body: whose blocks to run.
        smashed: the leaf, where no prompts are given.
        prompts: [B, L, P, D] that join at the cut, and are then the leaf.
        leading: whether all tokens of the features are wanted (None), or those so many that the
            tail reads.
        known_bytes: that are kept; None: they are counted, at every tensor that is.

    Raises:
        WrongShape: no number of tokens or width that this body takes.
    """
    constant = smashed.detach()
    leaf = constant.requires_grad_(True) if prompts is None else prompts.detach().requires_grad_()
    tuned = None if prompts is None else leaf
    if known_bytes is not None:
        with torch.enable_grad():
            return leaf, _call(body, constant, tuned, num_tokens), known_bytes
    counter = _SavedBytes(body)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(counter.pack, _unpack):
        features = _call(body, constant, tuned, num_tokens)
    # Prompts are their session's: what a step takes then grows with its batch and nothing else.
    return leaf, features, counter.nbytes + constant.nbytes


def run_backward(graph: Graph, gradients: Tensor) -> Tensor:
    """The gradient of the features [B, T', D] to that of the graph's leaf. It can be run once."""
    (result,) = torch.autograd.grad(graph.features, graph.leaf, gradients)
    return result


def run_inference(
    body: Body, smashed: Tensor, prompts: Tensor | None, num_tokens: int | None
) -> Tensor:
    """Smashed data [B, T, D] to features [B, T', D], keeping nothing. See `run_forward`.

    Raises:
        WrongShape: no number of tokens or width that this body takes.
    """
    with torch.inference_mode():
        return _call(body, smashed, prompts, num_tokens)


def _call(body: Body, smashed: Tensor, prompts: Tensor | None, num_tokens: int | None) -> Tensor:
    averaged = num_tokens is not None and body.sizes.averaged
    try:
        features: Tensor = body(smashed, prompts, None if averaged else num_tokens)
    except split_model.TokenCountError as error:
        raise WrongShape(
            str(error), field=error.field, limit=error.limit, value=list(error.value)
        ) from error
    return split_model.for_the_tail(body.settings, features) if averaged else features


class _SavedBytes:
    """Counts what autograd saves, each piece of memory once and the frozen weights not at all."""

    def __init__(self, body: Body) -> None:
        self._seen = set(_pointers(body.parameters())) | set(_pointers(body.buffers()))
        self.nbytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.nbytes += storage.nbytes()
        return tensor


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


def _pointers(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.untyped_storage().data_ptr() for tensor in tensors]
