"""How long runs are going to take, from runs measured on two cores."""

from __future__ import annotations

from collections.abc import Sequence

from sfprompt_bench.compare.plan import Job
from sfprompt_bench.methods.base import Reference

# Seconds of one training image: in each round, or where features are frozen in the whole run.
_IMAGE_S = {
    "sfprompt": 0.02,
    "fed3r": 0.015,
    "fl-full": 0.05,
    "fedpeft-head": 0.012,
    "fedpeft-bias": 0.04,
    "fedpeft-adapter": 0.04,
    "fedpeft-prompt": 0.06,
    "splitfed-full": 0.06,
    "central": 0.06,
}
_FROZEN_IMAGE_S = 0.008

_ONCE = ("sfprompt", "fed3r")

_TEST_IMAGE_S = 0.012  # in each evaluation

_DEVICE_S, _SERVER_S, _REFERENCE_S = 2.5, 15.0, 6.0  # to start


def estimated_seconds(jobs: Sequence[Job], test_images: int) -> float:
    """Estimate the time of runs one after the other, on two cores."""
    return sum(_seconds(job, test_images) for job in jobs)


def describe_seconds(seconds: float) -> str:
    """Round a time for people: ``40 s``, ``8 min``, ``2.5 h``."""
    if seconds < 100:
        return f"{max(10, round(seconds, -1)):.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _seconds(job: Job, test_images: int) -> float:
    inputs, name = job.task.inputs, job.method.name
    limit, shots = inputs["limits"][0], inputs["shots"]
    images = limit or 10 * (shots or 60)
    federation = job.settings.federation
    image_s = _IMAGE_S.get(name, _FROZEN_IMAGE_S)
    visits = images * (federation.rounds if name in _IMAGE_S and name not in _ONCE else 1)
    if isinstance(job.method, Reference):
        return _REFERENCE_S + image_s * visits + _FROZEN_IMAGE_S * test_images
    evaluations = max(1, federation.rounds // max(1, federation.evaluate_every))
    tests = _TEST_IMAGE_S * test_images * evaluations
    return float(_SERVER_S + _DEVICE_S * inputs["devices"] + image_s * visits + tests)
