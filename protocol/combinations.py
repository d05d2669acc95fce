"""The combinations of settings that no run can have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.codec_names import is_row_wise_inside

if TYPE_CHECKING:
    from protocol.plan import RunPlan

__all__ = ["list_refusals"]


def list_refusals(plan: RunPlan) -> list[tuple[bool, str]]:
    """Return a row for each impossible combination: whether the plan has it, and the message."""
    model, training, wire = plan.model, plan.training, plan.wire
    names = plan.class_names
    repeated = {name for name in names or () if (names or ()).count(name) > 1}
    at_cut, mean_token = model.prompt_at == "cut", model.prompt_init == "mean-token"
    local_only = "training.split_epochs = 0 (no training through the server)"
    return [
        (
            names is not None and len(names) != model.num_classes,
            f"class_names has {len(names or ())} names for num_classes {model.num_classes}",
        ),
        (bool(repeated), f"class_names has a name twice: {', '.join(sorted(repeated))}"),
        (
            at_cut and model.prompt_count == 0 and bool(training.split_epochs),
            "prompt_at = cut needs a prompt_count above 0: the server has nothing else to tune",
        ),
        (
            wire.keep_smashed and not at_cut,
            "keep_smashed needs prompt_at = cut: prompts at the input change the smashed data in "
            "each step",
        ),
        *_depth_refusals(plan),
        (
            training.server_tuning != "none" and not plan.shares_labels,
            "server_tuning needs training.labels = shared: the server tunes towards the labels",
        ),
        (
            plan.shares_labels and (not model.depths or bool(training.split_epochs)),
            "training.labels = shared needs a closed-form start (depths above 0) and split_epochs "
            "= 0: the server then tunes the classifier on the features that it has",
        ),
        (
            at_cut and bool(wire.gradient_correction),
            "gradient_correction needs prompt_at = input: prompts at the cut need no gradient of "
            "the smashed data",
        ),
        (
            bool(training.proximal) and at_cut,
            "training.proximal needs prompt_at = input: prompts at the cut have no such term",
        ),
        (
            mean_token and plan.federation.server_optimizer != "fedavg",
            "prompt_init = mean-token needs federation.server_optimizer = fedavg: the others would "
            "use the shift of the first round as a gradient",
        ),
        (
            mean_token and plan.federation.dp_clip is not None,
            "prompt_init = mean-token needs federation.dp_clip = none: it would clip the "
            "shift of the first round",
        ),
        *(
            (
                bool(training.validation_share) and plan.federation.keep_best and refused,
                f"training.validation_share needs federation.{needed} or keep_best = false: {why}",
            )
            for refused, needed, why in (
                (
                    plan.federation.server_optimizer != "fedavg",
                    "server_optimizer = fedavg",
                    "moments do not go back to an earlier state",
                ),
                (
                    plan.federation.dp_clip is not None,
                    "dp_clip = none",
                    "the losses that select a state carry no noise",
                ),
            )
        ),
        (
            model.tune_body and training.split_epochs == 0,
            "tune_body needs split_epochs above 0: the body would never be tuned",
        ),
        (
            model.tune_body and bool(training.proximal),
            "training.proximal needs a frozen body: a tuned body has no such term",
        ),
        *(
            (training.split_epochs == 0 and refused, f"{local_only} needs {needed}")
            for refused, needed in (
                (training.local_epochs == 0, "local_epochs above 0"),
                (
                    training.keep_fraction != 1,
                    "keep_fraction = 1: the local update uses all samples",
                ),
                (
                    training.local_learning_rate_scale != 1,
                    "local_learning_rate_scale = 1",
                ),
                (
                    at_cut and bool(model.prompt_count),
                    "prompt_at = input or prompt_count = 0: prompts at the cut would never be "
                    "tuned",
                ),
                (
                    at_cut and not model.depths,
                    "prompt_at = input or depths above 0: the tail does not read the head's output",
                ),
                (
                    bool(wire.gradient_correction),
                    "gradient_correction = 0: no smashed data are sent",
                ),
            )
        ),
        (
            wire.updates.startswith("topk") and not wire.update_deltas,
            "wire.updates = topk needs wire.update_deltas: without it, most elements of a state "
            "would become 0",
        ),
    ]


def _depth_refusals(plan: RunPlan) -> list[tuple[bool, str]]:
    """Return such rows for settings with and without a closed-form start."""
    model, training, federation = plan.model, plan.training, plan.federation
    if not model.depths:
        return [
            (
                federation.rounds == 0,
                "federation.rounds = 0 needs depths above 0, which give a round 0",
            ),
        ]
    alone = "depths above 0 (a closed-form start) needs"
    return [
        (not model.rank, f"{alone} rank above 0"),
        (
            not is_row_wise_inside(plan.wire.start),
            f"{alone} a wire.start that encodes each sample separately, not {plan.wire.start}",
        ),
        (
            not plan.wire.keep_smashed or not plan.wire.pooled_features,
            f"{alone} keep_smashed and wire.pooled_features: the server uses its sample cache",
        ),
        (
            training.keep_fraction < 1 and training.pruning != "random",
            f"{alone} pruning = random or keep_fraction = 1: the device cannot score samples",
        ),
        (
            bool(training.local_epochs and training.split_epochs),
            f"{alone} local_epochs = 0 or split_epochs = 0: prompts change the features that the "
            "local update reads",
        ),
        (
            federation.server_optimizer != "fedavg",
            f"{alone} federation.server_optimizer = fedavg: round 0 gives no gradient",
        ),
        (
            federation.dp_clip is not None,
            f"{alone} federation.dp_clip = none: the sums of round 0 have no noise",
        ),
    ]
