"""The `[method]` table of a run: the installed methods, and the plan of each."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from protocol.base import Message
from protocol.errors import InvalidField
from protocol.messages import parse_message
from protocol.method import (
    MethodSettings,
    installed_method_names,
    method_class,
    method_names,
    register,
)
from protocol.plan import RunPlan
from protocol.settings import RunSettings
from tuning_methods.custom.settings import Custom
from tuning_methods.proxies.settings import distillation_of
from tuning_methods.sfprompt.settings import Form, SFPrompt

ALL = [
    "custom",
    "fed3r",
    "fedavg",
    "fedpeft",
    "fedpft",
    "offsite-tuning",
    "sfprompt",
    "sfprompt-paper",
    "splitfed",
]

TINY = {"backbone": "vit_tiny_patch16_224", "weights": "random:0", "image_size": 32}


def settings(method: dict[str, Any], **parts: Any) -> RunSettings:
    return parse_message(RunSettings, {"method": method, "model": TINY, **parts})


def plan(name: str, **fields: Any) -> RunPlan:
    return settings({"name": name, **fields}).plan


def test_these_methods_are_installed() -> None:
    assert installed_method_names() == ALL
    assert {*ALL, "mirror"} <= set(method_names()), "and the one that this file registers"


@pytest.mark.parametrize("name", ALL)
def test_settings_survive_the_wire_and_explain_themselves(name: str) -> None:
    written = settings({"name": name})
    read = RunSettings.model_validate_json(written.model_dump_json())
    assert read == written
    assert read.plan == written.plan
    cls = method_class(name)
    assert cls.__doc__
    assert all(field.description for key, field in cls.model_fields.items() if key != "name")


# The own part of `fed3r` names code that `custom` does not have.
@pytest.mark.parametrize("name", [name for name in ALL if name not in {"custom", "fed3r"}])
def test_a_plan_can_be_written_by_hand(name: str) -> None:
    built = plan(name)
    assert Custom.of(built).plan == built


def test_the_default_method_tunes_prompts_in_the_body_and_caches_smashed_data() -> None:
    run = RunSettings()
    assert run.method.name == "sfprompt"
    assert (run.plan.model.prompt_at, run.plan.model.prompt_depth) == ("cut", "deep")
    assert run.plan.wire.keep_smashed
    assert (run.training.batch_size, run.wire.smashed) == (8, "klt:0.5")


def test_a_table_that_is_given_in_part_has_the_methods_defaults_for_the_rest() -> None:
    run = settings({"name": "fedpft", "distillation": {"images": "digits"}})
    distillation = distillation_of(run.plan)
    assert (distillation.images, distillation.epochs, distillation.every) == ("digits", 5, 10)


def test_a_changed_copy_has_a_plan_of_its_own() -> None:
    run = RunSettings()
    assert run.plan.seed == 0
    copy = run.model_copy(update={"seed": 3})
    assert (copy.plan.seed, run.plan.seed) == (3, 0)


def test_a_runs_own_value_wins_over_the_methods_default() -> None:
    run = settings({"name": "sfprompt"}, training={"batch_size": 3}, wire={"smashed": "float16"})
    assert (run.plan.training.batch_size, run.plan.wire.smashed) == (3, "float16")
    assert run.plan.training.prompt_learning_rate == 1e-4


@pytest.mark.parametrize(
    ("tune", "model"),
    [
        ("classifier", {"tune": "classifier", "prompt_count": 0}),
        ("bias", {"tune": "bias", "prompt_count": 0}),
        ("adapter", {"tune": "adapter", "adapter_width": 24}),
        ("prompt", {"tune": "classifier", "prompt_count": 10, "prompt_depth": "deep"}),
    ],
)
def test_fedpeft_tunes_a_part_of_the_whole_model(tune: str, model: dict[str, Any]) -> None:
    built = plan("fedpeft", tune=tune, epochs=3)
    assert built.model.cut == 12
    assert {field: getattr(built.model, field) for field in model} == model
    assert (built.training.local_epochs, built.training.split_epochs) == (3, 0)
    assert built.training.keep_fraction == 1


def test_a_proxys_shape_follows_from_its_method() -> None:
    pruned, dropped = plan("fedpft", width=8), plan("offsite-tuning", blocks=5, ends=2)
    assert (pruned.model.cut, pruned.model.blocks) == (12, ())
    assert pruned.model.mlp_widths == (0, *[8] * 10, 0)
    assert (dropped.model.cut, dropped.model.mlp_widths, dropped.model.lora_ends) == (5, (), 2)
    assert dropped.model.blocks == (0, 1, 6, 10, 11)
    assert [distillation_of(proxied).epochs for proxied in (pruned, dropped)] == [5, 0]
    assert plan("fedpft").model.mlp_widths[1] == 768 // 4
    assert plan("offsite-tuning").model.blocks == (0, 2, 4, 7, 9, 11)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ({"name": "fedpft", "ends": 7}, "method.ends", 7),
        ({"name": "fedpft", "ends": 6}, "method.ends", 6),  # no neurons to distil again
        ({"name": "fedpft", "width": 769}, "method.width", 769),
        ({"name": "offsite-tuning", "ends": 7}, "method.ends", 7),
        ({"name": "offsite-tuning", "blocks": 13}, "method.blocks", 13),
        ({"name": "offsite-tuning", "blocks": 3, "ends": 2}, "method.blocks", 3),
    ],
)
def test_a_proxy_that_does_not_fit_the_backbone_is_refused_by_the_methods_own_setting(
    method: dict[str, Any], field: str, value: int
) -> None:
    with pytest.raises(InvalidField, match="do not fit the backbone") as caught:
        settings(method).plan  # noqa: B018
    assert (caught.value.field, caught.value.value) == (field, value)
    assert "12" in str(caught.value.limit) or "768" in str(caught.value.limit)


@pytest.mark.parametrize("name", ["fedpft", "offsite-tuning"])
def test_other_architectures_have_no_proxy(name: str) -> None:
    beit = TINY | {"backbone": "beit_base_patch16_224"}
    with pytest.raises(InvalidField, match="plain vision transformer") as caught:
        settings({"name": name}, model=beit).plan  # noqa: B018
    assert caught.value.field == "model.backbone"


@pytest.mark.parametrize(("tune", "body"), [("linear", False), ("full", True)])
def test_splitfed_tunes_the_tail_or_all_three_parts(tune: str, body: bool) -> None:
    built = plan("splitfed", tune=tune)
    assert built.model.tune_body is body
    assert (built.model.cut, built.model.prompt_count, built.training.local_epochs) == (1, 0, 0)


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"method": {"name": "sfprompt", "prompt_count": -1}}, "method.prompt_count"),
        ({"method": {"name": "sfprompt", "delta_smashed": "int4"}}, "method.delta_smashed"),
        ({"method": {"name": "fedpeft", "cut": 1}}, "method.cut"),
        ({"method": {"name": "no-such-method"}}, "method"),
        ({"method": 3}, "method"),
        ({"training": {"prompt_learning_rat": 1}}, "training.prompt_learning_rat"),
    ],
)
def test_a_wrong_field_is_named(parts: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_message(RunSettings, parts)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"model": {"prompt_at": "cut"}}, "model.prompt_at has moved: write method.name"),
        ({"model": {"cut": 3}}, "write method.cut"),
        ({"training": {"keep_fraction": 0.5}}, "write method.keep_fraction"),
        ({"wire": {"keep_smashed": True}}, "write method.keep_smashed"),
        ({"distillation": {"epochs": 1}}, "write method.distillation"),
    ],
)
def test_a_field_of_a_former_release_says_where_it_moved(parts: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_message(RunSettings, parts)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("method", "parts", "says"),
    [
        ({"name": "sfprompt"}, {"training": {"proximal": 0.1}}, "training.proximal"),
        ({"name": "sfprompt", "prompt_count": 0, "split_epochs": 1}, {}, "prompt_count"),
        ({"name": "sfprompt", "prompt_count": 2, "split_epochs": 0}, {}, "prompt_count = 0"),
        ({"name": "sfprompt", "depths": 0, "split_epochs": 0}, {}, "local_epochs above 0"),
        ({"name": "sfprompt-paper", "skip_below": 0.1}, {}, "delta_smashed"),
        ({"name": "sfprompt-paper", "local_body": 2, "local_epochs": 0}, {}, "local_epochs"),
        ({"name": "splitfed", "tune": "full"}, {"training": {"proximal": 0.1}}, "proximal"),
        (
            {
                "name": "custom",
                "model": {"mlp_widths": [8] * 12},
                "wire": {"delta_smashed": "int4"},
            },
            {},
            "delta_smashed does not go with",
        ),
        ({"name": "fedpft"}, {"federation": {"dp_clip": 1.0}}, "dp_clip"),
        ({"name": "offsite-tuning", "distillation": {"every": 2}}, {}, "narrower MLPs"),
        ({"name": "fedavg"}, {"wire": {"updates": "topk:0.1"}}, "wire.update_deltas"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_before_a_run_is_created(
    method: dict[str, Any], parts: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        settings(method, **parts)
    assert says in str(caught.value)


class MirrorPart(Message):
    """What only the code of `Mirror` reads."""

    angle: int = 0


@register
class Mirror(MethodSettings):
    """A method of another package."""

    name: Literal["mirror"] = "mirror"
    strength: float = 1.0
    angle: int = 0

    def model_part(self, settings: RunSettings) -> dict[str, Any]:
        return {"prompt_at": "input", "prompt_count": 3}

    def training_part(self, settings: object) -> dict[str, Any]:
        return {"local_learning_rate_scale": self.strength}

    def own_part(self) -> MirrorPart:
        return MirrorPart(angle=self.angle)

    @classmethod
    def check_plan(cls, plan: RunPlan) -> None:
        if plan.method.get("angle", 0) > plan.model.prompt_count:
            raise ValueError("angle must not exceed prompt_count")


def test_a_name_belongs_to_one_method() -> None:
    class Other(Mirror):
        """Another method under the same name."""

    with pytest.raises(ValueError, match="mirror"):
        register(Other)
    assert register(Mirror) is Mirror


def test_a_method_needs_a_class_and_no_change_of_the_core() -> None:
    run = settings({"name": "mirror", "strength": 0.25})
    assert isinstance(run.method, Mirror)
    assert run.plan.training.local_learning_rate_scale == 0.25
    assert RunSettings.model_validate_json(run.model_dump_json()) == run


def test_what_only_a_methods_own_code_reads_is_in_the_plan_where_it_is_no_default() -> None:
    assert settings({"name": "mirror", "strength": 0.25}).plan.method == {}
    plan = settings({"name": "mirror", "angle": 2}).plan
    assert plan.method == {"angle": 2}
    assert RunPlan.model_validate_json(plan.model_dump_json()) == plan
    with pytest.raises(InvalidField, match="angle must not exceed prompt_count"):
        settings({"name": "mirror", "angle": 4})


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ({"name": "sfprompt"}, {}),
        ({"name": "fedpft"}, {"distillation": {"epochs": 5, "every": 10}}),
        ({"name": "offsite-tuning"}, {}),
        ({"name": "sfprompt-paper", "local_body": 2}, {"local_body": 2}),
        ({"name": "custom", "wire": {"delta_smashed": "int4"}}, {"delta_smashed": "int4"}),
    ],
)
def test_each_methods_own_part(method: dict[str, Any], own: dict[str, Any]) -> None:
    assert settings(method).plan.method == own


def test_the_default_form_starts_in_closed_form_and_then_tunes_gently() -> None:
    plan = settings({"name": "sfprompt"}).plan
    assert (plan.model.depths, plan.model.rank, plan.first_round) == (4, 768, 0)
    assert plan.training.prompt_learning_rate == 1e-4


@pytest.mark.parametrize(
    ("method", "federation"),
    [
        ({}, {"dp_clip": 1.0}),
        ({}, {"server_optimizer": "fedadam"}),
        ({"keep_smashed": False}, {}),
        ({"local_epochs": 1, "split_epochs": 1}, {}),
        ({"pruning": "el2n"}, {}),
        ({"tail_blocks": 1}, {}),
    ],
)
def test_the_default_form_starts_at_round_1_where_a_closed_form_start_is_impossible(
    method: dict[str, Any], federation: dict[str, Any]
) -> None:
    plan = settings({"name": "sfprompt", **method}, federation=federation).plan
    assert (plan.model.depths, plan.first_round) == (0, 1)
    with pytest.raises(InvalidField, match="depths"):
        settings({"name": "sfprompt", "depths": 4, **method}, federation=federation)


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ({}, Form(4, 0, 1, 1.0, 0)),
        ({"local_epochs": 3}, Form(4, 0, 3, 1.0, 0)),
        ({"prompt_count": 5}, Form(4, 1, 0, 0.8, 5)),
        ({"split_epochs": 2}, Form(4, 2, 0, 0.8, 10)),
        ({"keep_fraction": 0.5}, Form(4, 1, 0, 0.5, 10)),
        ({"depths": 0}, Form(0, 1, 0, 0.8, 10)),
        ({"tail_blocks": 1}, Form(0, 1, 0, 0.8, 10)),
    ],
)
def test_fields_without_a_value_follow_from_those_with_one(
    method: dict[str, Any], form: Form
) -> None:
    run = settings({"name": "sfprompt", **method})
    assert isinstance(run.method, SFPrompt)
    assert run.method.form(run) == form
    assert (run.plan.model.depths, run.plan.training.split_epochs) == form[:2]
    assert run.plan.training.local_epochs == form.local_epochs


def test_faster_prompts_are_the_default_without_a_closed_form_start() -> None:
    for method, federation in (({"depths": 0}, {}), ({}, {"dp_clip": 1.0})):
        plan = settings({"name": "sfprompt", **method}, federation=federation).plan
        assert plan.training.prompt_learning_rate == 2e-3


def test_a_run_without_rounds_needs_a_closed_form_start() -> None:
    assert settings({"name": "sfprompt"}, federation={"rounds": 0}).plan.federation.rounds == 0
    with pytest.raises(InvalidField, match="rounds = 0"):
        settings({"name": "sfprompt", "depths": 0}, federation={"rounds": 0})
