"""Ids of runs that people can read, say and type: amber-otter-k3f9."""

from __future__ import annotations

import re
import secrets

_ADJECTIVES = (
    "amber agile brave bright calm clever cosy crisp early fair fast fresh gentle glad golden "
    "grand green happy honest jolly keen kind light lively lucky mellow mild misty neat noble "
    "olive plain polite proud quick quiet rapid ready royal rustic shiny silent silver smart "
    "snowy solid steady sunny swift tidy tiny vivid warm wild wise witty young zesty"
)

_ANIMALS = (
    "ant badger bear beaver bee bison camel cat cobra crab crane crow deer dog dove duck eagle "
    "eel falcon finch fox frog gecko goat goose hare hawk heron horse ibis jay koala lark lemur "
    "lion llama lynx mole moose moth mouse newt otter owl panda puma quail rabbit raven robin "
    "seal shark sheep sloth snail squid stork swan tiger toad trout turtle whale wolf wren yak "
    "zebra"
)

_LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"  # without those that look alike

_PATTERN = re.compile(r"[a-z]+-[a-z]+-[2-9a-z]{4}")


def new_run_id() -> str:
    """Make the id of a new run.

    Ids never repeat in practice: the credentials of a deleted run's devices name its id, and must
    not open another run.
    """
    ending = "".join(secrets.choice(_LETTERS) for _ in range(4))
    return f"{_word(_ADJECTIVES)}-{_word(_ANIMALS)}-{ending}"


def is_run_id(name: str) -> bool:
    """Whether a name has the form of a run's id."""
    return _PATTERN.fullmatch(name) is not None


def _word(words: str) -> str:
    return secrets.choice(words.split())
