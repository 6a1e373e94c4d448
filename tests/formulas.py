"""Formulas of the norm layers, written out in plain torch, and what compares layers with them."""

import copy
import math

import torch
from small import random_state, small_config
from torch import nn

from models.modeling import VisionTransformer
from models.norm_layers import (
    ISRU,
    AddBias,
    BatchNorm,
    Derf,
    DyT,
    GainOnlyLayerNorm,
    GroupNorm,
    LayerNorm,
    RepBN,
    RMSNorm,
    UnitVariance,
)

DIM = 24
EPS = 1e-6


def tokens(seed=0, batch=6, n=10, dim=DIM):
    """(B, N, D) with another mean and spread in each channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, dim, generator=generator)
    return x * torch.linspace(0.5, 2, dim) + torch.linspace(-1, 1, dim)


def made(layer):
    return layer() if layer in (UnitVariance, nn.Identity) else layer(DIM)


def randomized(module, count=8):
    """`module` with a random state, in which what was measured as a mean square is positive."""
    state = random_state(module, count)
    for name in state:
        if name.endswith("mean_square"):
            state[name] = 1 + state[name].abs()
    module.load_state_dict(state)
    return module


def variant(norm_type="LN", qk_norm="none", seed=0, side=16, vis=False, entries=None, **config):
    """A small model as it is at the start, with `entries` of its config changed."""
    config = small_config(**config)
    config.update(entries or {})
    torch.manual_seed(seed)
    return VisionTransformer(config, side, norm_type, 7, vis=vis, qk_norm=qk_norm)


def assert_formula(module, formula, x, rtol=1e-9, atol=1e-10):
    """`module(x)` and all gradients are those of `formula` of a copy of it."""
    results = []
    for m, function in ((module, nn.Module.__call__), (copy.deepcopy(module), formula)):
        leaf = x.clone().requires_grad_()
        y = function(m, leaf)
        y.backward(tokens(77, *x.shape).to(x.dtype))
        results.append({"y": y.detach(), "x": leaf.grad} | {n: p.grad for n, p in named(m)})
    torch.testing.assert_close(*results, rtol=rtol, atol=atol)


def named(module):
    return list(module.named_parameters())


# ---------------------------------------------------------------- the formulas


def standardized(x, dims):
    """x with mean 0 and variance 1 over `dims`."""
    z = x - x.mean(dims, keepdim=True)
    return z / (z.square().mean(dims, keepdim=True) + EPS).sqrt()


def affine(n, y):
    return n.weight * y if n.bias is None else n.weight * y + n.bias


def batch_norm(n, x):
    n = n.layer
    if n.training:
        return affine(n, standardized(x, (0, 1)))
    return affine(n, (x - n.running_mean) / (n.running_var + EPS).sqrt())


LAYERS = {
    LayerNorm: lambda n, x: affine(n, standardized(x, -1)),
    GainOnlyLayerNorm: lambda n, x: n.weight * standardized(x, -1),
    RMSNorm: lambda n, x: n.weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt(),
    BatchNorm: batch_norm,
    RepBN: lambda n, x: batch_norm(n, x) + n.alpha * x,
    GroupNorm: lambda n, x: affine(
        n.layer, standardized(x.unflatten(-1, (4, -1)), (1, 3)).flatten(2)
    ),
    DyT: lambda n, x: affine(n, 1 - 2 / (1 + (2 * n.alpha * x).exp())),
    Derf: lambda n, x: affine(
        n, 2 * torch.special.ndtr(math.sqrt(2) * (n.alpha * x + n.shift)) - 1
    ),
    ISRU: lambda n, x: affine(n, torch.sin(torch.atan(n.alpha * x + n.shift))),
    AddBias: lambda n, x: x + n._bias - n.init_mean,  # once all is measured
    UnitVariance: lambda n, x: n._scale * x / (n.mean_square + EPS).sqrt(),
    nn.Identity: lambda n, x: x,
}


def written(layer, x):
    """The formula of `layer`, with its parameters and buffers, on x (B, N, D)."""
    return LAYERS[type(layer)](layer, x)
