import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import protocol
from protocol.errors import InvalidField
from protocol.traffic import Phase, Traffic, get_phases, total_bytes
from protocol.wire import (
    BACKWARD_PATH,
    EXCHANGE_PATH,
    FORWARD_PATH,
    INFER_PATH,
    MISSING_PATH,
    SAMPLES_PATH,
)

SPLIT_PATHS = {
    FORWARD_PATH: (Phase.SMASHED, Phase.FEATURES),
    BACKWARD_PATH: (Phase.GRADIENTS, Phase.GRADIENTS),
    INFER_PATH: (Phase.INFERENCE, Phase.INFERENCE),
    EXCHANGE_PATH: (Phase.GRADIENTS, Phase.FEATURES),
    SAMPLES_PATH: (Phase.SMASHED, Phase.SMASHED),
    MISSING_PATH: (Phase.SMASHED, Phase.SMASHED),
}

PATHS = SPLIT_PATHS | {
    "/v1/runs/r1/head": (Phase.DOWNLOAD, Phase.DOWNLOAD),
    f"/v1/runs/r1/states/{'0' * 64}/state": (Phase.UPDATES, Phase.UPDATES),
    f"/v1/runs/r1/states/{'0' * 64}/delta": (Phase.UPDATES, Phase.UPDATES),
    "/v1/runs/r1/samples": (Phase.CONTROL, Phase.CONTROL),
    "/v1/runs/r1/update": (Phase.UPDATES, Phase.UPDATES),
    "/v1/runs/r1/evaluation": (Phase.CONTROL, Phase.CONTROL),
    "/v1/runs/r1/assignment": (Phase.CONTROL, Phase.CONTROL),
    "/v1/runs": (Phase.CONTROL, Phase.CONTROL),
    "/": (Phase.CONTROL, Phase.CONTROL),
    "": (Phase.CONTROL, Phase.CONTROL),
}

EXCHANGES = st.lists(
    st.tuples(st.sampled_from(sorted(PATHS)), st.integers(0, 10**12), st.integers(0, 10**12)),
    max_size=10,
)


def metered(exchanges):
    traffic = Traffic()
    for exchange in exchanges:
        traffic.add(*exchange)
    return traffic


@pytest.mark.parametrize("path", PATHS)
def test_phases_by_path(path):
    assert get_phases(path) == PATHS[path]


def test_the_specification_lists_all_paths_and_phases():
    spec = Path(protocol.__file__).with_name("SPEC.md").read_text(encoding="utf-8")
    for path, (up, down) in SPLIT_PATHS.items():
        assert f"| `{path}` | `{up}` | `{down}` |" in spec


def test_hand_calculated_counts():
    traffic = Traffic()
    traffic.add(FORWARD_PATH, 100, 70)
    traffic.add(BACKWARD_PATH, 40, 30)
    traffic.add(FORWARD_PATH, 1, 2)
    assert traffic.to_dict() == {
        "smashed": {"up": 101, "down": 0},
        "features": {"up": 0, "down": 72},
        "gradients": {"up": 40, "down": 30},
    }
    assert traffic.total() == total_bytes(traffic.to_dict()) == 101 + 72 + 40 + 30
    assert total_bytes({}) == 0


@given(EXCHANGES, EXCHANGES)
def test_no_byte_is_lost_or_counted_twice(first, second):
    traffic = metered(first)
    assert traffic.total() == sum(up + down for _, up, down in first)
    earlier = traffic.copy()
    for exchange in second:
        traffic.add(*exchange)
    assert earlier.to_dict() == metered(first).to_dict()
    assert traffic.since(earlier).total() == metered(second).total()
    merged = metered(first)
    merged.merge(metered(second))
    assert merged.to_dict() == traffic.to_dict()
    restored = Traffic.from_dict(json.loads(json.dumps(traffic.to_dict())))
    assert restored.to_dict() == traffic.to_dict()


@pytest.mark.parametrize(
    "counts", [{"gossip": {"up": 1, "down": 1}}, {"smashed": {"up": 1}}, {"smashed": {}}]
)
def test_unknown_phases_and_missing_counts_are_refused(counts):
    with pytest.raises(InvalidField) as caught:
        Traffic.from_dict(counts)
    assert caught.value.field == f"traffic.{next(iter(counts))}"
