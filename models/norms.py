"""Norm types: what stands before each branch of a block, and how a branch joins the residual.

The only place that knows norm types. A type is one entry of ``NORM_TYPES``: a rule with five hooks,
called by ``models.modeling.Block`` and ``Encoder``.

    install(block, dim, index, depth)   add the type's modules and parameters to block `index`
    branch_input(block, x, branch)      what the branch ("attn" or "ffn") reads, (B, N, D)
    residual(block, x, y, branch)       the block's new x from the identity x and the branch's y
    per_token(block)                    whether what follows the attention treats tokens one by one
    final_norm(dim)                     module after the last block
"""

import math
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from models import layers

EPS = 1e-6


class BatchNorm(nn.Module):
    """Batch normalization of (B, N, D) over batch and tokens, one statistic per channel.

    Source: Ioffe & Szegedy 2015. The tokens are rows of one (B*N, D) matrix: no transpose copy.
    """

    def __init__(self, dim):
        super().__init__()
        self.layer = nn.BatchNorm1d(dim, eps=EPS, momentum=0.1)

    def forward(self, x):
        return self.layer(x.reshape(-1, x.shape[-1])).view(x.shape)


class GroupNorm(nn.Module):
    """Group normalization of (B, N, D): 4 groups, each over D/4 channels x N tokens.

    Source: Wu & He 2018.
    """

    def __init__(self, dim, groups=4):
        super().__init__()
        self.layer = layers.GroupNorm(groups, dim, eps=EPS)

    def forward(self, x):
        return self.layer(x)


class AddBias(nn.Module):
    """x + bias - init_mean, the mean of the first training batches standing in for a norm's.

    x (B, N, D). In the first 8 training calls `init_mean` becomes the mean over batch and tokens of
    what was seen so far, and the learned bias counts one hundredth.
    Source: Shao et al. 2020 (RescaleNet), section 3.2, as the reference runs it.
    """

    CALIBRATION_CALLS = 8

    def __init__(self, dim):
        super().__init__()
        self._bias = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("init_mean", torch.zeros(1, 1, dim))
        self._set_calls(0)

    def _set_calls(self, calls):
        """`count` on the host: to read the buffer itself would be to wait for the device."""
        self.calls, self.calibrating = calls, calls < self.CALIBRATION_CALLS

    @torch.no_grad()
    def _calibrate(self, x):
        mean = x.mean(dim=(0, 1), keepdim=True, dtype=torch.float32)
        mean = torch.where(mean.isfinite(), mean, self.init_mean)  # an overflow must not stay
        self._set_calls(self.calls + 1)
        self.init_mean += (mean - self.init_mean) / self.calls
        self.count += 1

    # What torch.compiler.disable sets; that itself would add seconds of imports to every start.
    _calibrate._torchdynamo_disable = True

    def forward(self, x):
        # Reference: its buffers move during evaluation too; ours in training only.
        bias = self._bias
        if self.calibrating:
            bias = 0.01 * bias
            if self.training:
                self._calibrate(x)
        return x + (bias - self.init_mean).to(x.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._set_calls(int(self.count))


class PreNorm:
    """x <- x + F(norm(x)), one norm layer per branch and one after the last block."""

    def __init__(self, layer, per_token):
        self.layer, self.per_token = layer, per_token

    def install(self, block, dim, index, depth):
        block.attention_norm = self.layer(dim)
        block.ffn_norm = self.layer(dim)

    def branch_input(self, block, x, branch):
        return block.attention_norm(x) if branch == "attn" else block.ffn_norm(x)

    def residual(self, block, x, y, branch):
        return x + y

    def final_norm(self, dim):
        return self.layer(dim)


class Rescale:
    """No normalization: biases instead of norms, and an identity that shrinks with depth.

    In block i, with k = i + 1 and depth L: x <- x + Attn(addbias(x)), then
    x <- sqrt(k/(k+1)) x + (_scale / sqrt(L)) MLP(ffn_addbias(x)). No final norm.
    Source: the reference's own variant of RescaleNet (Shao et al. 2020, equation 7).
    """

    def install(self, block, dim, index, depth):
        block._scale = nn.Parameter(torch.ones(1))
        block.addbias = AddBias(dim)
        block.ffn_addbias = AddBias(dim)
        block.identity_weight = math.sqrt((index + 1) / (index + 2))
        block.branch_weight = depth**-0.5

    def branch_input(self, block, x, branch):
        return block.addbias(x) if branch == "attn" else block.ffn_addbias(x)

    def residual(self, block, x, y, branch):
        # Reference: the attention branch is not scaled, nor its identity.
        if branch == "attn":
            return x + y
        branch = (block._scale * block.branch_weight) * y
        return torch.add(branch, x, alpha=block.identity_weight)

    def per_token(self, block):
        return not block.ffn_addbias.calibrating

    def final_norm(self, dim):
        return nn.Identity()


NORM_TYPES = {
    "LN": PreNorm(lambda dim: nn.LayerNorm(dim, eps=EPS), per_token=lambda block: True),
    "BN": PreNorm(BatchNorm, per_token=lambda block: not block.training),
    "GN": PreNorm(GroupNorm, per_token=lambda block: False),
    "Rescale": Rescale(),
}


def checkpoint_contexts(block):
    """Contexts for `torch.utils.checkpoint`, to be made before the forward pass of `block`.

    The recomputation works on a copy of the statistics that the forward pass found: BatchNorm and
    AddBias do the same again, and their statistics move once.
    """
    norms = [m for m in block.modules() if m._buffers]
    found = [
        vars(m) | {"_buffers": {name: buffer.clone() for name, buffer in m._buffers.items()}}
        for m in norms
    ]

    @contextmanager
    def recomputation():
        left = [vars(m).copy() for m in norms]
        for m, state in zip(norms, found):
            vars(m).update(state)
        try:
            yield
        finally:
            for m, state in zip(norms, left):
                vars(m).update(state)

    return nullcontext(), recomputation()


def calibrating(model):
    """Whether a part of `model` is still measuring its first training batches."""
    return any(m.calibrating for m in model.modules() if isinstance(m, AddBias))
