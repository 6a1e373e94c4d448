"""Schedules: the factor on the peak learning rate at step u = 1..total, and patch dropout's end."""

import math


def warmup_cosine(u, warmup, total):
    """u/warmup below `warmup`, then 0.5 (1 + cos(pi (u - warmup)/(total - warmup)))."""
    if u < warmup:
        return u / warmup
    return 0.5 * (1 + math.cos(math.pi * (u - warmup) / max(1, total - warmup)))


def warmup_linear(u, warmup, total):
    """u/warmup below `warmup`, then linearly down to 0 at `total`."""
    if u < warmup:
        return u / warmup
    return (total - u) / max(1, total - warmup)


SCHEDULES = {"cosine": warmup_cosine, "linear": warmup_linear}


def patch_dropout_steps(flags):
    """How many steps leave patches out; the others train on all of them, as evaluation does."""
    return round(flags.patch_dropout_until * flags.num_steps)
