"""A request of the split plane as it came, and what its run allows it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from protocol.errors import InvalidField, MalformedFrame
from protocol.frames import Frame
from protocol.messages import ExchangeMeta
from protocol.settings import WireSettings
from split_model import SplitSettings, needed_tokens
from split_server.engine.bodies import BodyKey
from split_server.samples import Owner
from split_server.snapshot import Member, RunSnapshot


@dataclass(frozen=True)
class Asked:
    """A request as it came: by whom, and its frame."""

    run: RunSnapshot
    member: Member
    frame: Frame
    fingerprint: int  # tells a repeat from another request under the same name

    @property
    def owner(self) -> Owner:
        return Owner(self.run.id, self.member.id)

    @property
    def body(self) -> BodyKey:
        return self.run.body

    @property
    def wire(self) -> WireSettings:
        return self.run.settings.wire

    @property
    def tunes_body(self) -> bool:
        return self.run.settings.model.tune_body

    @cached_property
    def leading(self) -> int | None:
        """How many tokens of the features the run wants back; None: all."""
        if not self.run.settings.wire.pooled_features:
            return None
        return needed_tokens(SplitSettings.of(self.run.settings.model))


def require_placement(asked: Asked, placement: str) -> None:
    """Refuse a request that is for runs whose prompts join elsewhere.

    Raises:
        InvalidField
    """
    if asked.run.settings.model.prompt_at != placement:
        raise InvalidField(
            "this request is for runs whose prompts join elsewhere",
            field="prompt_at",
            limit=placement,
            value=asked.run.settings.model.prompt_at,
        )


def require_copies(asked: Asked) -> None:
    """Refuse changes where the server keeps nothing that they could change.

    Raises:
        InvalidField
    """
    if asked.wire.delta_smashed is None:
        raise InvalidField(
            "the server keeps no copies of this run's smashed data",
            field="delta_smashed",
            limit="a codec",
        )


def require_kept(asked: Asked) -> None:
    """Refuse ids where the server keeps no smashed data.

    Raises:
        InvalidField
    """
    if not asked.run.settings.wire.keep_smashed:
        raise InvalidField(
            "the server keeps no smashed data of this run", field="keep_smashed", limit=True
        )


def require_tensors(asked: Asked, meta: ExchangeMeta) -> None:
    """Refuse tensors for which an exchange of this number has no use.

    Raises:
        MalformedFrame
    """
    brought = set(asked.frame.specs)
    wanted = {"gradients"} if meta.number > 0 else set()
    batch = {"ids", "smashed"} & brought if meta.number < meta.steps else set()
    if brought != wanted | batch or len(batch) > 1:
        raise MalformedFrame(
            "an exchange brings gradients (but the first) and ids or smashed (but the last)",
            field="tensors",
            limit=sorted(wanted | {"ids"}) if meta.number < meta.steps else sorted(wanted),
            value=sorted(brought),
        )
