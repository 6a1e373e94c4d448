"""Learning rates against their closed forms, with the numbers written out."""

import math

import pytest
import torch

from utils.scheduler import SCHEDULES, lr_table

PEAK = 0.05


@pytest.mark.parametrize(
    ("u", "factor"),
    [
        (1, 1 / 500),
        (499, 499 / 500),
        (500, 1.0),
        (501, 0.5 * (1 + math.cos(math.pi / 19500))),
        (10_000, 0.5 * (1 + math.cos(math.pi * 9500 / 19500))),
        (10_250, 0.5),  # half of the way down
        (20_000, 0.0),
    ],
)
def test_cosine(u, factor):
    """Truth: the closed form at the reference's defaults: update u uses peak * lambda(u)."""
    rate = lr_table("cosine", PEAK, 500, 20_000)[u].item()
    assert rate == pytest.approx(PEAK * factor, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("u", "factor"),
    [
        (1, 1 / 500),
        (499, 499 / 500),
        (500, 1.0),
        (501, 19499 / 19500),
        (10_000, 10_000 / 19500),
        (20_000, 0.0),
    ],
)
def test_linear(u, factor):
    """Truth: the closed form of the straight line from the peak at 500 to 0 at 20,000."""
    rate = lr_table("linear", PEAK, 500, 20_000)[u].item()
    assert rate == pytest.approx(PEAK * factor, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("decay_type", ["cosine", "linear"])
def test_table_rounds_the_closed_form_once(decay_type):
    """Truth: double-precision numbers, each rounded to the nearest float; one entry per update."""
    warmup, total = 7, 40

    def factor(u):
        if u < warmup:
            return u / warmup
        done = (u - warmup) / (total - warmup)
        return 0.5 * (1 + math.cos(math.pi * done)) if decay_type == "cosine" else 1 - done

    table = lr_table(decay_type, PEAK, warmup, total)
    assert table.dtype == torch.float32 and table.shape == (total + 1,)
    expected = torch.tensor([PEAK * factor(u) for u in range(total + 1)], dtype=torch.float64)
    # The same number to the last bit, or its neighbour where double rounding itself was unlucky.
    torch.testing.assert_close(table, expected.float(), rtol=2**-23, atol=1e-18)
    assert (table == expected.float()).float().mean() > 0.9


@pytest.mark.parametrize("decay_type", ["cosine", "linear"])
def test_against_pytorchs_lambda_lr(decay_type):
    """Truth: LambdaLR on the written-out lambda: after u of its steps it holds rate u."""
    warmup, total = 5, 30
    written = {
        "cosine": lambda u: u / 5 if u < 5 else 0.5 * (1 + math.cos(math.pi * (u - 5) / 25)),
        "linear": lambda u: u / 5 if u < 5 else (30 - u) / 25,
    }[decay_type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, written)
    table = lr_table(decay_type, PEAK, warmup, total).tolist()
    for u in range(total + 1):
        assert scheduler.get_last_lr()[0] == pytest.approx(table[u], rel=1e-6, abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("decay_type", ["cosine", "linear"])
def test_no_warmup(decay_type):
    """Truth: without warmup the decay starts at the peak and ends at 0."""
    table = lr_table(decay_type, PEAK, 0, 10).tolist()
    assert table[0] == pytest.approx(PEAK) and table[10] == pytest.approx(0, abs=1e-12)
    assert table[5] == pytest.approx(PEAK / 2)
    assert all(a > b for a, b in zip(table, table[1:]))


@pytest.mark.parametrize("decay_type", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [11, 500])
def test_warmup_longer_than_training(decay_type, warmup):
    """Truth: u / warmup throughout: training ends before the peak."""
    table = lr_table(decay_type, PEAK, warmup, 10)
    torch.testing.assert_close(table, PEAK * torch.arange(11) / warmup)


@pytest.mark.parametrize("decay_type", ["cosine", "linear"])
def test_warmup_as_long_as_training(decay_type):
    """Truth: u / warmup below warmup; the last update itself divides nothing by zero."""
    table = lr_table(decay_type, PEAK, 10, 10)
    torch.testing.assert_close(table[:10], PEAK * torch.arange(10) / 10)
    assert 0 <= table[10] <= PEAK


def test_schedules_are_those_of_the_flag():
    """Truth: --decay_type of the reference."""
    assert set(SCHEDULES) == {"cosine", "linear"}
