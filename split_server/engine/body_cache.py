"""Frozen bodies: each loaded once, shared by all runs with the same cut and weights."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from split_model.layers.prompts import prompt_shape
from split_model.parts.body import Body
from split_model.parts.build import build_body
from split_server.models.body_key import BodyKey, weights_of
from split_server.runtime.device import Placement


class BodyCache:
    """Loads bodies when they are first needed; drops the least recently used. Thread-safe.

    Args:
        placement: device and dtype of all bodies.
        max_weights: number of sets of weights in memory.
        compiled: whether to compile each block with torch.compile.
    """

    def __init__(
        self, placement: Placement, max_weights: int = 4, *, compiled: bool = False
    ) -> None:
        self._compiled = compiled
        self._placement = placement
        self._max_weights = max_weights
        self._bodies: OrderedDict[tuple[object, ...], dict[BodyKey, Body]] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # long; lookups do not take it

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._bodies.values()))

    def get(self, key: BodyKey) -> Body:
        """Return the body of a key; load it if necessary.

        Raises:
            InvalidField: its weights cannot be read.
        """
        if (body := self._find(key)) is not None:
            return body
        with self._loading:
            if (body := self._find(key)) is not None:
                return body
            with self._lock:
                twin = next(iter(self._bodies.get(key.weights, {}).values()), None)
            body = self._load(key, twin)
            with self._lock:
                self._bodies.setdefault(key.weights, {})[key] = body
                self._bodies.move_to_end(key.weights)
                while len(self._bodies) > self._max_weights:
                    self._bodies.popitem(last=False)
            return body

    def _find(self, key: BodyKey) -> Body | None:
        with self._lock:
            bodies = self._bodies.get(key.weights, {})
            if bodies:
                self._bodies.move_to_end(key.weights)
            return bodies.get(key)

    def _load(self, key: BodyKey, twin: Body | None) -> Body:
        weights = weights_of(key) if twin is None else _weights_in(twin)
        placement = self._placement
        body = build_body(key.settings, weights, placement.device, placement.dtype)
        if self._compiled:
            _compile(body, placement)
        return body


def _compile(body: Body, placement: Placement) -> None:
    """Compile each block and run one batch forward and backward, so that no job has to wait."""
    for block in body.blocks.values():
        block.compile(dynamic=True)
    body.whole_blocks = True  # only a whole block's forward is compiled
    settings, at_cut = body.settings, body.settings.prompt_at == "cut"
    inside = 0 if at_cut else settings.prompt_count
    shape = (2, body.sizes.tokens + inside, body.sizes.width)
    smashed = torch.zeros(shape, device=placement.device, dtype=placement.flowing)
    prompts = None
    if at_cut and settings.prompt_count:
        prompts = smashed.new_zeros((2, *prompt_shape(settings)))  # [B, L, P, D]
    with torch.inference_mode():
        body(smashed, prompts)
    leaf = (smashed if prompts is None else prompts).requires_grad_()
    features = body(smashed, prompts)
    torch.autograd.grad(features, leaf, torch.ones_like(features))


def _weights_in(body: Body) -> Mapping[str, Tensor]:
    state = body.state_dict()
    return {name: state[parameter] for name, parameter in body.names().items()}
