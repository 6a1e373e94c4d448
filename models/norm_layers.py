"""Norm layers and their replacements: each maps (B, N, D) to (B, N, D), made by `layer(dim)`.

Shapes: B batch, N tokens, D channels. A layer with `per_token` maps each token by itself.
"""

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6


class LayerNorm(nn.LayerNorm):
    """g (x - mean) / std + b over the channels of each token. Source: Ba et al. 2016."""

    per_token = True

    def __init__(self, dim, bias=True):
        super().__init__(dim, eps=EPS, bias=bias)


class GainOnlyLayerNorm(LayerNorm):
    """LayerNorm without the bias b."""

    def __init__(self, dim):
        super().__init__(dim, bias=False)


class RMSNorm(nn.RMSNorm):
    """g x / sqrt(mean(x^2)) over the channels of each token. Source: Zhang & Sennrich 2019."""

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


class RepBN(BatchNorm):
    """BN(x) + a x, with a learned scalar a that starts at 1.

    Source: Guo et al. 2024 (SLAB), equation 5; xinghaochen/SLAB, classification/models/prepbn.py.
    """

    def __init__(self, dim):
        super().__init__(dim)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) + self.alpha * x


class GroupNorm(nn.Module):
    """4 groups, each over D/4 channels and all N tokens. Source: Wu & He 2018."""

    def __init__(self, dim, groups=4):
        super().__init__()
        self.layer = nn.GroupNorm(groups, dim, eps=EPS)

    def forward(self, x):
        return self.layer(x.mT).mT


class DyT(nn.Module):
    """g tanh(a x) + b: a scalar a that starts at 0.5 in place of the statistics.

    Source: Zhu et al. 2025, equation 1; jiachenzhu/DyT, dynamic_tanh.py.
    """

    per_token = True

    def __init__(self, dim):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return self.weight * torch.tanh(self.alpha * x) + self.bias


class Derf(DyT):
    """g erf(a x + s) + b, with a learned shift s too.

    Source: Chen et al. 2025 (arXiv 2512.10938); zlab-princeton/Derf, ViT/dynamic_erf.py.
    """

    def __init__(self, dim):
        super().__init__(dim)
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.weight * torch.erf(self.alpha * x + self.shift) + self.bias


class ISRU(Derf):
    """g u / sqrt(1 + u^2) + b, u = a x + s: the inverse square root unit.

    Source: as Derf, ViT/other_functions/isru.py.
    """

    def forward(self, x):
        u = self.alpha * x.float() + self.shift  # in fp16 u * u would overflow
        return (self.weight * u * torch.rsqrt(1 + u * u) + self.bias).to(x.dtype)


class Measuring(nn.Module):
    """A layer that averages a statistic over the first 8 training batches, and then keeps it."""

    MEASURING_CALLS = 8

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.calls = 0  # `count` on the host: reading the buffer would wait for the device

    @property
    def measuring(self):
        return self.calls < self.MEASURING_CALLS

    @property
    def per_token(self):
        return not self.measuring

    def add_to(self, average, statistic):
        """Update the buffer `average` with the `statistic` of the next batch."""
        self.calls += 1
        self.count += 1
        average += (statistic - average) / self.calls

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.calls = int(self.count)


class AddBias(Measuring):
    """x + b - m, with the mean m of the first 8 training batches in place of a norm's.

    Until then, m is the mean so far, and the learned bias b is multiplied by 0.01.
    Source: Shao et al. 2020 (RescaleNet), section 3.2; hukkai/rescaling, models/layers.py.
    """

    def __init__(self, dim):
        super().__init__()
        self._bias = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("init_mean", torch.zeros(1, 1, dim))

    def forward(self, x):
        # Reference: the mean moves during evaluation too; here in training only.
        bias = self._bias
        if self.measuring:
            if self.training:
                mean = x.detach().mean(dim=(0, 1), keepdim=True, dtype=torch.float32)
                self.add_to(self.init_mean, mean)
            bias = 0.01 * bias
        return x + (bias - self.init_mean).to(x.dtype)


class UnitVariance(Measuring):
    """s x / r, with the RMS r of the first 8 training batches, and a learned s, initially 1."""

    def __init__(self):
        super().__init__()
        self._scale = nn.Parameter(torch.ones(1))
        self.register_buffer("mean_square", torch.ones(1))

    def forward(self, x):
        if self.measuring and self.training:
            self.add_to(self.mean_square, x.detach().float().square().mean())
        return x * (self._scale * torch.rsqrt(self.mean_square + EPS)).to(x.dtype)


class SpectralScale(nn.Module):
    """The weight W as (g / sigma(W)) W; sigma: the largest singular value, g: a learned scalar.

    A parametrization of weights (out, ...). sigma = v' W u with one power iteration for u and v in
    each training pass, in fp32. g starts at sigma(W), so that the weight is initially the same.
    Source: Zhai et al. 2023, equation 5; apple/ml-sigma-reparam, vision/layers.py.
    """

    def __init__(self, weight):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1))
        self.register_buffer("u", torch.zeros_like(weight[0].flatten()))
        self.keep(weight)

    @torch.no_grad()
    def keep(self, weight):
        """Set g and u so that `weight` stays as it is."""
        _, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        self.gamma.copy_(s[:1])
        self.u.copy_(vh[0])

    @torch.no_grad()
    def start_from(self, weight):
        """As `keep`; but a weight of zeros, which has no direction, is drawn again, with g = 0."""
        if weight.any():
            return self.keep(weight)
        nn.init.trunc_normal_(weight, std=0.02)
        self.keep(weight)
        self.gamma.zero_()

    def forward(self, weight):
        with torch.autocast("cuda" if weight.is_cuda else "cpu", enabled=False):
            matrix = weight.flatten(1).float()
            with torch.no_grad():
                v = F.normalize(matrix @ self.u.float(), dim=0)
                u = F.normalize(v @ matrix, dim=0)
                if self.training:
                    self.u.copy_(u)
            sigma = v @ matrix @ u
            return (self.gamma.float() / sigma).to(weight.dtype) * weight


def is_per_token(layer):
    """Whether `layer` says that it maps each token by itself."""
    return getattr(layer, "per_token", isinstance(layer, nn.Identity))
