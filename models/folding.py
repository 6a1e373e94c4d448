"""Folds norms and scales into the linear layers, exactly, for evaluation.

What is left is a plain Vision Transformer of blocks x + F(Norm(x)), like timm's, whose norms are
all LayerNorm, all RMSNorm, or none.
"""

import torch
from torch import nn

from models.norm_blocks import LayerNormScaling, PreNorm
from models.norm_layers import AddBias, BatchNorm, LayerNorm, RMSNorm
from models.scaled_blocks import (
    LayerScale,
    Rescale,
    RescaleNet,
    ReZero,
    SigmaReparam,
    SkipInit,
    TFixup,
)
from utils.errors import UserError

AFFINE = (nn.Identity, BatchNorm, AddBias)  # scale * x + shift, in evaluation
KEPT = (LayerNorm, RMSNorm)
NONE = nn.Identity()
# a, g, s of a block x <- a x + g F(s Norm(x)): the attention's, then the MLP's
FOLDS = {
    PreNorm: lambda b: ((1, 1, 1),) * 2,
    LayerNormScaling: lambda b: ((1, 1, (b.index + 1) ** -0.5),) * 2,
    LayerScale: lambda b: ((1, b.attention_gain, 1), (1, b.ffn_gain, 1)),
    ReZero: lambda b: ((1, b.resweight, 1),) * 2,
    SkipInit: lambda b: ((1, b.attention_scale, 1), (1, b.ffn_scale, 1)),
    Rescale: lambda b: ((1, 1, 1), (b.identity, b.branch * b._scale, 1)),
    RescaleNet: lambda b: (
        (b.identity[0], b.branch[0] * affine(b.attention_unit, 1)[0], 1),
        (b.identity[1], b.branch[1] * affine(b.ffn_unit, 1)[0], 1),
    ),
    TFixup: lambda b: ((1, 1, 1),) * 2,
    SigmaReparam: lambda b: ((1, 1, 1),) * 2,
}


def affine(layer, dim):
    """The scale and shift (dim,) of a `layer` in fp64; 1 and 0 where it is kept."""
    zeros = torch.zeros(1, 1, dim, dtype=torch.float64)
    if isinstance(layer, KEPT):
        layer = nn.Identity()
    shift = layer(zeros)
    return (layer(zeros + 1) - shift).flatten(), shift.flatten()


def absorb(linear, scale, shift, gain=1.0):
    """Make `linear`, in fp64, compute what gain * linear(scale * x + shift) did.

    scale, shift (in,); gain a number or (out,).
    """
    gain = torch.as_tensor(gain, dtype=torch.float64).reshape(-1, 1)  # (1 or out, 1)
    bias = linear.weight @ shift + (0 if linear.bias is None else linear.bias)
    linear.weight = nn.Parameter(gain * linear.weight * scale)
    linear.bias = nn.Parameter(gain[:, 0] * bias)


def block_norms(block):
    """The layers before the attention and before the MLP."""
    names = (("attention_norm", "addbias"), ("ffn_norm", "ffn_addbias"))
    return [next((getattr(block, n) for n in pair if hasattr(block, n)), NONE) for pair in names]


@torch.no_grad()
def fold(model, flags):
    """Make the blocks x + F(Norm(x)), in place and in fp64; returns the type of Norm they have.

    `flags` are those of the run. All else goes into the linear layers. Dividing the stream by c,
    the product of all a so far, removes the a: with z = x / c, x' = a x + g F(s Norm(x)) becomes
    z' = z + g / (c a) F(s Norm(c z)).
    Raises UserError if timm has no such model.
    """
    encoder = model.transformer.encoder
    dim, blocks = model.head.in_features, encoder.layer
    norms = [encoder.encoder_norm, *(norm for block in blocks for norm in block_norms(block))]
    kinds = {nn.Identity if isinstance(norm, AFFINE) else type(norm) for norm in norms}
    reason = None
    if type(blocks[0]) not in FOLDS or len(kinds) > 1 or not kinds <= {*KEPT, nn.Identity}:
        reason = f"norm_type {flags.norm_type}"
    elif type(blocks[0].attn.query_norm) not in (nn.Identity, *kinds):
        reason = f"norm_type {flags.norm_type} and qk_norm {flags.qk_norm}"
    elif not isinstance(model.transformer.embeddings.patch_embeddings, nn.Conv2d):
        reason = f"stem {flags.stem}"
    if reason:
        raise UserError(f"timm has no model with {reason}; --output NAME.onnx exports it")

    model.double()
    c = 1.0
    for block in blocks:
        attn, ffn = block.attn, block.ffn
        branches = (
            ((attn.query, attn.key, attn.value), attn.inner_norm, attn.out),
            ((ffn.fc1,), ffn.inner_norm, ffn.fc2),
        )
        factors = FOLDS[type(block)](block)
        for norm, (first, inner, last), (a, g, s) in zip(block_norms(block), branches, factors):
            assert c == 1 or isinstance(norm, AFFINE)  # eps makes LayerNorm depend on c
            scale, shift = affine(norm, dim)
            for linear in first:
                absorb(linear, s * c * scale, s * shift)
            c *= a
            absorb(last, *affine(inner, last.in_features), g / c)
    scale, shift = affine(encoder.encoder_norm, dim)
    absorb(model.head, c * scale, shift)
    return kinds.pop()
