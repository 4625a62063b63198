"""Judging against the paper, and class balancing against its own baseline."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbl.report import verdict
from cbl.report.verdict import Gain

errors = st.lists(st.floats(0, 100), min_size=1, max_size=8)


def row(seed: int, error: float, subset_seed: int = 0) -> dict:
    return {"cell": "c", "seed": seed, "subset_seed": subset_seed, "error_last": error}


def test_standard_error_has_the_noise_of_both() -> None:
    assert verdict.standard_error([30.0]) == pytest.approx(math.sqrt(0.49 + 0.49))
    assert verdict.standard_error([30.0, 40.0]) == pytest.approx(math.sqrt(0.49 + 0.49 / 2))  # two runs tell no sd
    assert verdict.standard_error([29.0, 30.0, 31.0]) == pytest.approx(math.sqrt(0.49 + 1 / 3))


@pytest.mark.parametrize(
    ("paper", "ours", "expected"),
    [
        (25.19, [24.02], "agrees"),  # the authors' own re-run of CIFAR-10, IF 50, softmax
        (25.19, [22.50], "better"),  # a user's, with the same code
        (25.43, [27.50], "worse"),
        (30.0, [31.6, 31.6, 31.6], "worse"),  # three equal runs: what is left is the paper's noise, 2 x 0.7
        (30.0, [31.3, 31.3, 31.3], "agrees"),
        (None, [31.3], "–"),
        (30.0, [], "–"),
    ],
)
def test_verdict(paper: float | None, ours: list[float], expected: str) -> None:
    assert verdict.verdict(paper, ours) == expected


@given(errors)
def test_verdict_turns_at_two_standard_errors(ours: list[float]) -> None:
    mean, two = float(np.mean(ours)), 2 * verdict.standard_error(ours)
    assert verdict.verdict(mean + 0.999 * two, ours) == verdict.verdict(mean - 0.999 * two, ours) == "agrees"
    assert verdict.verdict(mean + 1.001 * two, ours) == "better"
    assert verdict.verdict(mean - 1.001 * two, ours) == "worse"


def test_bootstrap_of_few() -> None:
    assert verdict.bootstrap([]) is None
    assert verdict.bootstrap([1.5]) == Gain(1.5, None, 1)
    # all three alike come up in 1 of 27 resamples, more often than 2.5 %: the interval is the range
    assert verdict.bootstrap([1.0, 2.0, 6.0]) == Gain(3.0, (1.0, 6.0), 3)


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=8))
def test_bootstrap_interval_lies_in_the_range_and_comes_out_alike(differences: list[float]) -> None:
    gain = verdict.bootstrap(differences)
    assert gain is not None and gain.interval is not None
    low, high = gain.interval
    assert min(differences) - 1e-9 <= low <= high <= max(differences) + 1e-9
    assert gain == verdict.bootstrap(differences)


def test_bootstrap_interval_of_many_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    gain = verdict.bootstrap(list(values))
    assert gain is not None and gain.interval is not None
    half = 1.96 * values.std() / 20
    assert gain.interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_pairs_share_both_seeds() -> None:
    first = [row(0, 30.0), row(1, 31.0), row(1, 32.0, subset_seed=1), row(3, 33.0)]
    second = [row(3, 13.0), row(1, 12.0, subset_seed=1), row(0, 10.0, subset_seed=1), row(1, 11.0)]
    both = [(a["error_last"], b["error_last"]) for a, b in verdict.pairs(first, second)]
    assert both == [(31.0, 11.0), (32.0, 12.0), (33.0, 13.0)]
    with pytest.raises(ValueError, match="same seeds"):
        verdict.pairs([row(0, 30.0), row(0, 31.0)], second)


def test_a_mean_of_zero_is_zero_whatever_floats_make_of_it() -> None:
    """Of the forty changes by a strided shortcut, focal loss on the digits, the lower bound once was 8.9e-17."""
    gain = verdict.bootstrap([0.1, 0.2, -0.3] * 13 + [70.1, -70.1])
    assert gain is not None and gain.interval is not None
    assert gain.interval == tuple(round(bound, 9) for bound in gain.interval)
