"""Measure what hostile devices do to the accuracy of a run of the default form."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.codecs.registry import as_decoded
from protocol.errors import InvalidField
from protocol.federation import AggregationRule, FederationSettings
from protocol.plan import RunPlan
from sfprompt_bench.poison.attacks import TARGET, Device, scores
from sfprompt_bench.poison.data import PoisonData
from sfprompt_bench.poison.federation import LocalFederation, local_federation
from split_model.linear_fit import Features, Fit
from split_server.closed_form.basis import Basis, Moments
from split_server.closed_form.known import KnownSamples, write_known
from split_server.closed_form.result import Fitted, decode_all, fit_features
from split_server.closed_form.sample_features import SampleFeatures
from split_server.closed_form.solving import add_participant, solve_start
from split_server.closed_form.sums import check_sums

_HOSTILE_SHARE = 0.4  # that the rules are prepared for: as many as the largest that is measured


@dataclass(frozen=True)
class Rule:
    """How a run treats updates: its aggregation rule, and whether labels are compared."""

    aggregation: AggregationRule
    compares: bool = True

    @property
    def label(self) -> str:
        """The name for people."""
        return self.aggregation if self.compares else f"{self.aggregation}, labels not compared"


@dataclass(frozen=True)
class PoisonResult:
    """One run.

    Attributes:
        rule: label of the rule.
        attack: its name; None: all devices are honest.
        hostile: share of hostile devices.
        start: accuracy on held-out images after round 0.
        last: after the last round.
        best: of the state that the devices report to be best, hostile ones lying.
        backdoor: share of patched images of other classes that become the target class, at the end.
        refused: updates of hostile devices that were refused, of those sent.
        refused_honest: the same of honest devices.
    """

    rule: str
    attack: str | None
    hostile: float
    start: float
    last: float
    best: float
    backdoor: float
    refused: float
    refused_honest: float


class PoisonBench:
    """Runs of the default form on the same images.

    Args:
        plan: of the default form.
        data: the images.
        rounds: after round 0.
    """

    def __init__(self, plan: RunPlan, data: PoisonData, rounds: int) -> None:
        self._plan, self._data, self._rounds = plan, data, rounds
        self._bases: dict[int, _Basis] = {}  # by the number of devices with patched images

    def measure_all(
        self, rules: Sequence[Rule], attacks: Sequence[str], shares: Sequence[float]
    ) -> Iterator[PoisonResult]:
        """Measure each rule without hostile devices, then with each attack and share."""
        for rule in rules:
            yield self.measure(rule, None, 0.0)
            for attack in attacks:
                for share in shares:
                    if share > 0:
                        yield self.measure(rule, attack, share)

    def measure(self, rule: Rule, attack: str | None, share: float) -> PoisonResult:
        """Run a federation with a share of hostile devices to its end."""
        classes, total = self._plan.model.num_classes, len(self._data.shards)
        hostile = 0 if attack is None else math.ceil(share * total - 1e-9)
        drawn = [
            self._data.device(number, attack if number < hostile else None, classes)
            for number in range(total)
        ]
        devices, counts = [device for device, _ in drawn], [len(tokens) for _, tokens in drawn]
        plan = self._plan.model_copy(update={"federation": self._federation(rule, total)})
        with (
            tempfile.TemporaryDirectory() as folder,
            local_federation(Path(folder), plan, counts) as federation,
        ):
            places = [
                _stored(Path(folder) / f"tokens-{number}", tokens)
                for number, (_, tokens) in enumerate(drawn)
            ]
            basis = self._fit(places, plan, hostile if attack == "backdoor" else 0)
            _start(federation, plan, devices, places, basis.fitted)
            states = [federation.state()]
            while federation.is_open():
                updates = {
                    place: device.step(states[-1], len(states))
                    for place, device in enumerate(devices)
                }
                federation.send(updates, counts)
                states.append(federation.state())
            views, bad = federation.rounds(), set(federation.participants[:hostile])
        refused = [one for view in views for one in view.refused]
        labels = self._data.test.labels
        accuracies = [_share(scores(each, basis.test).argmax(dim=1) == labels) for each in states]
        return PoisonResult(
            rule=rule.label,
            attack=attack,
            hostile=hostile / total,
            start=accuracies[0],
            last=accuracies[-1],
            best=accuracies[_reported_best(states, basis.test, labels, hostile, total)],
            backdoor=_share(scores(states[-1], basis.patched).argmax(dim=1) == TARGET),
            refused=sum(one in bad for one in refused) / max(1, hostile * len(views)),
            refused_honest=sum(one not in bad for one in refused)
            / max(1, (total - hostile) * len(views)),
        )

    def _federation(self, rule: Rule, devices: int) -> FederationSettings:
        changes: dict[str, object] = {} if rule.compares else {"label_agreement": 0.0}
        return FederationSettings.model_validate(
            {
                "rounds": self._rounds,
                "evaluate_every": 0,
                "min_participants": devices,
                "aggregation": rule.aggregation,
                "hostile_share": _HOSTILE_SHARE,
                **changes,
            }
        )

    def _fit(self, places: Sequence[SampleFeatures], plan: RunPlan, patched: int) -> _Basis:
        if patched not in self._bases:
            moments = Moments(places[0].numbers)
            for place in places:
                for chunk in place.chunks():
                    moments.add(chunk)
            fitted, test = fit_features(moments, plan, places), self._data.test
            others = test.labels != TARGET
            self._bases[patched] = _Basis(
                fitted,
                _decoded(fitted.basis, test.plain, plan),
                _decoded(fitted.basis, test.patched[others], plan),
            )
        return self._bases[patched]


@dataclass(frozen=True)
class _Basis:
    """The basis of all devices' features.

    Attributes:
        fitted: the basis.
        test: features of the held-out images in it, [n, r].
        patched: of those of other classes than the target, with the patch.
    """

    fitted: Fitted
    test: Tensor
    patched: Tensor


def _start(
    federation: LocalFederation,
    plan: RunPlan,
    devices: Sequence[Device],
    places: Sequence[SampleFeatures],
    fitted: Fitted,
) -> None:
    """Run round 0. Who is refused comes back after it with honest sums, to attack later rounds."""
    codec, classes, parts = plan.wire.start, plan.model.num_classes, []
    mean, variances = fitted.sums.mean.float(), fitted.sums.variances.float()
    files = federation.runs.files(federation.run)
    for place, device in enumerate(devices):
        decoded = decode_all(fitted.basis, places[place], codec)
        device.features = Features(decoded.numpy(), mean.numpy(), variances.numpy(), 0.0)
        sums = device.sums(classes)
        try:
            check_sums(sums, decoded)
            path = files.known(0, federation.participants[place])
            write_known(path, KnownSamples(decoded, sums))
            parts.append((federation.participants[place], places[place], sums))
        except InvalidField as error:
            device.is_refused = True
            federation.decline(place, error)
    run = federation.runs.snapshot(federation.run)
    solved = solve_start(files, run, 0, fitted, parts)
    strength = solved.classifier.strength / max(1, solved.classifier.count)
    updates = {}
    for place, device in enumerate(devices):
        if not device.is_refused and device.features is not None:
            classifier = solved.classifier
            leverage = classifier.leverage(torch.from_numpy(device.features.values)).float()
            weight, bias = classifier.weight.numpy(), classifier.bias.numpy()
            fit = Fit(weight, bias, leverage.numpy(), strength)
            updates[place] = device.start(fit)
    federation.send(updates, [len(device.labels) for device in devices])
    run = federation.runs.snapshot(federation.run)
    for place, device in enumerate(devices):
        if device.is_refused and device.features is not None:
            device.decay = strength / 8
            known = KnownSamples(
                torch.from_numpy(device.features.values), device.honest_sums(classes)
            )
            add_participant(files, run, 0, solved, federation.participants[place], known)


def _reported_best(
    states: Sequence[Mapping[str, Tensor]], test: Tensor, labels: Tensor, hostile: int, total: int
) -> int:
    """Return the state with the lowest loss, by the median over devices of its change.

    Each device reports its loss on its own held-out images; hostile ones report its negative.
    """
    losses = [
        [float(F.cross_entropy(scores(state, test[part]), labels[part])) for state in states]
        for part in torch.arange(len(labels)).tensor_split(total)
    ]
    reported = [
        [-loss for loss in row] if place < hostile else row for place, row in enumerate(losses)
    ]
    changes = [statistics.median(row[at] - row[0] for row in reported) for at in range(len(states))]
    return min(range(len(states)), key=changes.__getitem__)


def _stored(path: Path, tokens: Tensor) -> SampleFeatures:
    place = SampleFeatures(path, len(tokens), tokens.shape[1])
    place.write(0, tokens)
    return place


def _decoded(basis: Basis, tokens: Tensor, plan: RunPlan) -> Tensor:
    return as_decoded(basis.project(tokens.float().unsqueeze(1)), plan.wire.start).flatten(1)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
