"""FedProx on the device: its gradient by hand, and a whole phase against the written-out term."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edge_client.data.batches import shuffled
from edge_client.method import device_method
from edge_client.torch_model import TorchModel, read
from edge_client.training.local_update import local_update
from edge_client.training.proximal import Proximal
from edge_client.training.split_training import split_train
from protocol.seeds import derive_seed
from tests.support.edge import SMALL, BodyServer, device_model, round_context
from tuning_methods.custom.settings import Custom

SGD = {
    "optimizer": "sgd",
    "schedule": "constant",
    "prompt_learning_rate": 0.5,
    "tail_learning_rate": 0.1,
}

MU = 0.3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_gradient_is_mu_times_the_way_from_the_round_s_state() -> None:
    model = device_model(SMALL.model_copy(update={"tune": "bias"}))
    bias = model.head.blocks["0"].norm1.bias  # zeros in an untrained model
    proximal = Proximal(model, 0.5)
    with torch.no_grad():
        bias[0], bias[1] = 2.0, -4.0
        model.tail.trunk.head.bias[2] += 1.0
    bias.grad = torch.ones_like(bias)
    proximal.add_gradients()
    assert bias.grad[:3].tolist() == [1 + 0.5 * 2, 1 - 0.5 * 4, 1]
    assert model.tail.trunk.head.bias.grad.tolist() == [0, 0, 0.5]
    assert not model.prompts.grad.any()
    assert model.head.blocks["0"].norm1.weight.grad is None, "frozen"


def with_the_term(model: TorchModel, samples: int) -> None:
    """The same phase in plain torch, the term written into the loss."""
    tuned = [model.prompts, *model.tail.parameters()]
    start = [parameter.detach().clone() for parameter in tuned]
    optimizer = torch.optim.SGD(
        [{"params": tuned[:1], "lr": 0.5}, {"params": tuned[1:], "lr": 0.1}]
    )
    reader = round_context(model, samples=samples).samples.images
    for epoch in range(3):
        for positions in shuffled(samples, 4, derive_seed(5, "local", "device", 1), epoch):
            images, labels = read(reader, positions)
            loss = F.cross_entropy(model.tail(model.head(images, model.prompts)), labels)
            pairs = zip(tuned, start, strict=True)
            loss = loss + MU / 2 * sum((parameter - was).square().sum() for parameter, was in pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_the_local_update_minimises_the_loss_with_the_term() -> None:
    context = round_context(local_epochs=3, **SGD)
    context.proximal = Proximal(context.model, MU)
    local_update(context, device_method(Custom.of(context.run)).local_forward)
    reference, free = device_model(), round_context(local_epochs=3, **SGD)
    with_the_term(reference, 10)
    local_update(free, device_method(Custom.of(free.run)).local_forward)
    for name, value in context.model.state().items():
        np.testing.assert_allclose(value, reference.state()[name], rtol=0, atol=1e-5, err_msg=name)
    name = "tail.head.weight"
    assert np.abs(context.model.state()[name] - free.model.state()[name]).max() > 1e-3


def test_split_training_is_pulled_to_where_the_round_began() -> None:
    context = round_context(**{**SGD, "prompt_learning_rate": 0.0, "tail_learning_rate": 1.0})
    start = context.model.tail.trunk.head.bias.detach().clone()
    context.proximal = Proximal(context.model, 1.0)
    with torch.no_grad():
        context.model.tail.trunk.head.bias += torch.tensor([1000.0, 1000.0, 1000.0])
    # The loss does not see a shift that all classes share: one step of rate 1 takes it back.
    split_train(context, BodyServer().plane, np.arange(4))
    assert (context.model.tail.trunk.head.bias - start).abs().max() < 2
