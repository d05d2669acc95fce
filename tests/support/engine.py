"""Engines for tests, and a round of exchanges through the engine and by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from protocol.plan import RunPlan, TrainingPlan
from split_model.backbone import weights
from split_model.backbone.libraries import timm
from split_model.backbone.weights import open_backbone
from split_model.layers.prompts import prompt_shape
from split_server.engine.api import ExchangeJob, SessionPlan
from split_server.engine.body_cache import BodyCache
from split_server.engine.engine import Engine
from split_server.engine.limits import EngineLimits
from split_server.models.body_key import BodyKey
from split_server.runtime.device import Placement, choose_placement
from tests.support.federation import SMALL, SPLIT, FakeClock, run_settings
from tuning_methods.splitfed.tuned_bodies import TunedBodies

MIB = 1024 * 1024

PLACEMENT = choose_placement("cpu", "float32")

PREFIX, PATCHES, PROMPTS, WIDTH = 1, 4, 2, 192

TOKENS = PREFIX + PATCHES

DEPTHS = ["shallow", "deep"]

RATE = 0.5

MakeEngine = Callable[..., Engine]


def prepare_backbone(folder: Path) -> Path:
    return weights.prepare_backbone(SMALL, "random:0", folder).path


def input_body(folder: Path) -> BodyKey:
    """Return the body of a run with prompts at the input; its weights are in this folder."""
    path = weights.prepare_backbone(SPLIT, "random:0", folder).path
    return BodyKey.of(str(path), run_settings())


@contextmanager
def engines(placement: Placement = PLACEMENT) -> Iterator[MakeEngine]:
    """Yield a function that makes engines with shared bodies; stop them at the end."""
    bodies, created = BodyCache(placement), list[Engine]()

    def make(retained: int = 256 * MIB, time: FakeClock | None = None, **more: Any) -> Engine:
        limits = EngineLimits(retained, 64 * MIB, 64 * MIB, 300.0, 4, **more)
        clock = (time or FakeClock()).clock()
        created.append(Engine(bodies, placement, limits, clock, handlers=[TunedBodies]))
        return created[-1]

    yield make
    for engine in created:
        engine.close()


def is_empty(engine: Engine) -> bool:
    """Whether no step is retained and no memory is reserved."""
    memory = engine._tracker.memory
    return len(memory.steps) == memory.steps.nbytes == memory.reserved == 0


def tuned_prompts(engine: Engine, who: str = "p1", session: str = "s") -> Tensor:
    """Return the prompts [L, P, D] of a finished session of run r1."""
    return engine.trained_state("r1", who, session)["prompts"]


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smashed(batch: int = 3, seed: int = 0) -> Tensor:
    """Return smashed data [B, T, D] without prompts."""
    return numbers(seed, batch, TOKENS, WIDTH)


@functools.cache
def uncut_blocks(backbone: Path) -> nn.Sequential:
    """Return the frozen blocks of timm's own model."""
    model = timm.create_model(SMALL.backbone, img_size=SMALL.image_size, num_classes=2).eval()
    model.load_state_dict(dict(open_backbone(backbone)), strict=False)
    blocks: nn.Sequential = model.requires_grad_(False).blocks
    return blocks


class Case:
    """A run with its prompts at the cut, and the requests of one participant's round."""

    def __init__(self, backbone: Path, depth: str, num_tokens: int | None = None) -> None:
        model = SMALL.model_copy(update={"prompt_at": "cut", "prompt_depth": depth})
        self.training = TrainingPlan(
            optimizer="sgd", momentum=0.9, prompt_learning_rate=RATE, schedule="constant"
        )
        settings = RunPlan(model=model, training=self.training)
        self.split = model
        self.key = BodyKey.of(str(backbone), settings)
        self.num_tokens = num_tokens
        self.initial = 0.3 * numbers(99, *prompt_shape(self.split))
        self.backbone = backbone

    @property
    def plan(self) -> SessionPlan:
        return SessionPlan(self.training, rounds=4, round=1, initial=lambda: self.initial)

    def job(
        self,
        number: int,
        steps: int,
        batch: Tensor | None,
        gradients: Tensor | None = None,
        *,
        who: str = "p1",
        session: str = "s",
    ) -> ExchangeJob:
        known = [tensor for tensor in (batch, gradients) if tensor is not None]
        return ExchangeJob(
            run="r1",
            participant=who,
            session=session,
            number=number,
            steps=steps,
            body=self.key,
            plan=self.plan,
            gradients=gradients,
            smashed=batch,
            fingerprint=hash(tuple(float(tensor.double().sum()) for tensor in known)),
            num_tokens=self.num_tokens,
        )

    async def train(
        self, engine: Engine, batches: Sequence[Tensor], **of: Any
    ) -> tuple[list[Tensor], Tensor]:
        """Run a whole session; return each batch's features and the tuned prompts."""
        gradients: Tensor | None = None
        features = []
        for number, batch in enumerate(batches):
            job = self.job(number, len(batches), batch, gradients, **of)
            features.append(await engine.submit(job))
            gradients = gradient_of(features[-1])
        last = self.job(len(batches), len(batches), None, gradients, **of)
        assert (await engine.submit(last)).numel() == 0
        return features, engine.trained_state("r1", of.get("who", "p1"), of.get("session", "s"))[
            "prompts"
        ]

    def by_hand(self, batches: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Compute the same with timm's blocks and torch's optimiser."""
        blocks = uncut_blocks(self.backbone)
        prompts = nn.Parameter(self.initial.clone())
        optimizer = torch.optim.SGD([prompts], lr=RATE, momentum=0.9)
        features = []
        for batch in batches:
            tokens = batch
            for place, block in enumerate(blocks[SMALL.cut :]):
                if place < len(prompts):
                    own = prompts[place].expand(len(batch), -1, -1)
                    patches = tokens[:, -PATCHES:]
                    tokens = torch.cat([tokens[:, :PREFIX], own, patches], dim=1)
                tokens = block(tokens)
            read = tokens if self.num_tokens is None else tokens[:, : self.num_tokens]
            optimizer.zero_grad()
            torch.sin(read).mean().backward()
            optimizer.step()
            features.append(read.detach())
        return features, prompts.detach()


def gradient_of(features: Tensor) -> Tensor:
    """Return the gradient of mean(sin(features)), which stands for a device's loss."""
    return torch.cos(features) / features.numel()


BATCHES = [smashed(3, 1), smashed(3, 2), smashed(2, 3), smashed(3, 4)]
