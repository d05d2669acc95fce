"""Bodies that nobody tunes now: each loaded once, shared by all runs that cut alike."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

import split_model
from split_model import Body
from split_server.models.body_key import BodyKey, weights_of
from split_server.runtime.device import Placement


class BodyCache:
    """Loads bodies when they are first needed; the one unused for longest makes room.

    Args:
        placement: device and dtype of all of them.
        most: how many sets of weights are held at once.
        compiled: compile each block with torch.compile.
    """

    def __init__(self, placement: Placement, most: int = 4, *, compiled: bool = False) -> None:
        self._compiled = compiled
        self._placement = placement
        self._most = most
        self._bodies: OrderedDict[tuple[object, ...], dict[BodyKey, Body]] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # held for long, but not by who finds what it needs

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._bodies.values()))

    def get(self, key: BodyKey) -> Body:
        """The body of this key, in memory.

        Raises:
            InvalidField: its weights cannot be read any more.
        """
        if (found := self._held(key)) is not None:
            return found
        with self._loading:
            if (found := self._held(key)) is not None:
                return found
            with self._lock:
                twin = next(iter(self._bodies.get(key.weights, {}).values()), None)
            body = self._load(key, twin)
            with self._lock:
                self._bodies.setdefault(key.weights, {})[key] = body
                self._bodies.move_to_end(key.weights)
                while len(self._bodies) > self._most:
                    self._bodies.popitem(last=False)
            return body

    def _held(self, key: BodyKey) -> Body | None:
        with self._lock:
            alike = self._bodies.get(key.weights, {})
            if alike:
                self._bodies.move_to_end(key.weights)
            return alike.get(key)

    def _load(self, key: BodyKey, twin: Body | None) -> Body:
        weights = weights_of(key) if twin is None else _weights_in(twin)
        placement = self._placement
        body = split_model.build_body(key.settings, weights, placement.device, placement.dtype)
        if self._compiled:
            _compile(body, placement)
        return body


def _compile(body: Body, placement: Placement) -> None:
    """Compile each block, and run a batch as jobs do, so that no participant waits for it."""
    for block in body.blocks.values():
        block.compile(dynamic=True)
    body.whole_blocks = True  # what has been compiled is a block's own way
    settings, at_cut = body.settings, body.settings.prompt_at == "cut"
    inside = 0 if at_cut else settings.prompt_count
    shape = (2, body.sizes.tokens + inside, body.sizes.width)
    smashed = torch.zeros(shape, device=placement.device, dtype=placement.flowing)
    prompts = None
    if at_cut and settings.prompt_count:
        prompts = smashed.new_zeros((2, *split_model.prompt_shape(settings)))  # [B, L, P, D]
    with torch.inference_mode():
        body(smashed, prompts)
    leaf = (smashed if prompts is None else prompts).requires_grad_()
    features = body(smashed, prompts)
    torch.autograd.grad(features, leaf, torch.ones_like(features))


def _weights_in(body: Body) -> Mapping[str, Tensor]:
    state = body.state_dict()
    return {name: state[own] for name, own in body.names().items()}
