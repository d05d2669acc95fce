"""The ladder for people and for scripts: a table, a plot, and the ratios to other methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from rich.table import Table

from edge_client.transport.link import Link
from protocol.plan import RunPlan
from protocol.traffic import Phase
from sfprompt_bench.cost.question import Question
from sfprompt_bench.estimate.calculator import estimate, paper_training, ratios
from sfprompt_bench.plots import COLOURS, save
from sfprompt_bench.traffic.ladder import Climb, Setting

MB = 1e6

_PHASES = tuple(phase for phase in Phase if phase is not Phase.CONTROL)  # which is little

# The setting that no small machine can run, for the calculator.
_LARGE_SAMPLES, _LARGE_ROUNDS = 1000, 50


@dataclass(frozen=True)
class TrafficRatios:
    """The default form against others, the download to start counted on both sides.

    Bytes of this project's forms are measured at the socket; those of federated full fine-tuning
    and FedPEFT-Prompt are their payloads, without headers.
    """

    bytes_vs_paper: float
    bytes_vs_full: float
    bytes_vs_fedpeft_prompt: float
    flops_vs_full: float
    accuracy_drop_points: float  # the paper's form less the default's; negative: it gains


def traffic_ratios(climbs: Sequence[Climb], setting: Setting) -> TrafficRatios:
    """The measured default rung against the measured first one and the calculated others."""
    paper, default = climbs[0], climbs[-1]
    costs = estimate(_question(default.rung.settings, setting))
    rounds = default.rung.settings.federation.rounds
    per_device = default.mean_bytes / setting.devices
    return TrafficRatios(
        bytes_vs_paper=default.mean_bytes / paper.mean_bytes,
        bytes_vs_full=per_device / costs["fl-full"].bytes_total(rounds),
        bytes_vs_fedpeft_prompt=per_device / costs["fedpeft-prompt"].bytes_total(rounds),
        flops_vs_full=ratios(costs, rounds).flops_vs_full,
        accuracy_drop_points=100 * (paper.mean_accuracy - default.mean_accuracy),
    )


def large_setting(default: RunPlan) -> tuple[Question, dict[str, Any]]:
    """ViT-B/16 at 224 px with 1,000 samples a device over 50 rounds, calculated."""
    values = default.model_dump()
    values["model"] |= {"backbone": "vit_base_patch16_224", "image_size": 224}
    values["federation"] |= {"rounds": _LARGE_ROUNDS, "evaluate_every": 0}
    question = Question(RunPlan.model_validate(values), _LARGE_SAMPLES)
    return question, asdict(ratios(estimate(question, paper_training()), _LARGE_ROUNDS))


def traffic_figures(climbs: Sequence[Climb], setting: Setting) -> dict[str, Any]:
    """Everything, as JSON can carry it."""
    default = climbs[-1].rung.settings
    rounds = default.federation.rounds
    costs = estimate(_question(default, setting))
    return {
        "ratios": asdict(traffic_ratios(climbs, setting)),
        "break_even_rounds_with_fedpeft_prompt": ratios(costs, rounds).break_even_rounds,
        "vit_base_224": large_setting(default)[1],
        "devices": setting.devices,
        "rounds": rounds,
        "seeds": list(setting.seeds),
        "link": setting.link,
        "rungs": [
            {
                "name": one.rung.name,
                "what": one.rung.what,
                "accuracy": list(one.accuracy),
                "seconds": list(one.seconds),
                "bytes_total": list(one.bytes_total),
                "bytes": one.traffic,
                "seconds_on_the_line": seconds_on_the_line(one, setting),
                "device_flops": device_flops(one, setting),
                "settings": one.rung.settings.model_dump(mode="json"),
            }
            for one in climbs
        ],
    }


def device_flops(climb: Climb, setting: Setting) -> int:
    """Operations of one device in the whole run, by torch's own counter."""
    settings = climb.rung.settings
    method = "sfprompt" if settings.model.prompt_at == "cut" else "sfprompt-paper"
    return estimate(_question(settings, setting))[method].flops_total(settings.federation.rounds)


def traffic_table(climbs: Sequence[Climb], setting: Setting) -> Table:
    """A row for each rung; bytes are of one device, in the whole run."""
    table = Table(title=f"One device over {setting.link}, mean over seeds", title_justify="left")
    table.add_column("rung")
    for name in ("MB", "of paper", "accuracy", "on the line", "time", "TFLOP"):
        table.add_column(name, justify="right")
    first = climbs[0].mean_bytes
    for one in climbs:
        accuracy = f"{one.mean_accuracy:.1%}"
        if len(one.accuracy) > 1:
            accuracy += f" ± {100 * one.spread:.1f}"
        table.add_row(
            one.rung.name,
            f"{one.mean_bytes / MB / setting.devices:,.2f}",
            f"{one.mean_bytes / first:.2%}",
            accuracy,
            f"{seconds_on_the_line(one, setting):,.0f} s",
            f"{sum(one.seconds) / len(one.seconds):,.0f} s",
            f"{device_flops(one, setting) / 1e12:,.2f}",
        )
    found = traffic_ratios(climbs, setting)
    table.caption = (
        f"The default form moves {found.bytes_vs_paper:.2%} of the paper's bytes, "
        f"{found.bytes_vs_full:.2%} of federated full fine-tuning's and "
        f"{found.bytes_vs_fedpeft_prompt:.1%} of FedPEFT-Prompt's, with "
        f"{found.flops_vs_full:.3%} of full fine-tuning's operations on the device and "
        f"{-found.accuracy_drop_points:+.1f} points of accuracy against the paper's form. "
        + _break_even(climbs[-1].rung.settings, setting)
        + " On the line: bytes and the latency of each step; time: of the runs as they were made."
    )
    table.caption_justify = "left"
    return table


def seconds_on_the_line(climb: Climb, setting: Setting) -> float:
    """What one device would wait for its line, and for nothing else.

    Its bytes at the link's rates, and the latency of each request of split training.
    """
    link, settings = Link.parse(setting.link), climb.rung.settings
    training = settings.training
    steps = training.split_epochs * -(
        -_question(settings, setting).selected_samples // training.batch_size
    )
    ways_a_step = 2 if settings.model.prompt_at == "input" else 1  # forward and backward, or both
    requests = settings.federation.rounds * steps * ways_a_step
    ways = climb.traffic.values()
    up, down = (sum(way[name] for way in ways) / setting.devices for name in ("up", "down"))
    return 8 * up / link.up_bps + 8 * down / link.down_bps + requests * link.rtt_s


def _break_even(default: RunPlan, setting: Setting) -> str:
    costs = estimate(_question(default, setting))
    rounds = ratios(costs, default.federation.rounds).break_even_rounds
    if rounds is None:
        return "FedPEFT-Prompt never moves fewer bytes."
    return f"FedPEFT-Prompt would move as many bytes in {rounds:,.0f} rounds."


def phase_table(climbs: Sequence[Climb], setting: Setting) -> Table:
    """What the bytes of each rung were for, in MB of one device, in the whole run."""
    table = Table(title="MB by purpose, both directions, but for control", title_justify="left")
    table.add_column("rung")
    for phase in _PHASES:
        table.add_column(str(phase), justify="right")
    for one in climbs:
        counts = (sum(one.traffic[phase].values()) for phase in _PHASES)
        table.add_row(one.rung.name, *(f"{count / MB / setting.devices:,.2f}" for count in counts))
    return table


def large_table(default: RunPlan) -> Table:
    """The four ratios of `large_setting`."""
    question, found = large_setting(default)
    table = Table(
        title=f"Calculated: {question.settings.model.backbone} at 224 px, "
        f"{_LARGE_SAMPLES:,} samples a device, {_LARGE_ROUNDS} rounds",
        title_justify="left",
    )
    table.add_column("against")
    table.add_column("the default form", justify="right")
    for label, key in (
        ("bytes of the paper's form", "bytes_vs_paper"),
        ("bytes of federated full fine-tuning", "bytes_vs_full"),
        ("bytes of FedPEFT-Prompt", "bytes_vs_fedpeft_prompt"),
        ("operations of full fine-tuning", "flops_vs_full"),
    ):
        table.add_row(label, f"{found[key]:.3%}")
    return table


def plot_ladder(climbs: Sequence[Climb], setting: Setting, out: Path) -> Path:
    """Bytes of each rung, on a logarithmic scale, and its accuracy beside them."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4), sharey=True, layout="constrained", width_ratios=(3, 1)
    )
    names = [one.rung.name for one in climbs]
    totals = [one.mean_bytes / MB / setting.devices for one in climbs]
    left.barh(names, totals, color=COLOURS[Phase.SMASHED])
    for row, total in enumerate(totals):
        share = f"{total:,.1f} MB ({total / totals[0]:.1%})"
        left.annotate(share, (total, row), xytext=(4, 0), textcoords="offset points", va="center")
    left.set_xscale("log")
    left.set_xlim(min(totals) / 2, max(totals) * 12)
    left.set(xlabel="MB at the socket, one device, whole run", title="traffic")
    left.invert_yaxis()
    shares = [100 * one.mean_accuracy for one in climbs]
    right.errorbar(
        shares, names, xerr=[100 * one.spread for one in climbs], fmt="o", color="#c1121f"
    )
    right.set(xlabel="accuracy (%)", title="held-out images")
    right.margins(x=0.3)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    return save(figure, out)


def _question(settings: RunPlan, setting: Setting) -> Question:
    preset, devices = setting.preset, setting.devices
    train = (preset.limit_train or 0) // devices
    return Question(settings, train, (preset.limit_test or 0) // devices)
