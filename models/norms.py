"""Norm types: what --norm_type chooses, each a block whose `forward` is its paper's equation.

A type is one line of `NORM_TYPES`. To add one, write its block (or only a norm layer for `PreNorm`)
and that line; nothing else in the program knows a norm type by name.

Shapes: B batch, N tokens (the class token first), D channels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

EPS = 1e-6
ALL = slice(None)


class Block(nn.Module):
    """An encoder block, x (B, N, D) -> (B, N, D), over the branches `attn` and `ffn`.

    `norm(dim)` makes a norm layer; `index` counts the blocks from 0 to `depth` - 1.

    The head reads the class token alone. So the last block is called as `forward(x, tokens)`, for
    some of the tokens, if its `per_token` says that what surrounds the attention maps each token by
    itself. A block that does not say so computes them all.
    """

    per_token = False

    def __init__(self, attn, ffn, norm, dim, index, depth):
        super().__init__()
        self.index, self.depth = index, depth
        self.add_norms(norm, dim)
        self.ffn = ffn
        self.attn = attn

    def add_norms(self, norm, dim):
        """Make the layers and parameters that the block has besides its branches."""


class PreNorm(Block):
    """x <- x + Attn(Norm(x));  x <- x + MLP(Norm(x)).

    Source: Dosovitskiy et al. 2021, equations 2 and 3.
    """

    def add_norms(self, norm, dim):
        self.attention_norm = norm(dim)
        self.ffn_norm = norm(dim)

    @property
    def per_token(self):
        return is_per_token(self.ffn_norm)

    def forward(self, x, tokens=ALL):
        x = x[:, tokens] + self.attn(self.attention_norm(x), tokens)
        x = x + self.ffn(self.ffn_norm(x))
        return x


class Rescale(Block):
    """No normalization: biases instead of norms, and an identity that shrinks with depth.

    x <- x + Attn(x + b);  x <- sqrt(k/(k+1)) x + s/sqrt(L) MLP(x + b'),  block k = 1..L of L.
    Source: the reference's own variant of RescaleNet (Shao et al. 2020, eq. 7).
    """

    def add_norms(self, norm, dim):
        self._scale = nn.Parameter(torch.ones(1))
        self.addbias = norm(dim)
        self.ffn_addbias = norm(dim)
        k = self.index + 1
        self.identity = math.sqrt(k / (k + 1))
        self.branch = self.depth**-0.5

    @property
    def per_token(self):
        return is_per_token(self.ffn_addbias)

    def forward(self, x, tokens=ALL):
        # Reference: neither the attention branch nor its identity is scaled.
        x = x[:, tokens] + self.attn(self.addbias(x), tokens)
        branch = self.ffn(self.ffn_addbias(x))
        return torch.addcmul(self.identity * x, self.branch * self._scale, branch)  # a + b * c


class LayerNorm(nn.LayerNorm):
    """Over the channels of each token. Source: Ba et al. 2016."""

    per_token = True

    def __init__(self, dim):
        super().__init__(dim, eps=EPS)


class BatchNorm(nn.Module):
    """A statistic per channel, over batch and tokens. Source: Ioffe & Szegedy 2015."""

    def __init__(self, dim):
        super().__init__()
        self.layer = nn.BatchNorm1d(dim, eps=EPS, momentum=0.1)

    @property
    def per_token(self):
        return not self.training

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).view_as(x)


class GroupNorm(nn.Module):
    """4 groups, each over D/4 channels and all N tokens. Source: Wu & He 2018."""

    def __init__(self, dim, groups=4):
        super().__init__()
        self.layer = nn.GroupNorm(groups, dim, eps=EPS)

    def forward(self, x):
        # Tokens with their channels together are what PyTorch calls channels-last, if seen as
        # (B, D, N, 1): read and written as they lie.
        return self.layer(x.mT.unsqueeze(-1)).squeeze(-1).mT


class AddBias(nn.Module):
    """x + bias - m, with the mean m of the first 8 training batches in place of a norm's.

    Meanwhile m is the mean of those seen so far, and the learned bias counts one hundredth.
    Source: Shao et al. 2020 (RescaleNet), section 3.2, as the reference runs it.
    """

    CALIBRATION_CALLS = 8

    def __init__(self, dim):
        super().__init__()
        self._bias = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("init_mean", torch.zeros(1, 1, dim))
        self.calls = 0  # `count` on the host: to read the buffer would be to wait for the device

    @property
    def calibrating(self):
        return self.calls < self.CALIBRATION_CALLS

    @property
    def per_token(self):
        return not self.calibrating

    def forward(self, x):
        # Reference: the mean moves during evaluation too; here in training only.
        if not self.calibrating:
            return x + (self._bias - self.init_mean).to(x.dtype)
        if self.training:
            self.calls += 1
            self.count += 1
            mean = x.detach().mean(dim=(0, 1), keepdim=True, dtype=torch.float32)
            self.init_mean += (mean - self.init_mean) / self.calls
        return x + (0.01 * self._bias - self.init_mean).to(x.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.calls = int(self.count)


def is_per_token(layer):
    """Whether `layer` maps each token by itself, as far as it says so."""
    return getattr(layer, "per_token", isinstance(layer, nn.Identity))


class NormType(NamedTuple):
    block: type  # a `Block`
    norm: type  # its norm layer, made by `norm(dim)`
    final_norm: type | None = None  # after the last block; None: `norm`
    prepare: Callable | None = None  # called with the whole model, once that is made


NORM_TYPES = {
    "LN": NormType(PreNorm, LayerNorm),
    "BN": NormType(PreNorm, BatchNorm),
    "GN": NormType(PreNorm, GroupNorm),
    "Rescale": NormType(Rescale, AddBias, nn.Identity),
}

# Steps from the start in which a type may measure what it sees. They are not compiled.
MEASURING_STEPS = AddBias.CALIBRATION_CALLS
