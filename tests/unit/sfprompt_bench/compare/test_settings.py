"""The settings of a comparison, its points and its tasks."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InvalidField, NotFound
from protocol.messages import parse_message
from protocol.parts import WireSettings
from sfprompt_bench.compare.config import QUICK, Comparison, load_comparison, point_name, toml_text
from sfprompt_bench.compare.plan import plan, resolved, tasks_of, with_methods
from sfprompt_bench.methods.base import FederatedMethod
from sfprompt_bench.methods.registry import ESTIMATED, METHODS
from sfprompt_bench.presets import preset_named
from tuning_methods.proxies.settings import distillation_of
from tuning_methods.sfprompt.settings import paper_part

DOCS = Path(__file__).parents[4] / "docs"

TINY = {"backbone": "vit_tiny_patch16_224", "weights": "random:3", "image_size": 32}

REFERENCES = {
    *("central", "central-paper", "linear-probe"),
    *("ridge-probe", "lda-probe", "ridge-depths", "lda-depths"),
}


def comparison(**more: object) -> Comparison:
    return parse_message(Comparison, {"data": "digits", "model": TINY, **more})


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "some.toml"
    file.write_text(text)
    return file


def test_a_file_gives_a_comparison_with_its_own_name(tmp_path: Path) -> None:
    read = load_comparison(written(tmp_path, 'methods = ["sfprompt"]\nseeds = [3, 4]\n'))
    assert (read.name, read.methods, read.seeds) == ("some", ("sfprompt",), (3, 4))


@pytest.mark.parametrize(
    ("text", "field", "named"),
    [
        ("devices = 0", "devices", "1"),
        ("device = 4", "device", ""),
        ("seeds = []", "seeds", ""),
        ("seeds = [1, 1]", "seeds", "twice: 1"),
        ('partition = "halves"', "partition", "iid | dirichlet"),
        ("[federation]\nrounds = 3", "body", "federation.rounds is set by rounds"),
        ('[method]\nname = "fedpft"', "body", "method.name is set by methods"),
        ('[sweep]\n"method.name" = ["fedpft"]', "body", "sweep.method.name is set by methods"),
        ("[overrides.sfprompt.federation]\nrounds = 3", "body", "overrides.sfprompt.federation"),
        ("[overrides.sfprompt.trainin]\nbatch_size = 3", "body", "overrides.sfprompt.trainin"),
        ("[sweep]\nlayers = [1]", "body", "sweep.layers"),
        ("[sweep]\ndevices = []", "body", "sweep.devices"),
        ("name = ", "file", ""),
    ],
)
def test_a_wrong_setting_is_refused_by_name(
    tmp_path: Path, text: str, field: str, named: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        load_comparison(written(tmp_path, text))
    assert caught.value.field == field
    assert named in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="cannot be read"):
        load_comparison(tmp_path / "none.toml")


def test_an_unknown_method_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        plan(comparison(methods=("sfprompts",)), tmp_path)
    assert caught.value.limit == sorted(METHODS)


def test_a_setting_that_a_run_does_not_have_is_refused_with_the_method(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="sfprompt") as caught:
        plan(comparison(methods=("sfprompt",), training={"batch": 3}), tmp_path)
    assert caught.value.field == "training.batch"


def test_a_cut_that_the_backbone_does_not_have_is_refused_before_anything_runs(
    tmp_path: Path,
) -> None:
    with pytest.raises(InvalidField, match="sfprompt") as caught:
        plan(comparison(methods=("sfprompt",), method={"cut": 13}), tmp_path)
    assert "cut" in str(caught.value.field)


def test_what_makes_a_method_cannot_be_overridden(tmp_path: Path) -> None:
    changed = {"splitfed-linear": {"method": {"tune": "full"}}}
    with pytest.raises(InvalidField) as caught:
        plan(comparison(methods=("splitfed-linear",), overrides=changed), tmp_path)
    assert caught.value.field == "overrides.splitfed-linear.method.tune"
    assert caught.value.limit == "linear"


def test_an_override_of_a_field_that_the_method_lacks_is_refused(tmp_path: Path) -> None:
    changed = {"splitfed-linear": {"method": {"prompt_count": 3}}}
    with pytest.raises(
        InvalidField, match=r"splitfed-linear has no method\.prompt_count"
    ) as caught:
        plan(comparison(methods=("splitfed-linear",), overrides=changed), tmp_path)
    assert caught.value.field == "overrides.splitfed-linear.method.prompt_count"
    assert caught.value.limit == ["cut", "split_epochs", "tail_blocks", "tune"]


@pytest.mark.parametrize("wrong", [3, {"evry": 3}])
def test_an_override_without_a_setting_is_refused(wrong: object, tmp_path: Path) -> None:
    changed = {"linear-probe": {"method": {"distillation": wrong}}}
    with pytest.raises(InvalidField, match="linear-probe has no setting"):
        plan(comparison(methods=("linear-probe",), overrides=changed), tmp_path)


def test_a_value_of_the_method_applies_where_there_is_the_field(tmp_path: Path) -> None:
    named = ("sfprompt", "splitfed-linear", "fedpeft-prompt", "fl-full", "linear-probe")
    config = comparison(methods=named, method={"cut": 2, "prompt_count": 3, "tune": "classifier"})
    methods = [job.settings.method.model_dump() for job in plan(config, tmp_path)]
    assert [method.get("cut") for method in methods] == [2, 2, None, None, 0]
    assert [method.get("prompt_count") for method in methods] == [3, None, 10, None, 0]
    assert [method.get("tune") for method in methods] == [
        "classifier",
        "linear",
        "prompt",
        None,
        "tail",
    ]


@pytest.mark.parametrize(
    "parts",
    [
        {"method": {"lora_rank": 4}},
        {"method": {"prompt_depth": "deep"}},  # both methods fix it
        {"sweep": {"method.lora_rank": (4, 8)}},
        {"sweep": {"method.lora_rank.x": (4, 8)}},
    ],
)
def test_a_value_that_no_compared_method_takes_is_refused(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    (field,) = parts.get("method", {"lora_rank": 4})
    with pytest.raises(InvalidField, match="none of the compared methods") as caught:
        plan(comparison(methods=("sfprompt", "sfprompt-paper", "linear-probe"), **parts), tmp_path)
    assert caught.value.field == f"method.{field}"
    assert isinstance(caught.value.limit, list)
    assert "keep_fraction" in caught.value.limit


def test_other_methods_leave_behind_what_they_have_no_field_for() -> None:
    config = comparison(
        methods=("sfprompt", "fedpft"),
        method={"prompt_count": 3, "lora_rank": 4, "lora_rang": 4},
        overrides={"sfprompt": {"training": {"batch_size": 4}}},
    )
    changed = with_methods(config, ["fedpft"])
    assert changed.methods == ("fedpft",)
    assert changed.method == {"lora_rank": 4, "lora_rang": 4}, "a wrong name is still refused"
    assert changed.overrides == {}
    with pytest.raises(NotFound):
        with_methods(config, ["fedpfd"])


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"model": {"cut": 1}}, "model.cut has moved: write method.cut"),
        ({"training": {"keep_fraction": 0.5}}, "write method.keep_fraction"),
        ({"wire": {"keep_smashed": True}}, "write method.keep_smashed"),
        ({"distillation": {"every": 3}}, "distillation has moved: write method.distillation"),
        ({"overrides": {"central": {"model": {"cut": 1}}}}, "central: model.cut has moved"),
        ({"sweep": {"wire.skip_below": (0.1, 0.2)}}, "sweep: wire.skip_below has moved"),
        ({"sweep": {"distillation.every": (1, 2)}}, "sweep: distillation has moved"),
    ],
)
def test_a_field_of_a_former_release_says_where_it_moved(parts: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidField, match=re.escape(says)):
        parse_message(Comparison, parts)


def test_a_run_is_of_the_method_itself(tmp_path: Path) -> None:
    for job in plan(comparison(methods=tuple(METHODS)), tmp_path):
        assert job.settings.method.name == job.method.tuning != "custom"
        assert job.method.settings(job.settings) == job.settings


def test_settings_of_another_method_give_way_to_the_defaults_of_this_one() -> None:
    base = preset_named("digits").settings
    settings = METHODS["fedpeft-adapter"].settings(base)
    assert settings.method.name == "fedpeft"
    assert settings.training.tail_learning_rate == 1e-3
    assert settings.wire == WireSettings()
    assert settings.model == base.model
    assert settings.federation == base.federation


def test_overrides_of_a_method_that_is_not_compared_are_refused(tmp_path: Path) -> None:
    changed = {"central": {"training": {"batch_size": 3}}}
    with pytest.raises(InvalidField) as caught:
        plan(comparison(methods=("sfprompt",), overrides=changed), tmp_path)
    assert caught.value.field == "overrides.central"


def test_the_stronger_setting_wins(tmp_path: Path) -> None:
    """Preset 8, all methods 16, one method 24, the sweep 32."""
    named = {"methods": ("sfprompt", "sfprompt-paper"), "training": {"batch_size": 16}}
    one = {"overrides": {"sfprompt": {"training": {"batch_size": 24}}}}

    def sizes(**more: object) -> list[int]:
        jobs = plan(comparison(**named | more), tmp_path)
        return [job.settings.training.batch_size for job in jobs]

    assert preset_named("digits").settings.training.batch_size == 8
    assert sizes() == [16, 16]
    assert sizes(**one) == [24, 16]
    assert sizes(**one, sweep={"training.batch_size": (32,)}) == [32, 32]


def test_all_methods_get_the_same_data_devices_rounds_and_seeds(tmp_path: Path) -> None:
    config = comparison(
        methods=("sfprompt", "sfprompt-paper", "splitfed-linear"),
        devices=3,
        rounds=5,
        seeds=(7, 8),
        partition="dirichlet:0.3",
        limit_train=100,
    )
    jobs = plan(config, tmp_path)
    assert len(jobs) == 6
    for job in jobs:
        federation, inputs = job.settings.federation, job.task.inputs
        assert (federation.rounds, federation.min_participants) == (5, 3)
        assert (inputs["devices"], inputs["partition"]) == (3, "dirichlet:0.3")
        assert inputs["limits"] == [100, None]
        assert job.settings.seed == job.seed
    assert len({job.task.key for job in jobs}) == 6
    assert len({job.task.folder for job in jobs}) == 6


def test_presets_apply_without_other_settings(tmp_path: Path) -> None:
    plain = parse_message(Comparison, {"methods": ("sfprompt", "sfprompt-paper")})
    default, paper = (job.settings for job in plan(plain, tmp_path))
    for found, form in ((default, "default"), (paper, "paper")):
        preset = preset_named("digits", form).settings
        assert (found.model, found.training, found.wire) == (
            preset.model,
            preset.training,
            preset.wire,
        )


def test_a_sweep_is_every_combination(tmp_path: Path) -> None:
    config = comparison(
        methods=("sfprompt",), sweep={"devices": (2, 3), "training.batch_size": (4, 8)}
    )
    points = config.points()
    assert [point_name(point) for point in points] == [
        "devices = 2, training.batch_size = 4",
        "devices = 2, training.batch_size = 8",
        "devices = 3, training.batch_size = 4",
        "devices = 3, training.batch_size = 8",
    ]
    jobs = plan(config, tmp_path)
    assert [(job.task.inputs["devices"], job.settings.training.batch_size) for job in jobs] == [
        (2, 4),
        (2, 8),
        (3, 4),
        (3, 8),
    ]


def test_a_swept_value_is_checked_as_the_setting_is(tmp_path: Path) -> None:
    with pytest.raises(InvalidField) as caught:
        plan(comparison(methods=("sfprompt",), sweep={"devices": (0,)}), tmp_path)
    assert caught.value.field == "devices"


def test_a_probe_runs_once_in_a_sweep_without_effect_on_it(tmp_path: Path) -> None:
    config = comparison(
        methods=("sfprompt", "linear-probe"),
        sweep={"partition": ("iid", "shards:2"), "training.batch_size": (4, 8)},
    )
    tasks = tasks_of(plan(config, tmp_path))
    assert [task.inputs["method"] for task in tasks].count("sfprompt") == 4
    assert [task.inputs["method"] for task in tasks].count("linear-probe") == 1


def test_references_have_no_privacy_settings(tmp_path: Path) -> None:
    config = comparison(
        methods=("sfprompt", "central", "linear-probe"),
        federation={"dp_clip": 1.0, "dp_seed": 3},
        sweep={"federation.dp_noise_multiplier": (0.5, 1.0)},
    )
    jobs = plan(config, tmp_path)
    assert {job.settings.federation.dp_noise_multiplier for job in jobs[::3]} == {0.5, 1.0}
    tasks = [task.inputs["method"] for task in tasks_of(jobs)]
    assert [tasks.count(name) for name in config.methods] == [2, 1, 1]


@pytest.mark.parametrize(
    "file", sorted((DOCS / "results" / "comparisons").glob("*.toml")), ids=lambda file: file.stem
)
def test_the_resolved_file_makes_the_same_tasks(file: Path, tmp_path: Path) -> None:
    config = load_comparison(file)
    again = load_comparison(written(tmp_path, toml_text(resolved(config))))
    assert {job.task.key for job in plan(again, tmp_path)} == {
        job.task.key for job in plan(config, tmp_path)
    }


def test_the_resolved_file_holds_every_setting_of_every_method(tmp_path: Path) -> None:
    text = toml_text(resolved(comparison(methods=("sfprompt", "central"))))
    overrides = tomllib.loads(text)["overrides"]
    wire = preset_named("digits").settings.wire.model_dump(exclude_none=True)
    assert overrides["sfprompt"]["wire"] == wire
    assert overrides["central"]["model"]["backbone"] == "vit_tiny_patch16_224"
    assert overrides["sfprompt"]["method"]["rank"] == 768


def test_the_quick_comparison_has_a_plan(tmp_path: Path) -> None:
    assert len(plan(QUICK, tmp_path)) == len(QUICK.methods)


def test_a_method_is_estimated_unless_it_is_a_reference_or_a_variant() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert (name in REFERENCES) != isinstance(method, FederatedMethod)
        if isinstance(method, FederatedMethod):
            assert (name in ESTIMATED) != method.is_variant


def test_a_proxy_is_the_whole_head_whatever_it_lacks(tmp_path: Path) -> None:
    config = comparison(
        methods=("fedpft", "offsite-tuning", "sfprompt-paper-proxy"),
        overrides={"offsite-tuning": {"method": {"ends": 2, "blocks": 5}}},
    )
    pruned, dropped, split = (job.settings.plan for job in plan(config, tmp_path))
    assert (pruned.model.cut, pruned.model.lora_ends) == (12, 0)
    assert (dropped.model.cut, dropped.model.lora_ends) == (5, 2)
    assert (len(pruned.model.mlp_widths), len(dropped.model.blocks)) == (12, 5)
    assert [(d.epochs, d.every) for d in map(distillation_of, (pruned, dropped))] == [
        (5, 10),
        (0, 0),
    ]
    never = comparison(methods=("fedpft",), method={"distillation": {"every": 0}})
    [job] = plan(never, tmp_path)
    distillation = distillation_of(job.settings.plan)
    assert (distillation.epochs, distillation.every) == (5, 0)
    assert (paper_part(split).local_body, split.model.is_reshaped, split.model.cut) == (2, False, 1)


def test_a_server_does_not_distil_on_the_devices_own_data(tmp_path: Path) -> None:
    config = comparison(methods=("fedpft",), method={"distillation": {"images": "digits"}})
    with pytest.raises(InvalidField) as caught:
        plan(config, tmp_path)
    assert caught.value.field == "method.distillation.images"
    swept = {"method.distillation.images": ("cifar", "svhn")}
    jobs = plan(comparison(methods=("fedpft", "offsite-tuning"), sweep=swept), tmp_path)
    images = [distillation_of(job.settings.plan).images for job in jobs]
    assert images == ["cifar", "cifar", "svhn", "svhn"]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)

scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    texts,
)

tables = st.recursive(
    st.dictionaries(texts, scalars | st.lists(scalars, max_size=3), max_size=4),
    lambda inner: st.dictionaries(texts, scalars | inner, max_size=3),
    max_leaves=8,
)


@given(tables)
def test_toml_that_is_written_is_read_back(values: dict[str, object]) -> None:
    assert tomllib.loads(toml_text(values)) == values


def test_what_is_none_is_left_out_of_toml_and_what_has_no_form_is_refused() -> None:
    assert tomllib.loads(toml_text({"a": None, "b": 1})) == {"b": 1}
    with pytest.raises(TypeError, match="set"):
        toml_text({"a": {1, 2}})


def test_the_method_of_the_guide_is_a_method() -> None:
    guide = (DOCS / "compare.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert len(source.splitlines()) <= 30
    namespace: dict[str, Any] = {"__name__": "guide"}
    exec(compile(source, "compare.md", "exec", dont_inherit=True), namespace)
    method = namespace["SFPromptRandom"]()
    paper = preset_named("digits", "paper").settings
    expected = paper.method.model_copy(update={"pruning": "random"})
    assert method.settings(paper) == paper.model_copy(update={"method": expected})


def test_the_file_of_the_guide_is_a_comparison(tmp_path: Path) -> None:
    guide = (DOCS / "compare.md").read_text()
    (text,) = re.findall(r"```toml\n(.*?)```", guide, flags=re.DOTALL)
    jobs = plan(load_comparison(written(tmp_path, text)), tmp_path)
    assert len(jobs) == 3 * 3 * 2 * 2


def test_the_guide_names_every_method() -> None:
    table = (DOCS / "compare.md").read_text().split("## Methods")[1].split("## The file")[0]
    for name in METHODS:
        short = [name.replace(start, "-") for start in ("fedpeft-", "sfprompt-")]
        assert any(f"`{one}`" in table for one in (name, *short)), name


def test_differential_privacy_excludes_distilling_neurons_again(tmp_path: Path) -> None:
    private = {"methods": ("fedpft",), "federation": {"dp_clip": 1.0, "dp_seed": 3}}
    with pytest.raises(InvalidField, match="fedpft") as caught:
        plan(comparison(**private), tmp_path)
    assert caught.value.field == "method.distillation.every"
    distillation = {"method": {"distillation": {"every": 0}}}
    [job] = plan(comparison(**private, overrides={"fedpft": distillation}), tmp_path)
    assert distillation_of(job.settings.plan).every == 0
