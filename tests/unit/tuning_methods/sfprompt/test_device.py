"""SFPrompt as published, on the device: when it sends deltas, and how long it caches copies."""

import pytest
import torch

from protocol.plan import RunPlan, WirePlan
from tuning_methods.sfprompt.device import SFPromptPaperDevice

DELTAS = RunPlan(wire=WirePlan(smashed="int8"), method={"delta_smashed": "int4", "skip_below": 0.1})

ONE = 4 * 8 * 4  # bytes of a sample's copy


@pytest.mark.parametrize(("plan", "deltas"), [(RunPlan(), False), (DELTAS, True)])
def test_views_are_fixed_and_copies_cached_only_with_deltas(plan: RunPlan, deltas: bool) -> None:
    method = SFPromptPaperDevice()
    assert method.uses_fixed_views(plan) is deltas
    assert (method.delta_cache(plan, ONE) is not None) is deltas


def test_the_cache_stays_within_its_budget_until_it_is_dropped() -> None:
    method = SFPromptPaperDevice()
    cache = method.delta_cache(DELTAS, 2 * ONE)
    assert cache is not None
    cache.confirm(cache.encode([(0, None), (1, None), (2, None)], torch.randn(3, 4, 8)))
    assert method.delta_cache(DELTAS, 2 * ONE) is cache
    assert (len(cache), cache.nbytes) == (2, 2 * ONE)
    method.drop_sample_caches()
    new = method.delta_cache(DELTAS, 2 * ONE)
    assert new is not None
    assert len(new) == 0
