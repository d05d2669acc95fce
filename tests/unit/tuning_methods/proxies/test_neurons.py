"""Neuron-level distillation: counting, ranking, and which neurons a redistillation changes."""

import pytest
import torch
from torch import Tensor

from split_model.backbone.libraries import timm
from split_model.checkpoints.state import head_tensors, initial_state
from split_model.errors import ModelPlanError
from split_model.parts.build import Layered, build_head
from tests.support.uncut_model import random_model, reduced
from tuning_methods.proxies.distillation import layer_loss, redistil_proxy, trace_layers
from tuning_methods.proxies.neurons import InactiveNeurons, neurons_shape, select_retained_neurons
from tuning_methods.proxies.settings import DistillationSettings
from tuning_methods.proxies.weights import insert_into_backbone, proxy_weights

DEPTH, WIDTH = 4, 32

FULL = reduced("vit_base_patch16_224").replace(
    cut=DEPTH,
    prompt_count=0,
    tune="lora",
    lora_rank=2,
    model_overrides=(("depth", DEPTH), ("embed_dim", 32), ("num_heads", 2), ("patch_size", 8)),
)

PRUNED = FULL.replace(mlp_widths=(0, WIDTH, WIDTH, 0))

SETTINGS = DistillationSettings(epochs=3, batch_size=8, learning_rate=5e-3, every=1, retained=0.25)

LAYERS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def backbone() -> dict[str, Tensor]:
    return {n: t.clone() for n, t in random_model(FULL).state_dict().items()}


def tuned(settings: object = PRUNED) -> dict[str, Tensor]:
    """Return a state whose LoRA changes the blocks' outputs."""
    generator = torch.Generator().manual_seed(3)
    state = initial_state(settings, backbone(), seed=0)
    return {
        n: torch.randn(t.shape, generator=generator) * 0.3 if "lora_" in n or n == "prompts" else t
        for n, t in state.items()
    }


def test_counts_equal_those_of_an_mlp_calculated_by_hand() -> None:
    """The first narrower MLP has constant neurons, and neuron 6 copies a token's first element."""
    head = build_head(PRUNED, Layered(head_tensors(tuned()), proxy_weights(PRUNED, backbone())))
    first = head.blocks["1"].mlp
    with torch.no_grad():
        first.fc1.weight.zero_()
        first.fc1.bias.fill_(1.0)  # GELU(1) is above 0
        first.fc1.bias[4] = -1.0  # GELU(-1) is below
        first.fc1.bias[5] = 0.0  # GELU(0) is 0: not above
        first.fc1.weight[6, 0] = 1.0
        first.fc1.bias[6] = 0.0  # its sign is the first element's
    inputs: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    neurons = InactiveNeurons(head)
    with torch.no_grad(), neurons.counting():
        head(images(5))
        head(images(2))
    hook.remove()
    tokens = 7 * head.sizes.tokens
    assert neurons.tokens == tokens
    assert neurons.counts.shape == (2, WIDTH) == neurons_shape(PRUNED)
    below = sum(int((given[:, :, 0] <= 0).sum()) for given in inputs)
    assert 0 < below < tokens
    expected = [0, 0, 0, 0, tokens, tokens, below] + [0] * (WIDTH - 7)
    assert neurons.counts[0].tolist() == expected
    assert neurons.shares[0, 6].item() == pytest.approx(below / tokens)
    with torch.no_grad():
        head(images(1))
    assert neurons.tokens == tokens, "nothing is counted afterwards"


def test_counts_equal_those_of_timms_model_with_the_proxys_weights() -> None:
    weights = proxy_weights(PRUNED, backbone())
    plain = PRUNED.replace(tune="tail")
    model = timm.create_model(
        "vit_base_patch16_224",
        img_size=24,
        num_classes=0,
        **dict(plain.model_overrides),
    ).eval()
    for number in (1, 2):
        mlp = model.blocks[number].mlp
        mlp.fc1, mlp.fc2 = torch.nn.Linear(32, WIDTH), torch.nn.Linear(WIDTH, 32)
    model.load_state_dict({n: t for n, t in weights.items() if not n.startswith("head.")})
    activations: dict[int, Tensor] = {}
    for number in (1, 2):
        model.blocks[number].mlp.act.register_forward_hook(
            lambda _, __, out, number=number: activations.update({number: out})
        )
    neurons = InactiveNeurons(head := build_head(plain, weights))
    with torch.no_grad(), neurons.counting():
        model(images(6))
        head(images(6))
    expected = [(~(activations[number] > 0)).flatten(0, 1).sum(dim=0).tolist() for number in (1, 2)]
    assert neurons.counts.tolist() == expected


def test_the_busiest_neurons_are_retained_and_the_first_of_equals() -> None:
    inactive = torch.tensor([[0.9, 0.1, 0.5, 0.1], [0.2, 0.2, 0.2, 0.2]])
    half = [[False, True, False, True], [True, True, False, False]]
    assert select_retained_neurons(inactive, 0.5).tolist() == half
    assert select_retained_neurons(inactive, 0.4).tolist() == half, "1.6 neurons are 2"
    assert not select_retained_neurons(inactive, 0.0).any()
    assert select_retained_neurons(inactive, 0.99).sum(dim=1).tolist() == [3, 3], (
        "one neuron is always distilled"
    )


@pytest.mark.parametrize("prompts", [0, 3])
def test_redistillation_lowers_the_loss_and_keeps_busy_neurons_bit_for_bit(prompts: int) -> None:
    settings = PRUNED.replace(prompt_count=prompts)
    weights, state = backbone(), tuned(settings)
    proxy = proxy_weights(settings, weights)
    before = {n: t.clone() for n, t in (weights | proxy).items()}
    generator = torch.Generator().manual_seed(7)
    inactive = torch.rand(2, WIDTH, generator=generator)
    distilled = redistil_proxy(
        settings, weights, proxy, state, inactive, images(), SETTINGS, seed=5
    )

    assert distilled.keys() == proxy.keys()
    assert all(torch.equal((weights | proxy)[n], t) for n, t in before.items())
    changed = {n for n, t in distilled.items() if not torch.equal(t, proxy[n])}
    assert changed == {f"blocks.{b}.mlp.{layer}" for b in (1, 2) for layer in LAYERS}
    for row, number in enumerate((1, 2)):
        busiest = set(inactive[row].argsort()[: WIDTH // 4].tolist())
        for neuron in range(WIDTH):
            mlp = f"blocks.{number}.mlp."
            same = {
                torch.equal(
                    distilled[mlp + "fc1.weight"][neuron], proxy[mlp + "fc1.weight"][neuron]
                ),
                torch.equal(distilled[mlp + "fc1.bias"][neuron], proxy[mlp + "fc1.bias"][neuron]),
                torch.equal(
                    distilled[mlp + "fc2.weight"][:, neuron], proxy[mlp + "fc2.weight"][:, neuron]
                ),
            }
            assert same == {neuron in busiest}

    full, full_state = insert_into_backbone(settings, state)
    pairs = [(str(b), str(b)) for b in range(DEPTH)]

    @torch.no_grad()
    def loss(tensors: dict[str, Tensor], *, lora: bool = True) -> float:
        given = state if lora else {n: torch.zeros_like(t) for n, t in state.items()}
        teacher = build_head(full, Layered(head_tensors(full_state), weights))
        student = build_head(settings, Layered(head_tensors(given), tensors))
        target = trace_layers(teacher, images(), state.get("prompts"))
        return float(
            layer_loss(target, trace_layers(student, images(), state.get("prompts")), pairs, 0.01)
        )

    assert loss(distilled) < 0.9 * loss(proxy)
    assert loss(distilled, lora=False) > loss(distilled), "teacher and student have LoRA"
    again = redistil_proxy(settings, weights, proxy, state, inactive, images(), SETTINGS, seed=5)
    assert all(torch.equal(again[n], t) for n, t in distilled.items())
    other = redistil_proxy(
        settings, weights, proxy, state, 1 - inactive, images(), SETTINGS, seed=5
    )
    assert not torch.equal(other["blocks.1.mlp.fc1.weight"], distilled["blocks.1.mlp.fc1.weight"])


def test_an_exception_before_a_batch_ends_the_work() -> None:
    class Stopped(Exception):
        pass

    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Stopped

    weights, proxy = backbone(), proxy_weights(PRUNED, backbone())
    with pytest.raises(Stopped):
        redistil_proxy(
            PRUNED, weights, proxy, tuned(), torch.zeros(2, WIDTH), images(), SETTINGS, 0, check
        )
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cut": 3}, "cut"),
        ({"mlp_widths": (0,) * DEPTH}, "mlp_widths"),
        ({"mlp_widths": (0, WIDTH, WIDTH // 2, 0)}, "mlp_widths"),
        ({"mlp_widths": ()}, "mlp_widths"),
    ],
)
def test_neurons_are_counted_only_in_a_whole_pruned_proxy(changes: dict, field: str) -> None:
    with pytest.raises(ModelPlanError) as caught:
        neurons_shape(PRUNED.replace(**changes))
    assert caught.value.field == f"model.{field}"
