"""Settings of the federation: participants, rounds, aggregation and differential privacy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from protocol.base import Message

__all__ = ["AggregationRule", "FederationSettings", "ServerOptimizer"]

ServerOptimizer = Literal["fedavg", "fedavgm", "fedadam", "fedyogi"]

AggregationRule = Literal["fedavg", "median", "trimmed-mean", "krum", "multi-krum"]


class FederationSettings(Message):
    """How rounds run and how the server averages their updates."""

    rounds: int = Field(
        8, ge=0, le=100_000, description="rounds of training; 0: only a closed-form start"
    )
    min_participants: int = Field(
        1, ge=1, le=100_000, description="participants that the first round waits for"
    )
    participants_per_round: int | None = Field(
        None, ge=1, le=100_000, description="participants drawn at random for each round; none: all"
    )
    min_updates: int = Field(
        1,
        ge=1,
        le=100_000,
        description="updates that a round needs by its deadline; with fewer, it is repeated",
    )
    round_timeout_s: float = Field(
        600.0,
        gt=0,
        le=7 * 86_400,
        description="time for a round's training in seconds; later updates are refused",
    )
    max_repeats: int = Field(
        3,
        ge=0,
        le=1000,
        description="repetitions of one round before the run fails; a round that devices miss is "
        "repeated once they are back, however often",
    )
    evaluate_every: int = Field(
        1, ge=0, le=100_000, description="rounds from one evaluation to the next; 0: no evaluation"
    )
    keep_best: bool = Field(
        True,
        description="discard a state whose loss is above that of the best one, go back to the best "
        "one, and halve the learning rates; in runs whose devices report a loss for that, see "
        "training.validation_share",
    )
    patience: int = Field(
        3,
        ge=0,
        le=100_000,
        description="finish after this number of evaluations in a row that lowered this loss by "
        "less than 0.1 %; 0: never before the last round",
    )
    max_samples: int = Field(
        1_000_000,
        ge=1,
        lt=2**53,
        description="training or test samples that a participant may join with; bounds its weight",
    )
    update_norm_bound: float | None = Field(
        10.0,
        ge=1,
        le=1e6,
        description="limit of an update's L2 norm, as a multiple of the median of the round's "
        "updates; with fewer than three updates the limit is 100 times the norm of the global "
        "state; longer updates are refused; none, and with dp_clip: no limit",
    )
    aggregation: AggregationRule = Field(
        "fedavg",
        description="fedavg: mean weighted by samples | median, trimmed-mean: of each element | "
        "krum: the update nearest to the others | multi-krum: mean of the nearest updates",
    )
    hostile_share: float = Field(
        0.2,
        ge=0,
        lt=0.5,
        description="share of hostile participants that trimmed-mean, krum and multi-krum "
        "tolerate; the number is rounded up",
    )
    label_agreement: float = Field(
        0.5,
        ge=0,
        le=1,
        description="with a closed-form start, least share of a participant's samples in classes "
        "that resemble the others' same class more than another; with a lower one its data and "
        "updates are left out, unless that would be half of the participants; 0: never",
    )
    server_optimizer: ServerOptimizer = Field(
        "fedavg", description="optimiser that applies the mean update to the global state"
    )
    server_learning_rate: float | None = Field(
        None,
        gt=0,
        le=100,
        description="learning rate of the server optimiser; none: 1 for fedavgm, 0.01 for fedadam "
        "and fedyogi; must be none for fedavg",
    )
    server_momentum: float = Field(
        0.9, ge=0, lt=1, description="momentum of fedavgm, beta 1 of fedadam and fedyogi"
    )
    server_beta2: float = Field(0.99, ge=0, lt=1, description="beta 2 of fedadam and fedyogi")
    server_tau: float = Field(
        1e-3, gt=0, le=1, description="tau of fedadam and fedyogi, added to the square root"
    )
    dp_clip: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="L2 bound of an update's change of the global state; all updates then have "
        "equal weights; none: no differential privacy",
    )
    dp_noise_multiplier: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="standard deviation of the noise on the sum of the changes, divided by dp_clip",
    )
    dp_delta: float = Field(1e-3, gt=0, lt=1, description="delta of the reported epsilon")
    dp_seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="seed of the noise, only for tests and benchmarks, since participants could "
        "compute the noise; none: entropy of the operating system",
    )

    @model_validator(mode="after")
    def _check_noise(self) -> FederationSettings:
        if self.dp_noise_multiplier and self.dp_clip is None:
            raise ValueError("dp_noise_multiplier needs dp_clip")
        if 0 < self.dp_noise_multiplier < 1e-3:
            raise ValueError(
                "dp_noise_multiplier must be 0 or at least 0.001: less noise gives no privacy"
            )
        return self

    @model_validator(mode="after")
    def _check_aggregation(self) -> FederationSettings:
        if self.aggregation != "fedavg" and self.dp_clip is not None:
            raise ValueError(
                f"dp_clip needs aggregation fedavg, not {self.aggregation}: it adds noise to a mean"
            )
        return self

    @model_validator(mode="after")
    def _check_participants(self) -> FederationSettings:
        drawn = self.participants_per_round
        if drawn is not None and drawn < self.min_updates:
            raise ValueError(
                f"participants_per_round ({drawn}) is below min_updates ({self.min_updates})"
            )
        return self

    @model_validator(mode="after")
    def _check_server_learning_rate(self) -> FederationSettings:
        if self.server_optimizer == "fedavg" and self.server_learning_rate is not None:
            raise ValueError("server_learning_rate needs a server_optimizer other than fedavg")
        return self
