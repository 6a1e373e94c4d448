"""Encoder blocks that scale branches or weights: each `forward` is its paper's equation.

Shapes: B batch, N tokens (the class token first), D channels; L blocks.
"""

import math

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from models.norm_blocks import ALL, Block, PreNorm, xavier
from models.norm_layers import AddBias, SpectralScale, UnitVariance


class LayerScale(PreNorm):
    """x <- x + g * F(Norm(x)), a learned gain for each channel, for both branches F.

    The gains start at 0.1 up to 18 blocks, 1e-5 up to 24, else 1e-6.
    Source: Touvron et al. 2021 (CaiT), equation 4 and section 3; facebookresearch/deit,
    cait_models.py.
    """

    own_start = True

    def add_norms(self, norm, dim):
        super().add_norms(norm, dim)
        start = 0.1 if self.depth <= 18 else 1e-5 if self.depth <= 24 else 1e-6
        self.attention_gain = nn.Parameter(torch.full((dim,), start))
        self.ffn_gain = nn.Parameter(torch.full((dim,), start))

    def forward(self, x, tokens=ALL):
        x = x[:, tokens] + self.attention_gain * self.attn(self.attention_norm(x), tokens)
        x = x + self.ffn_gain * self.ffn(self.ffn_norm(x))
        return x


class ReZero(Block):
    """x <- x + a Attn(x);  x <- x + a MLP(x), one learned scalar a per block, initially 0.

    Source: Bachlechner et al. 2020, equation 4; majumderb/rezero, rezero/transformer/rztx.py.
    """

    after_attention = ()
    own_start = True

    def add_norms(self, norm, dim):
        self.resweight = nn.Parameter(torch.zeros(1))

    def forward(self, x, tokens=ALL):
        x = x[:, tokens] + self.resweight * self.attn(x, tokens)
        x = x + self.resweight * self.ffn(x)
        return x


class SkipInit(Block):
    """x <- x + a Attn(x);  x <- x + b MLP(x), a learned scalar per branch, initially 0.

    Source: De & Smith 2020 (arXiv 2002.10444), section 3.
    """

    after_attention = ()
    own_start = True

    def add_norms(self, norm, dim):
        self.attention_scale = nn.Parameter(torch.zeros(1))
        self.ffn_scale = nn.Parameter(torch.zeros(1))

    def forward(self, x, tokens=ALL):
        x = x[:, tokens] + self.attention_scale * self.attn(x, tokens)
        x = x + self.ffn_scale * self.ffn(x)
        return x


class Rescale(Block):
    """No normalization: biases instead of norms, and an identity that shrinks with depth.

    x <- x + Attn(x + b);  x <- sqrt(k/(k+1)) x + s/sqrt(L) MLP(x + b'),  block k = 1..L of L.
    Source: the reference's own variant of RescaleNet (Shao et al. 2020, eq. 7).
    """

    after_attention = ("ffn_addbias",)

    def add_norms(self, norm, dim):
        self._scale = nn.Parameter(torch.ones(1))
        self.addbias = norm(dim)
        self.ffn_addbias = norm(dim)
        k = self.index + 1
        self.identity = math.sqrt(k / (k + 1))
        self.branch = self.depth**-0.5

    def forward(self, x, tokens=ALL):
        # Reference: neither the attention branch nor its identity is scaled.
        x = x[:, tokens] + self.attn(self.addbias(x), tokens)
        x = self.identity * x + (self.branch * self._scale) * self.ffn(self.ffn_addbias(x))
        return x


class RescaleNet(Block):
    """x <- sqrt(1 - b^2) x + b s F(x), b^2 = 1/(k + 2L), branch k = 1..2L, both F alike.

    F has unit variance initially, so x keeps its own. For that the paper scales F's weights; here F
    is divided by its RMS in the first 8 batches, as attention's effect on the variance depends on
    how alike tokens are. AddBias comes before each linear layer of a branch, which has no bias.
    Source: Shao et al. 2020, equations 6 and 7; hukkai/rescaling, models/rescale.py.
    """

    after_attention = ("attention_unit", "ffn_addbias", "ffn_unit")
    own_start = True

    def add_norms(self, norm, dim):
        self.addbias = norm(dim)
        self.ffn_addbias = norm(dim)
        self.attention_unit = UnitVariance()
        self.ffn_unit = UnitVariance()
        squares = [1 / (k + 2 * self.depth) for k in (2 * self.index + 1, 2 * self.index + 2)]
        self.branch = [math.sqrt(square) for square in squares]
        self.identity = [math.sqrt(1 - square) for square in squares]

    def initialize(self):
        attn, ffn = self.attn, self.ffn
        for linear in (attn.query, attn.key, attn.value, attn.out, ffn.fc1, ffn.fc2):
            linear.bias = None
        attn.inner_norm = AddBias(attn.out.in_features)
        ffn.inner_norm = AddBias(ffn.fc2.in_features)

    def forward(self, x, tokens=ALL):
        (a1, a2), (b1, b2) = self.identity, self.branch
        x = a1 * x[:, tokens] + b1 * self.attention_unit(self.attn(self.addbias(x), tokens))
        x = a2 * x + b2 * self.ffn_unit(self.ffn(self.ffn_addbias(x)))
        return x


class Plain(Block):
    """x <- x + Attn(x);  x <- x + MLP(x)."""

    after_attention = ()

    def add_norms(self, norm, dim):
        pass

    def forward(self, x, tokens=ALL):
        x = x[:, tokens] + self.attn(x, tokens)
        x = x + self.ffn(x)
        return x


class TFixup(Plain):
    """No norm; Xavier initialization, times 0.67 L^(-1/4) except for query and key.

    Source: Huang et al. 2020, section 3.2; layer6ai-labs/T-Fixup,
    fairseq/modules/transformer_layer.py.
    """

    own_start = True

    def initialize(self):
        xavier(self, gain=0.67 * self.depth**-0.25)


class SigmaReparam(Plain):
    """No norm, but weights (g / sigma(W)) W, in the whole model. Source: `SpectralScale`."""

    own_start = True

    @staticmethod
    def prepare(model):
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            register_parametrization(layer, "weight", SpectralScale(layer.weight))
