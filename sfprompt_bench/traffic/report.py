"""The ladder's report: tables, a plot, JSON values and ratios to other methods."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from edge_client.transport.link import Link
from protocol.settings import RunSettings
from protocol.traffic import Phase
from sfprompt_bench.cost.method_cost import Question
from sfprompt_bench.estimate.calculator import estimate, paper_training, ratios
from sfprompt_bench.plots import COLOURS, MB, new_figure, save
from sfprompt_bench.presets import with_changes
from sfprompt_bench.traffic.ladder import LadderSetting, RungResult

_PHASES = tuple(phase for phase in Phase if phase is not Phase.CONTROL)  # control is little

# A setting that is too large for a small machine is calculated.
_LARGE_SAMPLES, _LARGE_ROUNDS = 1000, 50


@dataclass(frozen=True)
class TrafficRatios:
    """The default form over others in a whole run, start included on both sides.

    Bytes of this project's forms are measured at the socket; those of federated full fine-tuning
    and FedPEFT-Prompt are their payloads, without headers.
    """

    bytes_vs_paper: float
    bytes_vs_full: float
    bytes_vs_fedpeft_prompt: float
    flops_vs_full: float
    accuracy_drop_points: float  # the paper's form minus the default; negative: a gain


def traffic_ratios(results: Sequence[RungResult], setting: LadderSetting) -> TrafficRatios:
    """Compare the last rung with the first, and with the calculated cost of other methods."""
    paper, default = results[0], results[-1]
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


def large_setting(default: RunSettings) -> tuple[Question, dict[str, Any]]:
    """Calculate ViT-B/16 at 224 px with 1,000 samples a device over 50 rounds."""
    large = with_changes(
        default,
        {
            "model": {"backbone": "vit_base_patch16_224", "image_size": 224},
            "federation": {"rounds": _LARGE_ROUNDS, "evaluate_every": 0},
        },
    )
    question = Question(large.plan, _LARGE_SAMPLES)
    return question, asdict(ratios(estimate(question, paper_training()), _LARGE_ROUNDS))


def traffic_figures(results: Sequence[RungResult], setting: LadderSetting) -> dict[str, Any]:
    """Convert the ladder to values for JSON."""
    default = results[-1].rung.settings
    rounds = default.federation.rounds
    costs = estimate(_question(default, setting))
    return {
        "ratios": asdict(traffic_ratios(results, setting)),
        "break_even_rounds_with_fedpeft_prompt": ratios(costs, rounds).break_even_rounds,
        "vit_base_224": large_setting(default)[1],
        "devices": setting.devices,
        "rounds": rounds,
        "seeds": list(setting.seeds),
        "link": setting.link,
        "rungs": [
            {
                "name": result.rung.name,
                "what": result.rung.what,
                "accuracy": list(result.accuracy),
                "seconds": list(result.seconds),
                "bytes_total": list(result.bytes_total),
                "bytes": result.traffic,
                "seconds_on_the_line": network_seconds(result, setting),
                "device_flops": device_flops(result, setting),
                "settings": result.rung.settings.model_dump(mode="json"),
            }
            for result in results
        ],
    }


def device_flops(result: RungResult, setting: LadderSetting) -> int:
    """Calculate the operations of one device in the whole run, with torch's counter."""
    settings = result.rung.settings
    costs = estimate(_question(settings, setting))
    return costs[settings.method.name].flops_total(settings.federation.rounds)


def network_seconds(result: RungResult, setting: LadderSetting) -> float:
    """Calculate the time that one device waits for its network alone.

    Its bytes at the link's rates, and the latency of each request of split training.
    """
    link, settings = Link.parse(setting.link), result.rung.settings
    plan = settings.plan
    training = plan.training
    samples = _question(settings, setting).selected_samples
    steps = training.split_epochs * -(-samples // training.batch_size)
    # Forward and backward, or both in one request.
    requests_per_step = 2 if plan.model.prompt_at == "input" else 1
    requests = settings.federation.rounds * steps * requests_per_step
    up, down = (
        sum(counts[direction] for counts in result.traffic.values()) / setting.devices
        for direction in ("up", "down")
    )
    return 8 * up / link.up_bps + 8 * down / link.down_bps + requests * link.rtt_s


def traffic_table(results: Sequence[RungResult], setting: LadderSetting) -> Table:
    """Show a row for each rung; bytes are of one device, in the whole run."""
    table = Table(title=f"One device over {setting.link}, mean over seeds", title_justify="left")
    table.add_column("rung")
    for name in ("MB", "of paper", "accuracy", "on the line", "time", "TFLOP"):
        table.add_column(name, justify="right")
    for result in results:
        accuracy = f"{result.mean_accuracy:.1%}"
        if len(result.accuracy) > 1:
            accuracy += f" ± {100 * result.spread:.1f}"
        table.add_row(
            result.rung.name,
            f"{result.mean_bytes / MB / setting.devices:,.2f}",
            f"{result.mean_bytes / results[0].mean_bytes:.2%}",
            accuracy,
            f"{network_seconds(result, setting):,.0f} s",
            f"{statistics.fmean(result.seconds):,.0f} s",
            f"{device_flops(result, setting) / 1e12:,.2f}",
        )
    shares = traffic_ratios(results, setting)
    table.caption = (
        f"The default form moves {shares.bytes_vs_paper:.2%} of the paper's bytes, "
        f"{shares.bytes_vs_full:.2%} of federated full fine-tuning's and "
        f"{shares.bytes_vs_fedpeft_prompt:.1%} of FedPEFT-Prompt's, with "
        f"{shares.flops_vs_full:.3%} of full fine-tuning's operations on the device and "
        f"{-shares.accuracy_drop_points:+.1f} points of accuracy compared with the paper's form. "
        + _break_even(results[-1].rung.settings, setting)
        + " on the line: calculated from the bytes and the latency of each step. time: measured, "
        "of the whole run."
    )
    table.caption_justify = "left"
    return table


def _break_even(default: RunSettings, setting: LadderSetting) -> str:
    costs = estimate(_question(default, setting))
    rounds = ratios(costs, default.federation.rounds).break_even_rounds
    if rounds is None:
        return "FedPEFT-Prompt never moves fewer bytes."
    return f"FedPEFT-Prompt would move as many bytes in {rounds:,.0f} rounds."


def phase_table(results: Sequence[RungResult], setting: LadderSetting) -> Table:
    """Show the bytes of each rung by phase, in MB of one device, in the whole run."""
    table = Table(title="MB by purpose, both directions, without control", title_justify="left")
    table.add_column("rung")
    for phase in _PHASES:
        table.add_column(str(phase), justify="right")
    for result in results:
        counts = (sum(result.traffic[phase].values()) for phase in _PHASES)
        cells = (f"{count / MB / setting.devices:,.2f}" for count in counts)
        table.add_row(result.rung.name, *cells)
    return table


def large_table(default: RunSettings) -> Table:
    """Show the four ratios of `large_setting`."""
    question, shares = large_setting(default)
    table = Table(
        title=f"Calculated: {question.plan.model.backbone} at 224 px, "
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
        table.add_row(label, f"{shares[key]:.3%}")
    return table


def plot_ladder(results: Sequence[RungResult], setting: LadderSetting, out: Path) -> Path:
    """Plot each rung's bytes on a logarithmic scale, and its accuracy."""
    figure, (left, right) = new_figure(1, 2, figsize=(10, 4), sharey=True, width_ratios=(3, 1))
    names = [result.rung.name for result in results]
    totals = [result.mean_bytes / MB / setting.devices for result in results]
    left.barh(names, totals, color=COLOURS[Phase.SMASHED])
    for row, total in enumerate(totals):
        label = f"{total:,.1f} MB ({total / totals[0]:.1%})"
        left.annotate(label, (total, row), xytext=(4, 0), textcoords="offset points", va="center")
    left.set_xscale("log")
    left.set_xlim(min(totals) / 2, max(totals) * 12)
    left.set(xlabel="MB at the socket, one device, whole run", title="traffic")
    left.invert_yaxis()
    accuracies = [100 * result.mean_accuracy for result in results]
    spreads = [100 * result.spread for result in results]
    right.errorbar(accuracies, names, xerr=spreads, fmt="o", color="#c1121f")
    right.set(xlabel="accuracy (%)", title="held-out images")
    right.margins(x=0.3)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    return save(figure, out)


def _question(settings: RunSettings, setting: LadderSetting) -> Question:
    preset, devices = setting.preset, setting.devices
    train = (preset.limit_train or 0) // devices
    return Question(settings.plan, train, (preset.limit_test or 0) // devices)
