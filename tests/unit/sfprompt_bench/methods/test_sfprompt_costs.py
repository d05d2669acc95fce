"""The cost of SFPrompt: placement, codecs and switches of a run."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codecs import get_codec
from protocol.errors import InvalidField, UnknownCodec
from protocol.plan import RunPlan
from sfprompt_bench.cost.method_cost import MethodCost, Question
from sfprompt_bench.cost.sizes import samples_bytes, tensor_bytes
from sfprompt_bench.methods.registry import ESTIMATED

HEAD = (3 * 16 * 16 * 768 + 768) + 768 + 197 * 768 + 12 * 768 * 768 + 13 * 768

CLASSIFIER = 768 * 100 + 100

TAIL = 2 * 768 + CLASSIFIER

NUMBERS = 197 * 768  # of one sample's smashed data without prompts

PATCHES, OUTPUT = 2 * 196 * 768 * 768, 2 * 768 * 100  # operations

BLOCK = 2 * 12 * 197 * 768**2 + 4 * 197**2 * 768


def own(
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    wire: dict[str, Any] | None = None,
    every: int = 0,
    train: int = 10,
    test: int = 0,
) -> MethodCost:
    """ViT-B/16 cut at block 1, 10 prompts at the cut, everything kept, in batches of 4."""
    run = RunPlan.model_validate(
        {
            "model": {
                "backbone": "vit_base_patch16_224",
                "image_size": 224,
                "cut": 1,
                "num_classes": 100,
                "prompt_at": "cut",
                "prompt_count": 10,
            }
            | (model or {}),
            "federation": {"evaluate_every": every, "rounds": 20},
            "training": {"batch_size": 4, "keep_fraction": 1} | (training or {}),
            "wire": wire or {},
        }
    )
    return ESTIMATED["sfprompt"].cost(Question(run, train, test))


KEPT = {"keep_smashed": True, "pooled_features": True}


def test_with_shared_labels_samples_names_and_labels_cross_once_and_nothing_else() -> None:
    model = {"prompt_count": 0, "depths": 4, "rank": 64}
    training = {"split_epochs": 0, "local_epochs": 1, "labels": "shared"}
    cost = own(model=model, wire=KEPT, training=training, every=1, test=5)
    assert cost.bytes_start == 4 * (HEAD + 64 * 100 + 100)
    assert cost.bytes_up_once == 15 * (4 * NUMBERS + 16 + 16 + 8)
    assert cost.bytes_total(20) == cost.bytes_start + cost.bytes_up_once


def test_kept_smashed_data_cross_once_and_visits_carry_names_and_class_tokens() -> None:
    cost = own(wire=KEPT, training={"split_epochs": 3})
    visits = 30
    assert cost.bytes_start == 4 * (HEAD + TAIL)  # the prompts stay on the server
    assert cost.bytes_up_once == 10 * (4 * NUMBERS + 16)
    assert cost.bytes_up_per_round == 4 * TAIL + visits * (16 + 4 * 768)
    assert cost.bytes_down_per_round == 4 * TAIL + visits * 4 * 768
    assert cost.bytes_total(2) == cost.bytes_start + cost.bytes_up_once + 2 * cost.bytes_per_round


def test_prompts_at_the_cut_are_tuned_but_never_cross() -> None:
    shallow, deep = own(), own(model={"prompt_depth": "deep"})
    assert shallow.trainable_parameters == TAIL + 10 * 768
    assert deep.trainable_parameters == TAIL + 11 * 10 * 768  # the body has 11 blocks
    assert deep.bytes_total(5) == shallow.bytes_total(5)


def test_prompts_at_the_cut_bring_no_gradient_back() -> None:
    cost = own()
    inside = 207 * 768  # features with the prompts in them
    assert cost.bytes_up_once == 0
    assert cost.bytes_up_per_round == 4 * (TAIL + 10 * NUMBERS + 10 * inside)
    assert cost.bytes_down_per_round == 4 * (TAIL + 10 * inside)


def test_prompts_at_the_input_cross_in_all_four_tensors() -> None:
    cost = own(model={"prompt_at": "input"}, wire={"pooled_features": True})
    inside = 207 * 768
    state = TAIL + 10 * 768
    assert cost.bytes_start == 4 * (HEAD + state)
    assert cost.bytes_up_per_round == 4 * (state + 10 * inside + 10 * 768)
    assert cost.bytes_down_per_round == 4 * (state + 10 * 768 + 10 * inside)


def test_each_kind_of_tensor_is_counted_in_its_codec() -> None:
    wire = KEPT | {
        "smashed": "float16",
        "features": "int8",
        "gradients": "bfloat16",
        "updates": "float16",
        "head": "float16",
    }
    cost = own(wire=wire)
    assert cost.bytes_start == 2 * HEAD + 4 * TAIL
    assert cost.bytes_up_once == 10 * (2 * NUMBERS + 16)
    assert cost.bytes_up_per_round == 2 * TAIL + 10 * (16 + 2 * 768)
    # A global state is a float32 file; int8 has a float32 scale for each row.
    assert cost.bytes_down_per_round == 4 * TAIL + 10 * (768 + 4)


def test_pooling_changes_nothing_where_the_tail_reads_every_token() -> None:
    blocks = {"tail_blocks": 2}
    assert own(model=blocks, wire={"pooled_features": True}) == own(model=blocks)
    # Global average pooling reads all tokens too.
    pooled = {"backbone": "vit_base_patch16_clip_224", "cut": 2}
    average = {"backbone": "vit_base_patch16_siglip_gap_224", "cut": 2}
    narrow: dict[str, Any] = {"pooled_features": True}
    wide: dict[str, Any] = {}
    assert own(model=pooled, wire=narrow).bytes_total(1) < own(model=pooled, wire=wide).bytes_total(
        1
    )
    assert own(model=average, wire=narrow) == own(model=average, wire=wide)


def test_an_evaluation_asks_for_the_features_of_every_test_sample() -> None:
    plain, cost = own(wire=KEPT), own(wire=KEPT, every=5, test=6)
    assert cost.bytes_up_once == plain.bytes_up_once + 6 * (4 * NUMBERS + 16)
    assert (cost.bytes_up_per_evaluation, cost.bytes_down_per_evaluation) == (6 * 16, 6 * 4 * 768)
    assert cost.bytes_per_round == plain.bytes_per_round
    evaluations = 3  # rounds 5, 10 and the last
    more = 6 * (4 * NUMBERS + 16) + evaluations * 6 * (16 + 4 * 768)
    assert cost.bytes_total(11) == plain.bytes_total(11) + more


def test_an_evaluation_sends_smashed_data_that_are_not_kept() -> None:
    cost = own(every=1, test=6)
    assert cost.bytes_up_once == 0
    assert cost.bytes_up_per_evaluation == 6 * 4 * NUMBERS
    assert cost.bytes_down_per_evaluation == 6 * 4 * 207 * 768


def test_a_run_without_evaluation_sends_no_test_samples() -> None:
    assert own(wire=KEPT, every=0, test=6) == own(wire=KEPT)


def test_every_augmented_view_crosses_once() -> None:
    views = own(wire=KEPT, training={"augment": True, "views": 3})
    assert views.bytes_up_once == 3 * own(wire=KEPT).bytes_up_once
    assert views.bytes_per_round == own(wire=KEPT).bytes_per_round


def test_with_kept_smashed_data_the_head_runs_once_a_sample() -> None:
    cost = own(wire=KEPT, training={"local_epochs": 2, "keep_fraction": 0.5})
    assert cost.device_flops_once == 10 * (PATCHES + BLOCK)
    visits = 2 * 10 + 5
    assert cost.device_flops_per_round == 10 * OUTPUT + visits * 3 * OUTPUT
    assert cost.flops_total(4) == cost.device_flops_once + 4 * cost.device_flops_per_round


def test_scoring_needs_the_plain_view_in_addition_to_the_augmented_ones() -> None:
    augmented = {"augment": True, "views": 3}
    scored = own(wire=KEPT, training={**augmented, "keep_fraction": 0.5})
    assert scored.device_flops_once == 10 * 4 * (PATCHES + BLOCK)
    assert own(wire=KEPT, training=augmented).device_flops_once == 10 * 3 * (PATCHES + BLOCK)


def test_without_kept_smashed_data_the_head_runs_forward_on_every_visit() -> None:
    cost = own(training={"local_epochs": 2, "keep_fraction": 0.5})
    visits = 2 * 10 + 5
    assert cost.device_flops_once == 0
    head = PATCHES + BLOCK
    assert cost.device_flops_per_round == (10 + visits) * head + (10 + 3 * visits) * OUTPUT


def test_memory_is_a_pass_of_the_head_and_what_the_tail_reads_again() -> None:
    cost = own(wire=KEPT)
    # Residual and the MLP's hidden layer on both sides of its activation, output, image.
    head_pass = 197 * 9 * 768 + NUMBERS + 3 * 224 * 224
    remembered = 10 * 768
    numbers = HEAD + TAIL + remembered + 3 * TAIL + 4 * head_pass
    assert cost.device_peak_bytes == 4 * numbers


def test_kept_smashed_data_and_pooling_save_bytes_in_a_run() -> None:
    bare, kept, both = own(), own(wire={"keep_smashed": True}), own(wire=KEPT)
    assert both.bytes_total(20) < kept.bytes_total(20) < bare.bytes_total(20)


def test_a_payload_that_is_compressed_is_counted_as_if_nothing_were_saved() -> None:
    assert tensor_bytes("int8+zstd", (5, 100)) == tensor_bytes("int8", (5, 100)) == 5 * 104


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(UnknownCodec):
        tensor_bytes("float8", (1,))


def test_a_codec_whose_size_depends_on_values_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sfprompt_bench.cost.sizes.encoded_bytes", lambda name, shape: None)
    with pytest.raises(InvalidField) as caught:
        tensor_bytes("float32", (1,))
    assert caught.value.field == "codec"


@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16", "int8", "int4"])
@given(samples=st.integers(0, 9), batch=st.integers(1, 4), tokens=st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_payloads_are_as_large_as_what_the_codec_writes(
    codec: str, samples: int, batch: int, tokens: int
) -> None:
    batches = torch.randn(samples, tokens, 70, generator=torch.Generator().manual_seed(1)).split(
        batch
    )
    written = sum(
        buffer.nbytes for some in batches if len(some) for buffer in get_codec(codec).encode(some)
    )
    assert samples_bytes(codec, samples, batch, (tokens, 70)) == written
