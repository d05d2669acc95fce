"""Costs against values calculated by hand, timm's models and torch's counter."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from protocol.errors import InvalidField
from protocol.federation import FederationSettings
from protocol.plan import ModelPlan, RunPlan, TrainingPlan
from sfprompt_bench.cost.flops import count_flops, forward_flops
from sfprompt_bench.cost.method_cost import MethodCost, Question
from sfprompt_bench.estimate.calculator import estimate
from sfprompt_bench.methods.registry import ESTIMATED
from split_model.backbone.architecture import skeleton
from split_model.backbone.libraries import timm
from split_model.layers.prompts import prompt_shape
from split_model.parts.body import Body
from split_model.parts.head import Head
from split_model.parts.tail import Tail

WHOLE = 85_875_556  # ViT-B/16 with 100 classes

CLASSIFIER = 768 * 100 + 100

EMBEDDING = (3 * 16 * 16 * 768 + 768) + 768 + 197 * 768  # patches, class token, positions

BLOCK = 12 * 768 * 768 + 13 * 768

Q = 605_184  # bytes of 197 tokens

FEDERATED = [name for name in ESTIMATED if name.startswith(("fl-", "fedpeft-"))]


def base(*, cut: int = 1, prompts: int = 5, **training: float) -> RunPlan:
    """ViT-B/16 at 224 px with 100 classes."""
    return RunPlan(
        model=ModelPlan(
            backbone="vit_base_patch16_224",
            image_size=224,
            cut=cut,
            num_classes=100,
            prompt_count=prompts,
        ),
        federation=FederationSettings(rounds=50, evaluate_every=0),
        training=TrainingPlan.model_validate({"keep_fraction": 1, **training}),
    )


def tiny(**training: float) -> RunPlan:
    return RunPlan(
        model=ModelPlan(backbone="test_vit", image_size=32, cut=2, prompt_count=2),
        training=TrainingPlan.model_validate(training),
    )


@pytest.fixture(scope="module")
def thousand() -> dict[str, MethodCost]:
    return estimate(Question(base(keep_fraction=0.5), 1000))


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """timm's own ViT-B/16 with 100 classes, without memory."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model("vit_base_patch16_224", num_classes=100)
    return model


def numbers(tensors: object) -> int:
    return sum(tensor.numel() for tensor in tensors)  # type: ignore[attr-defined]


def test_each_method_has_a_cost_under_its_name(thousand: dict[str, MethodCost]) -> None:
    assert list(thousand) == [
        "fl-full",
        "fedpeft-head",
        "fedpeft-bias",
        "fedpeft-adapter",
        "fedpeft-prompt",
        "fed3r",
        "fedpft",
        "offsite-tuning",
        "splitfed-full",
        "splitfed-linear",
        "sfprompt-paper",
        "sfprompt",
    ]


@pytest.mark.parametrize(
    ("name", "millions", "digits"),
    [
        ("fl-full", 85.88, 2),
        ("fedpeft-head", 0.077, 3),
        ("fedpeft-bias", 0.18, 2),
        ("fedpeft-adapter", 0.23, 2),
        ("fedpeft-prompt", 0.169, 3),
    ],
)
def test_tuned_parameters_are_those_of_the_fedpeft_paper(
    thousand: dict[str, MethodCost], name: str, millions: float, digits: int
) -> None:
    assert round(thousand[name].trainable_parameters / 1e6, digits) == millions


def test_tuned_parameters_are_those_of_timms_model_with_each_method_added(
    thousand: dict[str, MethodCost], vit: nn.Module
) -> None:
    head = vit.get_submodule("head")
    biases = [p for n, p in vit.named_parameters() if n.endswith("bias") and n != "head.bias"]
    with torch.device("meta"):
        adapter = nn.Sequential(nn.Linear(768, 96), nn.GELU(), nn.Linear(96, 768))
        prompts = torch.empty(12, 10, 768)
    classifier = numbers(head.parameters())
    assert thousand["fl-full"].trainable_parameters == numbers(vit.parameters()) == WHOLE
    assert thousand["fedpeft-head"].trainable_parameters == classifier == CLASSIFIER
    assert thousand["fedpeft-bias"].trainable_parameters == classifier + numbers(biases)
    assert thousand["fedpeft-adapter"].trainable_parameters == classifier + numbers(
        adapter.parameters()
    )
    assert thousand["fedpeft-prompt"].trainable_parameters == classifier + prompts.numel()


def test_federated_methods_start_with_the_whole_model_and_send_what_they_tune(
    thousand: dict[str, MethodCost],
) -> None:
    for name in FEDERATED:
        cost = thousand[name]
        assert cost.bytes_start == 4 * WHOLE
        assert cost.bytes_up_per_round == cost.bytes_down_per_round
        assert cost.bytes_up_per_round == 4 * cost.trainable_parameters
    assert round(thousand["fl-full"].bytes_per_round / 1e6) == 687
    assert round(thousand["fedpeft-prompt"].bytes_up_per_round / 1e6, 2) == 0.68
    assert thousand["fl-full"].bytes_total(3) == 4 * WHOLE * 7


def test_fed3r_sends_products_of_features_once(thousand: dict[str, MethodCost]) -> None:
    cost, rows = thousand["fed3r"], 768 + 1
    assert cost.bytes_start == 4 * WHOLE
    assert cost.bytes_up_once == 4 * (rows * (rows + 1) // 2 + rows * 100)
    assert cost.bytes_up_per_round == cost.bytes_down_per_round == 4 * CLASSIFIER
    # Of an image: a forward pass without the classifier, and a product of each pair of features.
    head = ESTIMATED["fedpeft-head"].cost(Question(base(), 1000, local_epochs=1))
    forward = head.flops_total(1) // 1000 - 2 * (2 * 768 * 100)
    assert cost.flops_total(1) == 1000 * (forward + 2 * rows**2), "one epoch, whatever others do"


def test_a_visit_of_the_paper_moves_four_tensors_of_a_sample() -> None:
    def moved(samples: int, prompts: int) -> int:
        return (
            ESTIMATED["sfprompt-paper"]
            .cost(Question(base(prompts=prompts), samples))
            .bytes_total(1)
        )

    assert moved(8, 0) - moved(7, 0) == 4 * Q
    assert moved(8, 5) - moved(7, 5) == 4 * 202 * 768 * 4


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(("keep", "kept"), [(0.3, 30), (0.125, 13), (1, 100)])
def test_the_papers_form_costs_what_its_formula_says(keep: float, kept: int, epochs: int) -> None:
    run = base(keep_fraction=keep, split_epochs=epochs)
    cost = ESTIMATED["sfprompt-paper"].cost(Question(run, 100, test_samples=40))
    head, tail, prompts = EMBEDDING + BLOCK, 2 * 768 + CLASSIFIER, 5 * 768
    crossing = 4 * (202 * 768 * 4) * epochs * kept
    assert cost.trainable_parameters == tail + prompts
    assert cost.bytes_start == 4 * (head + tail + prompts)
    assert cost.bytes_per_round == 2 * 4 * (tail + prompts) + crossing
    assert cost.bytes_up_per_round == cost.bytes_down_per_round
    assert cost.bytes_total(10) == cost.bytes_start + 10 * cost.bytes_per_round


def test_the_papers_form_is_the_same_whatever_the_runs_placement_and_codecs_are() -> None:
    plain = base(prompts=5)
    changed = plain.model_dump()
    changed["model"] |= {"prompt_at": "cut", "prompt_depth": "deep"}
    changed["wire"] |= {"keep_smashed": True, "pooled_features": True, "smashed": "float16"}
    other = RunPlan.model_validate(changed)
    paper = ESTIMATED["sfprompt-paper"]
    assert paper.cost(Question(plain, 64)) == paper.cost(Question(other, 64))


def test_merging_tokens_lowers_the_cost_of_sfprompt_alone() -> None:
    values = base(prompts=5).model_dump()
    values["model"] |= {"prompt_at": "cut", "prompt_depth": "deep"}
    values["wire"] |= {"keep_smashed": True, "pooled_features": True}
    every = estimate(Question(RunPlan.model_validate(values), 64))
    values["model"]["keep_tokens"] = 98
    half = estimate(Question(RunPlan.model_validate(values), 64))
    own, merged = every.pop("sfprompt"), half.pop("sfprompt")
    assert half == every
    saved = own.bytes_up_once - merged.bytes_up_once
    assert saved == 64 * (196 - 98) * 768 * 4  # float32


def test_splitfed_sends_all_samples_and_what_the_device_trains() -> None:
    question = Question(base(split_epochs=2, keep_fraction=0.5), 100)
    full = ESTIMATED["splitfed-full"].cost(question)
    linear = ESTIMATED["splitfed-linear"].cost(question)
    device = EMBEDDING + BLOCK + 2 * 768 + CLASSIFIER
    assert full.bytes_start == linear.bytes_start == 4 * device
    assert full.bytes_per_round == 2 * 4 * device + 4 * Q * 200
    # Nothing is tuned before the tail: smashed data and features alone.
    assert linear.bytes_up_per_round == linear.bytes_down_per_round == 4 * CLASSIFIER + Q * 200
    assert (full.trainable_parameters, linear.trainable_parameters) == (WHOLE, CLASSIFIER)


@pytest.mark.parametrize("tuned", ["bias", "full"])
def test_what_a_run_tunes_does_not_change_what_a_method_costs(tuned: str) -> None:
    plain = base(prompts=0)
    values = plain.model_dump()
    values["model"] |= {"tune": tuned, "tune_body": tuned == "full"}
    question = Question(RunPlan.model_validate(values), 10)
    for name in ("fl-full", "splitfed-full"):
        assert ESTIMATED[name].cost(question) == ESTIMATED[name].cost(Question(plain, 10))


def test_operations_follow_from_those_of_a_block_worked_out_by_hand() -> None:
    tokens, width = 197, 768
    block = 2 * 12 * tokens * width**2 + 4 * tokens**2 * width  # layers; scores and their use
    patches = 2 * 196 * (3 * 16 * 16) * width
    classifier = 2 * width * 100
    forward = patches + 12 * block + classifier
    costs = estimate(Question(base(prompts=0), 10, local_epochs=3))
    visits = 30
    assert costs["fl-full"].device_flops_per_round == visits * 3 * forward
    assert costs["fedpeft-head"].device_flops_per_round == visits * (forward + classifier)
    bias = forward + 12 * block + 2 * classifier
    assert costs["fedpeft-bias"].device_flops_per_round == visits * bias
    adapter = 12 * tokens * 2 * (768 * 96 + 96 * 768)
    shared = forward + 11 * block + 2 * classifier + 3 * adapter
    assert costs["fedpeft-adapter"].device_flops_per_round == visits * shared
    head = patches + block
    split = 10  # one epoch
    assert costs["splitfed-full"].device_flops_per_round == split * 3 * (head + classifier)
    assert costs["splitfed-linear"].device_flops_per_round == split * (head + 3 * classifier)
    assert round(forward / 2 / 1e9, 1) == 17.6  # products and sums together, as papers count


def test_prompt_tokens_are_computed_too() -> None:
    tokens, width = 207, 768
    block = 2 * 12 * tokens * width**2 + 4 * tokens**2 * width
    patches, classifier = 2 * 196 * 768 * width, 2 * width * 100
    cost = ESTIMATED["fedpeft-prompt"].cost(Question(base(), 7, local_epochs=1))
    assert cost.device_flops_per_round == 7 * (patches + 24 * block + 3 * classifier)


@pytest.mark.parametrize("keep", [0.5, 1])
def test_the_papers_form_computes_scores_local_update_and_split_training(keep: float) -> None:
    def block(tokens: int) -> int:
        return 2 * 12 * tokens * 768**2 + 4 * tokens**2 * 768

    patches, tail = 2 * 196 * 768 * 768, 2 * 768 * 100
    run = base(keep_fraction=keep, local_epochs=2, split_epochs=3)
    cost = ESTIMATED["sfprompt-paper"].cost(Question(run, 100))
    scored = 0 if keep == 1 else 100 * (patches + block(197) + tail)
    visits = 2 * 100 + 3 * round(100 * keep)
    visit = (patches + block(202)) + block(202) + 3 * tail
    assert cost.device_flops_per_round == scored + visits * visit


def count_forward(step: Callable[[], Tensor]) -> int:
    with torch.no_grad():
        return count_flops(step)


def counted(loss: object) -> int:
    """torch's own count of a forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        loss().sum().backward()  # type: ignore[operator]
    return int(counter.get_total_flops())


def test_full_fine_tuning_computes_what_torch_counts(vit: nn.Module) -> None:
    images = torch.empty(1, 3, 224, 224, device="meta")
    cost = ESTIMATED["fl-full"].cost(Question(base(), 1, local_epochs=1))
    # torch computes no gradient of the images, and its attention may recompute scores.
    assert cost.device_flops_per_round == pytest.approx(counted(lambda: vit(images)), rel=0.03)


def test_passing_a_gradient_on_computes_about_what_torch_counts(vit: nn.Module) -> None:
    images = torch.empty(1, 3, 224, 224, device="meta")
    tuned = {n for n, _ in vit.named_parameters() if n.endswith("bias") or n.startswith("head.")}
    try:
        for name, parameter in vit.named_parameters():
            parameter.requires_grad_(name in tuned)
        reference = counted(lambda: vit(images))
    finally:
        vit.requires_grad_(True)
    cost = ESTIMATED["fedpeft-bias"].cost(Question(base(), 1, local_epochs=1))
    # Attention has no weights: its backward pass is 2x even where everything is frozen.
    assert cost.device_flops_per_round == pytest.approx(reference, rel=0.05)
    assert cost.device_flops_per_round < reference


def test_a_split_step_of_the_paper_computes_about_what_torch_counts() -> None:
    run = base(cut=3, local_epochs=0)
    split = run.model
    head, tail = Head(split), Tail(split)
    for parameter in head.parameters():
        parameter.requires_grad_(False)
    for parameter in tail.parameters():
        parameter.requires_grad_(True)
    prompts = torch.empty(5, 768, device="meta", requires_grad=True)
    images = torch.empty(1, 3, 224, 224, device="meta")

    def step() -> Tensor:
        loss: Tensor = tail(head(images, prompts))
        return loss

    cost = ESTIMATED["sfprompt-paper"].cost(Question(run, 1))
    assert cost.device_flops_per_round == pytest.approx(counted(step), rel=0.05)


@pytest.mark.parametrize(
    "backbone",
    ["vit_small_patch14_dinov2", "eva02_tiny_patch14_224", "beit_base_patch16_224"],
)
@pytest.mark.parametrize(("prompt_at", "prompts"), [("input", 3), ("cut", 3), ("input", 0)])
def test_every_block_of_a_backbone_computes_the_same(
    backbone: str, prompt_at: str, prompts: int
) -> None:
    split = ModelPlan(
        backbone=backbone,
        image_size=56 if "14" in backbone else 64,
        cut=2,
        tail_blocks=3,
        prompt_at=prompt_at,  # type: ignore[arg-type]
        prompt_count=prompts,
    )
    side = split.image_size
    images = torch.empty(1, 3, side, side, device="meta")
    tokens = torch.empty(prompt_shape(split), device="meta") if prompts else None
    in_head, in_body = (None, tokens) if prompt_at == "cut" else (tokens, None)
    head, body, tail, uncut = Head(split), Body(split), Tail(split), skeleton(split)
    smashed = head(images, in_head)
    features = body(smashed, in_body)
    flops = forward_flops(split, prompts)
    bare = forward_flops(split)
    head_block = bare.block if prompt_at == "cut" else flops.block
    for step, expected in (
        (lambda: head(images, in_head), flops.embedding + 2 * head_block),
        (lambda: body(smashed, in_body), (flops.depth - 5) * flops.block),
        (lambda: tail(features), 3 * flops.block + flops.output),
        (lambda: uncut(images), bare.whole),
    ):
        assert count_forward(step) == expected


def test_memory_of_full_fine_tuning_is_the_formulas() -> None:
    cost = ESTIMATED["fl-full"].cost(Question(base(batch_size=4), 10))
    kept = 3 * 224 * 224 + 12 * 197 * 16 * 768 + 197 * 768
    assert cost.device_peak_bytes == 4 * (4 * WHOLE + 4 * kept)


def test_a_device_of_a_split_method_needs_far_less_memory(
    thousand: dict[str, MethodCost],
) -> None:
    full = thousand["fl-full"].device_peak_bytes
    for name in ("splitfed-full", "splitfed-linear", "sfprompt-paper", "sfprompt"):
        assert thousand[name].device_peak_bytes < full / 5


@given(
    fewer=st.integers(1, 400),
    more=st.integers(0, 400),
    tests=st.integers(0, 50),
    keep=st.floats(0.01, 1),
    epochs=st.integers(1, 3),
    rounds=st.integers(1, 20),
    at_cut=st.booleans(),
)
@settings(deadline=None, max_examples=15)
def test_more_samples_never_cost_less(
    fewer: int, more: int, tests: int, keep: float, epochs: int, rounds: int, at_cut: bool
) -> None:
    values = tiny(keep_fraction=keep, split_epochs=epochs).model_dump()
    if at_cut:
        values["model"]["prompt_at"] = "cut"
        values["wire"] |= {"keep_smashed": True, "pooled_features": True, "features": "int8"}
    run = RunPlan.model_validate(values)
    small = estimate(Question(run, fewer, tests, local_epochs=epochs))
    large = estimate(Question(run, fewer + more, tests + more, local_epochs=epochs))
    for name, cost in small.items():
        assert large[name].bytes_total(rounds) >= cost.bytes_total(rounds)
        assert large[name].flops_total(rounds) >= cost.flops_total(rounds)
        assert large[name].device_peak_bytes >= cost.device_peak_bytes
        assert large[name].trainable_parameters == cost.trainable_parameters


@given(every=st.integers(0, 9), rounds=st.integers(0, 40))
def test_the_last_round_is_evaluated_and_every_so_many_before_it(every: int, rounds: int) -> None:
    cost = MethodCost(1, 100, 0, 0, 0, 1, bytes_down_per_evaluation=1, evaluate_every=every)
    evaluated = [r for r in range(1, rounds + 1) if every and (r % every == 0 or r == rounds)]
    assert cost.bytes_total(rounds) == 100 + len(evaluated)


def test_no_rounds_cost_the_start_alone() -> None:
    cost = ESTIMATED["sfprompt"].cost(Question(tiny(), 10, 5))
    assert cost.bytes_total(0) == cost.bytes_start
    assert cost.flops_total(0) == 0


@pytest.mark.parametrize("method", ["bytes_total", "flops_total"])
def test_fewer_rounds_than_none_are_refused(method: str) -> None:
    cost = MethodCost(1, 1, 1, 1, 1, 1)
    with pytest.raises(InvalidField) as caught:
        getattr(cost, method)(-1)
    assert (caught.value.field, caught.value.value) == ("rounds", -1)


@pytest.mark.parametrize(
    ("field", "value"), [("train_samples", 0), ("test_samples", -1), ("local_epochs", 0)]
)
def test_a_question_below_a_limit_is_refused(field: str, value: int) -> None:
    question = Question(tiny(), 1)
    with pytest.raises(InvalidField) as caught:
        dataclasses.replace(question, **{field: value})  # type: ignore[arg-type]
    assert (caught.value.field, caught.value.value) == (field, value)
