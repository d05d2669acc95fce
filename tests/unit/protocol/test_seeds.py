import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from protocol.seeds import derive_seed

PARTS = st.lists(st.text() | st.integers(), max_size=4)


def test_a_seed_by_hand():
    # The parts "int:7" and "str:shuffle", each after its length in four bytes.
    encoded = b"\x05\x00\x00\x00int:7" + b"\x0b\x00\x00\x00str:shuffle"
    first = int.from_bytes(hashlib.sha256(encoded).digest()[:8], "little")
    assert derive_seed(7, "shuffle") == first // 2


def test_seeds_are_stable():
    assert derive_seed(0) == 2964823517770466700
    assert derive_seed(7, "shuffle", 3, 0) == 3930153940112553932


@given(st.integers(), PARTS)
def test_a_seed_is_deterministic_and_has_63_bits(run_seed, parts):
    seed = derive_seed(run_seed, *parts)
    assert seed == derive_seed(run_seed, *parts)
    assert 0 <= seed < 2**63


@given(st.integers(), PARTS, st.integers(), PARTS)
def test_different_arguments_give_different_seeds(seed, parts, other_seed, other_parts):
    same = (seed, *parts) == (other_seed, *other_parts)
    assert (derive_seed(seed, *parts) == derive_seed(other_seed, *other_parts)) == same


def test_parts_do_not_run_into_each_other():
    seeds = [
        derive_seed(1, "ab", "c"),
        derive_seed(1, "a", "bc"),
        derive_seed(1, "abc"),
        derive_seed(1, "abc", ""),
        derive_seed(1, 23),
        derive_seed(1, "23"),
        derive_seed(12, 3),
    ]
    assert len(set(seeds)) == len(seeds)


def test_numpy_and_python_integers_give_the_same_seed():
    assert derive_seed(1, np.int64(3)) == derive_seed(1, 3)
