"""Head, body and tail: their memory, the shapes they accept, and joined batches."""

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from protocol.plan import ModelPlan
from split_model.errors import TokenCountError, WeightsMismatchError
from split_model.layers.prompts import initial_prompts, prompt_shape
from split_model.parts.build import build_body, build_head, build_tail
from split_model.parts.tail import for_the_tail
from tests.support.uncut_model import difference, random_model, reduced


class Recorded(Mapping[str, Tensor]):
    """Weights that record the names read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


NAMES = [
    "vit_base_patch16_224",
    "vit_base_patch16_rope_mixed_224",
    "beit_base_patch16_224",
    "vit_base_patch16_dinov3",
]


@pytest.mark.parametrize("name", [*NAMES, "deit_tiny_distilled_patch16_224"])
def test_each_part_reads_only_its_tensors(name: str) -> None:
    settings = reduced(name).replace(cut=1)
    weights = random_model(settings).state_dict()
    reads = []
    for build in (build_head, build_body, build_tail):
        recorded = Recorded(weights)
        part = build(settings, recorded)
        assert recorded.read == set(part.names())
        reads.append(recorded.read)
        assert not any(tensor.is_meta for tensor in [*part.parameters(), *part.buffers()])
        assert not part.training
        assert not part.train().training
    head, body, tail = reads
    assert head | body | tail == set(weights)
    shared = head & body | head & tail | body & tail
    assert shared <= {"rope.freqs"}  # nothing else is in two parts
    assert not any(name.startswith("blocks.1.") for name in head)
    assert all(name.startswith(("blocks.1.", "rope.")) for name in body)


def test_head_and_body_are_frozen_and_the_tail_is_not() -> None:
    settings = reduced("vit_base_patch16_224").replace(tail_blocks=1)
    weights = random_model(settings).state_dict()
    for part in (build_head(settings, weights), build_body(settings, weights)):
        assert not any(parameter.requires_grad for parameter in part.parameters())
    tail = build_tail(settings, weights)
    assert all(parameter.requires_grad for parameter in tail.parameters())
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter.zero_()
    assert weights["norm.weight"].abs().max() > 0  # a tail copies its tensors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", ["shallow", "deep"])
def test_joining_participants_in_a_batch_changes_no_result(name: str, depth: str) -> None:
    settings = reduced(name).replace(cut=0, prompt_at="cut", prompt_depth=depth)
    body = build_body(settings, random_model(settings).state_dict())
    tokens = body.sizes.tokens
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, tokens, 32, generator=generator) for _ in range(2))
    mine, other = (torch.randn(prompt_shape(settings), generator=generator) for _ in range(2))
    mine.requires_grad_()
    alone = body(first, mine)
    alone.sin().sum().backward()
    assert mine.grad is not None
    grad, mine.grad = mine.grad, None

    per_sample = torch.stack([mine, mine, other, other])  # (B, L, P, D)
    joined = body(torch.cat([first, second]), per_sample)
    assert difference(joined[:2], alone) <= 1e-5
    assert difference(joined[2:], body(second, other)) <= 1e-5
    joined[:2].sin().sum().backward()
    assert difference(mine.grad, grad) <= 1e-4


@pytest.mark.parametrize("name", [*NAMES, "eva02_base_patch14_224", "vit_pe_core_base_patch16_224"])
def test_a_bfloat16_body_on_a_cpu_has_float32_activations(name: str) -> None:
    settings = reduced(name).replace(cut=0)
    weights = random_model(settings).state_dict()
    exact, coarse = (
        build_body(settings, weights),
        build_body(settings, weights, dtype=torch.bfloat16),
    )
    tokens = torch.randn(2, exact.sizes.tokens + 3, 32, generator=torch.Generator().manual_seed(0))
    leaves, results = (tokens.clone(), tokens.clone()), []
    for body, leaf in zip((exact, coarse), leaves, strict=True):
        results.append(body(leaf.requires_grad_(), None, 1))
        results[-1].sin().sum().backward()
    (wanted, result), gradient = results, leaves[1].grad
    assert result.dtype == torch.float32
    assert 0 < difference(result, wanted) < 0.02
    assert gradient is not None
    assert leaves[0].grad is not None
    assert difference(gradient, leaves[0].grad) < 0.03
    assert coarse.blocks["0"].attn.proj.weight.dtype == torch.bfloat16
    again = build_body(settings, {n: coarse.state_dict()[o] for n, o in coarse.names().items()})
    assert difference(again(tokens), exact(tokens)) < 0.02


@pytest.mark.parametrize("depth", ["shallow", "deep"])
def test_prompts_at_the_cut_get_their_gradient_through_bfloat16(depth: str) -> None:
    settings = reduced("vit_small_patch14_dinov2").replace(
        cut=1, prompt_at="cut", prompt_depth=depth
    )
    weights = random_model(settings).state_dict()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(prompt_shape(settings), generator=generator)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        body = build_body(settings, weights, dtype=dtype)
        tokens = torch.randn(2, body.sizes.tokens, 32, generator=torch.Generator().manual_seed(1))
        leaf = prompts.clone().requires_grad_()
        body(tokens, leaf, 1).sin().sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert difference(gradients[1], gradients[0]) < 0.03


def test_head_to_tail_works_with_and_without_prompts() -> None:
    settings = reduced("vit_base_patch16_siglip_224").replace(cut=1)
    weights = random_model(settings).state_dict()
    head, tail = build_head(settings, weights), build_tail(settings, weights)
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    prompts = initial_prompts(settings, 0) + head.embed(images).mean(dim=(0, 1)).detach()
    plain, prompted = head(images), head(images, prompts)
    assert plain.shape == (2, 9, 32)
    assert prompted.shape == (2, 12, 32)
    assert tail(plain).shape == tail(prompted).shape == (2, 5)
    assert difference(tail(plain), tail(prompted)) > 1e-3


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_the_tail_reads_num_tokens_leading_tokens(name: str) -> None:
    settings = reduced(name)
    tail = build_tail(settings, random_model(settings).state_dict())
    features = torch.randn(2, tail.sizes.tokens + 3, 32, generator=torch.Generator().manual_seed(0))
    assert tail.num_tokens is not None
    assert difference(tail(features[:, : tail.num_tokens]), tail(features)) <= 1e-6
    with_blocks = settings.replace(tail_blocks=1)
    assert build_tail(with_blocks, random_model(with_blocks).state_dict()).num_tokens is None


def test_wrong_shapes_are_refused() -> None:
    settings = reduced("vit_base_patch16_224")
    weights = random_model(settings).state_dict()
    head, body, tail = (build(settings, weights) for build in (build_head, build_body, build_tail))
    good = torch.zeros(1, 10, 32)
    with pytest.raises(TokenCountError, match="field: images"):
        head(torch.zeros(1, 3, 24, 25))
    with pytest.raises(TokenCountError, match="field: prompts"):
        head(torch.zeros(1, 3, 24, 24), torch.zeros(4, 32))
    for part, field in ((body, "smashed data"), (tail, "features")):
        for bad in (torch.zeros(1, 11, 32), torch.zeros(1, 10, 31), torch.zeros(10, 32)):
            with pytest.raises(TokenCountError, match=field) as caught:
                part(bad)
            assert caught.value.value == list(bad.shape)
    with pytest.raises(TokenCountError, match="absent"):
        body(good, torch.zeros(1, 3, 32))
    at_cut = settings.replace(prompt_at="cut")
    body = build_body(at_cut, weights)
    with pytest.raises(TokenCountError, match="absent"):
        body(torch.zeros(1, 13, 32), torch.zeros(1, 3, 32))
    for prompts in (torch.zeros(3, 32), torch.zeros(2, 3, 32), torch.zeros(2, 1, 3, 32)):
        with pytest.raises(TokenCountError, match="prompts"):
            body(good, prompts)


def test_weights_that_do_not_fit_are_refused() -> None:
    settings: ModelPlan = reduced("vit_base_patch16_224")
    weights = dict(random_model(settings).state_dict())
    weights["pos_embed"] = torch.zeros(1, 3, 32)
    with pytest.raises(WeightsMismatchError) as caught:
        build_head(settings, weights)
    assert caught.value.field == "pos_embed"
    del weights["norm.bias"]
    with pytest.raises(WeightsMismatchError, match="missing"):
        build_tail(settings, weights)


def test_initial_prompts() -> None:
    settings = reduced("vit_base_patch16_224").replace(prompt_count=200)
    prompts = initial_prompts(settings, 7)
    assert prompts.shape == (200, 32)
    assert prompts.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(prompts, initial_prompts(settings, 7))
    assert not torch.equal(prompts, initial_prompts(settings, 8))
    deep = settings.replace(prompt_at="cut", prompt_depth="deep", cut=0)
    assert initial_prompts(deep, 7).shape == (2, 200, 32)
    before = torch.get_rng_state()
    initial_prompts(settings, 9)
    assert torch.equal(before, torch.get_rng_state())  # the global generator is unchanged


@pytest.mark.parametrize(
    "name", ["vit_little_patch16_reg1_gap_256", "beitv2_base_patch16_224", "eva02_tiny_patch14_224"]
)
def test_a_tail_that_averages_reads_the_mean_of_the_image_tokens(name: str) -> None:
    settings = reduced(name)
    tail = build_tail(settings, random_model(settings).state_dict())
    sizes, width = tail.sizes, tail.sizes.width
    features = torch.randn(
        2, sizes.tokens + 3, width, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    short = for_the_tail(settings, features)
    assert short.shape == (2, 1, width)
    assert difference(tail(short), tail(features)) <= 1e-6
    (through_mean,) = torch.autograd.grad(tail(short).square().sum(), features)
    (through_all,) = torch.autograd.grad(tail(features).square().sum(), features)
    assert difference(through_mean, through_all) <= 1e-6
