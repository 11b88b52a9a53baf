"""The suspicion of silences, against an independent formula and the properties that make it usable."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentfleet.core.phi import Rhythm, expected, phi, silence_for

spans = st.floats(0.01, 1000)


def tail(deviations: float) -> float:
    """The normal distribution's upper tail, integrated by Simpson's rule."""
    steps, width = 2000, 12.0 / 2000
    heights = [math.exp(-((deviations + step * width) ** 2) / 2) for step in range(steps + 1)]
    area = width / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
    return area / math.sqrt(2 * math.pi)


@given(spans, spans, st.floats(-4, 12))
def test_phi_is_the_logarithm_of_the_normal_tail(mean: float, deviation: float, deviations: float) -> None:
    silence = mean + deviations * deviation
    exact = (silence - mean) / deviation  # what is left of `deviations` after rounding
    assert phi(silence, mean, deviation) == pytest.approx(-math.log10(tail(exact)), rel=1e-6, abs=1e-6)


def test_phi_as_published() -> None:
    assert phi(1.0, 1.0, 0.1) == pytest.approx(math.log10(2))
    assert phi(1.0 + 0.1 * 1.2815515655446004, 1.0, 0.1) == pytest.approx(1.0)
    assert phi(1.0 + 0.1 * 3.090232306167813, 1.0, 0.1) == pytest.approx(3.0)
    assert phi(1e9, 1.0, 0.1) == 300.0


@given(st.floats(0.5, 300), spans, spans)
def test_silence_for_is_the_inverse(threshold: float, mean: float, deviation: float) -> None:
    silence = silence_for(threshold, mean, deviation)
    if silence > 0:
        assert phi(silence + deviation * 1e-6, mean, deviation) >= threshold * (1 - 1e-6) - 1e-6
        assert phi(silence - deviation * 1e-6, mean, deviation) <= threshold * (1 + 1e-6) + 1e-6


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=64))
def test_early_on_the_mean_is_the_plain_mean(intervals: list[float]) -> None:
    rhythm, at = expected(1.0, 0.0).heard(100.0, math.inf), 100.0
    for interval in intervals[:60]:
        at += interval
        rhythm = rhythm.heard(at, math.inf)
    seen = [1.0, *intervals[:60]]
    assert rhythm.mean == pytest.approx(statistics.fmean(seen), rel=1e-9)
    seed = (1.0 * 0.25) ** 2 / len(seen)  # what is left of the first guess
    assert rhythm.variance == pytest.approx(statistics.pvariance(seen) + seed, rel=1e-6, abs=1e-9)


def test_an_outage_is_not_learnt_but_a_slower_agent_is() -> None:
    rhythm = expected(1.0, 0.0)
    for at in range(100):
        rhythm = rhythm.heard(float(at), 3.0)
    after = rhythm.heard(10_000.0, 3.0)
    assert after.mean < 1.1
    assert after.last == 10_000.0
    for _ in range(400):
        after = after.heard(after.last + 10.0, max(3.0, silence_for(10, after.mean, after.deviation)))
    assert after.mean == pytest.approx(10.0, rel=0.05)


def test_deafness_is_no_silence() -> None:
    rhythm = Rhythm(100.0, 1.0, 0.01, 50)
    assert rhythm.excused(3.0, 110.0).last == 103.0
    assert rhythm.excused(math.inf, 110.0).last == 110.0
    assert rhythm.excused(5.0, 99.0).last == 99.0  # by another machine's clock
