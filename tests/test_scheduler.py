"""Learning rates against their closed forms, with the numbers written out."""

import math

import pytest

from utils.scheduler import SCHEDULES


@pytest.mark.parametrize(
    ("decay_type", "step", "factor"),
    [
        *((decay_type, 1, 1 / 500) for decay_type in SCHEDULES),
        *((decay_type, 499, 499 / 500) for decay_type in SCHEDULES),
        *((decay_type, 500, 1.0) for decay_type in SCHEDULES),
        *((decay_type, 10_250, 0.5) for decay_type in SCHEDULES),  # half of the way down
        *((decay_type, 20_000, 0.0) for decay_type in SCHEDULES),
        ("cosine", 501, 0.5 * (1 + math.cos(math.pi / 19500))),
        ("cosine", 10_000, 0.5 * (1 + math.cos(math.pi * 9500 / 19500))),
        ("linear", 501, 19499 / 19500),
        ("linear", 10_000, 10_000 / 19500),
    ],
)
def test_factors_of_the_default_run(decay_type, step, factor):
    """Truth: the closed forms at the reference's defaults: 500 steps of warm-up, 20,000 in all."""
    assert SCHEDULES[decay_type](step, 500, 20_000) == pytest.approx(factor, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("decay_type", SCHEDULES)
def test_no_warmup(decay_type):
    """Truth: without warmup the decay starts at the peak and ends at 0."""
    factors = [SCHEDULES[decay_type](u, 0, 10) for u in range(11)]
    assert factors[0] == 1 and factors[10] == pytest.approx(0, abs=1e-12)
    assert factors[5] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(factors, factors[1:]))


@pytest.mark.parametrize("decay_type", SCHEDULES)
@pytest.mark.parametrize("warmup", [10, 11, 500])
def test_warmup_as_long_as_training_or_longer(decay_type, warmup):
    """Truth: u / warmup below warmup; the last step divides nothing by zero."""
    factors = [SCHEDULES[decay_type](u, warmup, 10) for u in range(11)]
    assert factors[:10] == [u / warmup for u in range(10)]
    assert 0 <= factors[10] <= 1


def test_schedules_are_those_of_the_flag():
    """Truth: --decay_type of the reference."""
    assert set(SCHEDULES) == {"cosine", "linear"}
