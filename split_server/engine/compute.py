"""The engine's arithmetic: forward and backward of one body."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from split_model.parts.body import Body
from split_model.parts.tail import for_the_tail
from split_server.engine.steps import Graph


def run_forward(
    body: Body,
    smashed: Tensor,
    prompts: Tensor | None,
    num_tokens: int | None,
    known_bytes: int | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Run a body forward with an autograd graph.

    Args:
        body: the body to run.
        smashed: smashed data [B, T, D].
        prompts: [B, L, P, D] that join at the cut; None: there are none.
        num_tokens: number of the features' tokens to return, which are those the tail reads;
            None: all.
        known_bytes: bytes that the graph saves; None: count them, tensor by tensor.

    Returns:
        The graph's leaf (the prompts if given, else the smashed data), the features [B, T', D], and
        the bytes that the graph saves.

    Raises:
        WrongShape: the body does not take this number of tokens or width.
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
    # Without the prompts, which belong to the session: bytes per sample do not depend on the batch.
    return leaf, features, counter.nbytes + constant.nbytes


def run_backward(graph: Graph, gradients: Tensor) -> Tensor:
    """Run a graph backward, once.

    Args:
        graph: a forward's graph; it is used up afterwards.
        gradients: of the graph's features [B, T', D].

    Returns:
        The gradient of the graph's leaf.
    """
    (result,) = torch.autograd.grad(graph.features, graph.leaf, gradients)
    return result


def run_inference(
    body: Body, smashed: Tensor, prompts: Tensor | None, num_tokens: int | None
) -> Tensor:
    """Run a body forward without a graph. `run_forward` explains the arguments.

    Returns:
        Features [B, T', D].

    Raises:
        WrongShape: the body does not take this number of tokens or width.
    """
    with torch.inference_mode():
        return _call(body, smashed, prompts, num_tokens)


def _call(body: Body, smashed: Tensor, prompts: Tensor | None, num_tokens: int | None) -> Tensor:
    is_averaged = num_tokens is not None and body.sizes.averaged
    features: Tensor = body(smashed, prompts, None if is_averaged else num_tokens)
    return for_the_tail(body.settings, features) if is_averaged else features


class _SavedBytes:
    """Counts the bytes that autograd saves: each storage once, the frozen weights never."""

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
