"""Rounds of split training with prompts at the cut, with all that the server sees of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edge_client.data.batches import shuffled
from edge_client.torch_model import TorchModel, read
from edge_client.training.split_training import train_tail
from protocol.codecs import get_codec
from protocol.codecs.registry import as_decoded
from protocol.errors import InvalidField
from protocol.plan import RunPlan
from protocol.seeds import derive_seed
from sfprompt_bench.methods.pooled import PooledModel
from split_model.optimizer import learning_rate_factor, make_optimizer, set_progress
from split_model.parts.tail import Tail, for_the_tail
from split_server.closed_form.basis import Basis


@dataclass(frozen=True)
class ObservedRound:
    """One participant's round as the server sees it, and the labels that it does not see.

    Attributes:
        number: of the round, from 1.
        tail: of the global state with which the round began; the device changes it in each step,
            unless it was fitted in round 0.
        features: that the server sent, [N, T', D], as the device decoded them.
        gradients: that the server received, [N, T', D], decoded.
        labels: of the samples, [N].
    """

    number: int
    tail: Tail
    features: Tensor
    gradients: Tensor
    labels: Tensor


def observe_rounds(
    model: PooledModel, plan: RunPlan, rounds: int, basis: Basis | None = None
) -> Iterator[ObservedRound]:
    """Train ``rounds`` rounds of a run with one participant, and yield each as the server sees it.

    Args:
        model: head, body, tail and prompts, tuned in place, and the participant's images.
        plan: of the run; the prompts must be at the cut.
        rounds: how many to train, of those in the plan.
        basis: of the features, from round 0.

    Raises:
        InvalidField: the prompts are not at the cut.
    """
    if plan.model.prompt_at != "cut" or model.prompts is None:
        raise InvalidField(
            "the server must tune the prompts",
            field="method",
            limit="a method with prompts at the cut, such as sfprompt",
            value=plan.model.prompt_at,
        )
    for number in range(1, rounds + 1):
        yield _observe_round(model, model.prompts, plan, number, basis)


def _observe_round(
    model: PooledModel,
    prompts: torch.nn.Parameter,
    plan: RunPlan,
    number: int,
    basis: Basis | None,
) -> ObservedRound:
    published = copy.deepcopy(model.tail)
    device = TorchModel(model.head, model.tail, None, model.train.preprocessing)
    training, wire = plan.training, plan.wire
    on_server = make_optimizer(training, prompts, None)
    on_device = make_optimizer(training, None, None if basis else model.tail)
    batches = _batches(model, plan, number)
    codec = get_codec(wire.gradients)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for step, positions in enumerate(batches):
        progress = (number - 1 + step / len(batches)) / plan.federation.rounds
        factor = learning_rate_factor(training, progress, plan.federation.rounds)
        set_progress(on_server, factor)
        set_progress(on_device, factor)
        images, labels = read(model.train, positions.numpy())
        with torch.no_grad():
            smashed = as_decoded(model.head(images), wire.smashed)
        features = model.body(smashed, prompts, model.tail.num_tokens)
        if basis is not None:
            features = basis.project(features)
        elif wire.pooled_features:
            features = for_the_tail(plan.model, features)
        sent = as_decoded(features.detach(), wire.features)
        _, gradient = train_tail(device, sent.clone(), labels)
        on_device.step()
        noise = None
        if wire.stochastic_rounding:
            seed = derive_seed(plan.seed, "rounding", number, step)
            noise = torch.Generator().manual_seed(seed)
        received = codec.decode(codec.encode(gradient, noise), gradient.shape)
        (prompts.grad,) = torch.autograd.grad(features, prompts, received)
        on_server.step()
        seen.append((sent, received, labels))
    sent, received, labels = (torch.cat(column) for column in zip(*seen, strict=True))
    return ObservedRound(number, published, sent, received, labels)


def _batches(model: PooledModel, plan: RunPlan, number: int) -> list[Tensor]:
    """The positions of a round's batches: a share of the samples, drawn at random."""
    size = plan.training.batch_size
    seed = derive_seed(plan.seed, "leak")
    order = torch.from_numpy(np.concatenate(shuffled(len(model.train), size, seed, number)))
    count = max(1, round(plan.training.keep_fraction * len(order)))
    return list(order[:count].split(size))
