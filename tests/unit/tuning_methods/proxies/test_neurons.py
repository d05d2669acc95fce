"""Neuron-level distillation: counting, ranking, and what a renewed proxy keeps."""

import pytest
import torch
from torch import Tensor

from protocol.distillation import DistillationSettings
from split_model import ModelPlanError, build_head, initial_state
from split_model.backbone.libraries import timm
from split_model.checkpoints.state import head_tensors
from split_model.parts.build import Layered
from tests.support.uncut_model import random_model, reduced
from tuning_methods.proxies.distillation import layer_loss, redistilled_proxy, traced
from tuning_methods.proxies.neurons import InactiveNeurons, neurons_shape, stay
from tuning_methods.proxies.weights import plugged, proxy_weights

DEPTH, WIDTH = 4, 32

FULL = reduced("vit_base_patch16_224").replace(
    cut=DEPTH,
    prompt_count=0,
    tune="lora",
    lora_rank=2,
    model_overrides=(("depth", DEPTH), ("embed_dim", 32), ("num_heads", 2), ("patch_size", 8)),
)

PRUNED = FULL.replace(proxy="pruned", proxy_width=WIDTH)

HOW = DistillationSettings(epochs=3, batch_size=8, learning_rate=5e-3, every=1, retained=0.25)

LAYERS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def backbone() -> dict[str, Tensor]:
    return {n: t.clone() for n, t in random_model(FULL).state_dict().items()}


def tuned(settings: object = PRUNED) -> dict[str, Tensor]:
    """A state whose LoRA changes what the blocks do."""
    generator = torch.Generator().manual_seed(3)
    state = initial_state(settings, backbone(), seed=0)
    return {
        n: torch.randn(t.shape, generator=generator) * 0.3 if "lora_" in n or n == "prompts" else t
        for n, t in state.items()
    }


def test_what_is_counted_is_what_a_mlp_worked_out_by_hand_does() -> None:
    """Each neuron of the proxy's first narrower MLP reads one token value, its sign turned."""
    head = build_head(PRUNED, Layered(head_tensors(tuned()), proxy_weights(PRUNED, backbone())))
    first = head.blocks["1"].mlp
    with torch.no_grad():
        first.fc1.weight.zero_()
        first.fc1.bias.fill_(1.0)  # GELU(1) is above 0
        first.fc1.bias[4] = -1.0  # GELU(-1) is below
        first.fc1.bias[5] = 0.0  # GELU(0) is 0: not above
        first.fc1.weight[6, 0] = 1.0
        first.fc1.bias[6] = 0.0  # as the sign of the first value says
    inputs: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    found = InactiveNeurons(head)
    with torch.no_grad(), found.counting():
        head(images(5))
        head(images(2))
    hook.remove()
    tokens = 7 * head.sizes.tokens
    assert found.tokens == tokens
    assert found.counts.shape == (2, WIDTH) == neurons_shape(PRUNED)
    below = sum(int((given[:, :, 0] <= 0).sum()) for given in inputs)
    assert 0 < below < tokens
    expected = [0, 0, 0, 0, tokens, tokens, below] + [0] * (WIDTH - 7)
    assert found.counts[0].tolist() == expected
    assert found.shares[0, 6].item() == pytest.approx(below / tokens)
    with torch.no_grad():
        head(images(1))
    assert found.tokens == tokens, "nothing is counted afterwards"


def test_timm_s_own_model_of_the_proxy_s_weights_counts_the_same() -> None:
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
    made: dict[int, Tensor] = {}
    for number in (1, 2):
        model.blocks[number].mlp.act.register_forward_hook(
            lambda _, __, out, number=number: made.update({number: out})
        )
    found = InactiveNeurons(head := build_head(plain, weights))
    with torch.no_grad(), found.counting():
        model(images(6))
        head(images(6))
    expected = [(~(made[number] > 0)).flatten(0, 1).sum(dim=0).tolist() for number in (1, 2)]
    assert found.counts.tolist() == expected


def test_the_busiest_stay_and_of_equals_the_first() -> None:
    inactive = torch.tensor([[0.9, 0.1, 0.5, 0.1], [0.2, 0.2, 0.2, 0.2]])
    half = [[False, True, False, True], [True, True, False, False]]
    assert stay(inactive, 0.5).tolist() == half
    assert stay(inactive, 0.4).tolist() == half, "1.6 neurons are 2"
    assert not stay(inactive, 0.0).any()
    assert stay(inactive, 0.99).sum(dim=1).tolist() == [3, 3], "something is distilled"


@pytest.mark.parametrize("prompts", [0, 3])
def test_a_renewed_proxy_is_nearer_and_its_busy_neurons_are_the_same_bits(prompts: int) -> None:
    settings = PRUNED.replace(prompt_count=prompts)
    weights, state = backbone(), tuned(settings)
    proxy = proxy_weights(settings, weights)
    before = {n: t.clone() for n, t in (weights | proxy).items()}
    generator = torch.Generator().manual_seed(7)
    inactive = torch.rand(2, WIDTH, generator=generator)
    made = redistilled_proxy(settings, weights, proxy, state, inactive, images(), HOW, seed=5)

    assert made.keys() == proxy.keys()
    assert all(torch.equal((weights | proxy)[n], t) for n, t in before.items())
    changed = {n for n, t in made.items() if not torch.equal(t, proxy[n])}
    assert changed == {f"blocks.{b}.mlp.{layer}" for b in (1, 2) for layer in LAYERS}
    for row, number in enumerate((1, 2)):
        busiest = set(inactive[row].argsort()[: WIDTH // 4].tolist())
        for neuron in range(WIDTH):
            mlp = f"blocks.{number}.mlp."
            same = {
                torch.equal(made[mlp + "fc1.weight"][neuron], proxy[mlp + "fc1.weight"][neuron]),
                torch.equal(made[mlp + "fc1.bias"][neuron], proxy[mlp + "fc1.bias"][neuron]),
                torch.equal(
                    made[mlp + "fc2.weight"][:, neuron], proxy[mlp + "fc2.weight"][:, neuron]
                ),
            }
            assert same == {neuron in busiest}

    full, whole = plugged(settings, state)
    pairs = [(str(b), str(b)) for b in range(DEPTH)]

    @torch.no_grad()
    def loss(own: dict[str, Tensor], *, lora: bool = True) -> float:
        given = state if lora else {n: torch.zeros_like(t) for n, t in state.items()}
        teacher = build_head(full, Layered(head_tensors(whole), weights))
        pupil = build_head(settings, Layered(head_tensors(given), own))
        wanted = traced(teacher, images(), state.get("prompts"))
        return float(layer_loss(wanted, traced(pupil, images(), state.get("prompts")), pairs, 0.01))

    assert loss(made) < 0.9 * loss(proxy)
    assert loss(made, lora=False) > loss(made), "what is tuned is in both"
    again = redistilled_proxy(settings, weights, proxy, state, inactive, images(), HOW, seed=5)
    assert all(torch.equal(again[n], t) for n, t in made.items())
    other = redistilled_proxy(settings, weights, proxy, state, 1 - inactive, images(), HOW, seed=5)
    assert not torch.equal(other["blocks.1.mlp.fc1.weight"], made["blocks.1.mlp.fc1.weight"])


def test_the_work_ends_where_it_is_told_to() -> None:
    class Enough(Exception):
        pass

    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Enough

    weights, proxy = backbone(), proxy_weights(PRUNED, backbone())
    with pytest.raises(Enough):
        redistilled_proxy(
            PRUNED, weights, proxy, tuned(), torch.zeros(2, WIDTH), images(), HOW, 0, check
        )
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"cut": 3}, "cut"), ({"proxy_ends": 2}, "proxy_ends"), ({"proxy": "none"}, "proxy")],
)
def test_neurons_are_counted_where_the_whole_proxy_is(changes: dict, field: str) -> None:
    with pytest.raises(ModelPlanError) as caught:
        neurons_shape(PRUNED.replace(**changes))
    assert caught.value.field == f"model.{field}"
