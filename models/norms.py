"""Norm types: what --norm_type chooses.

A type is one line of `NORM_TYPES`: a block, whose `forward` is its paper's equation, and its norm
layer. To add one, write its block, or only a norm layer for `PreNorm`, and that line: the rest of
the program then works with it.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from models.norm_blocks import DeepNorm, Keel, LayerNormScaling, Peri, PostNorm, PreNorm, ResPost
from models.norm_layers import (
    ISRU,
    AddBias,
    BatchNorm,
    Derf,
    DyT,
    GainOnlyLayerNorm,
    GroupNorm,
    LayerNorm,
    Measuring,
    RepBN,
    RMSNorm,
)
from models.scaled_blocks import (
    LayerScale,
    Rescale,
    RescaleNet,
    ReZero,
    SigmaReparam,
    SkipInit,
    TFixup,
)


class NormType(NamedTuple):
    block: type  # a `Block`
    norm: type  # its norm layer, made by `norm(dim)`
    final_norm: type | None = None  # after the last block; None: `norm`
    prepare: Callable | None = None  # called with the whole model, once that is made
    equals_ln: bool = False  # it computes what LN does, given its weights and gains of 1


NORM_TYPES = {
    # Pre-norm, another layer
    "LN": NormType(PreNorm, LayerNorm, equals_ln=True),
    "BN": NormType(PreNorm, BatchNorm),
    "GN": NormType(PreNorm, GroupNorm),
    "RMS": NormType(PreNorm, RMSNorm),
    "DyT": NormType(PreNorm, DyT),
    "Derf": NormType(PreNorm, Derf),
    "ISRU": NormType(PreNorm, ISRU),
    "RepBN": NormType(PreNorm, RepBN),
    # LayerNorm in another place
    "Post": NormType(PostNorm, LayerNorm, nn.Identity),
    "DeepNorm": NormType(DeepNorm, LayerNorm, nn.Identity),
    "ResPost": NormType(ResPost, LayerNorm),
    "Peri": NormType(Peri, LayerNorm),
    "LNS": NormType(LayerNormScaling, LayerNorm),
    "Keel": NormType(Keel, GainOnlyLayerNorm, nn.Identity),
    # Scaled branches
    "LayerScale": NormType(LayerScale, LayerNorm, equals_ln=True),
    "ReZero": NormType(ReZero, nn.Identity),
    "SkipInit": NormType(SkipInit, nn.Identity),
    "Rescale": NormType(Rescale, AddBias, nn.Identity),
    "RescaleNet": NormType(RescaleNet, AddBias, nn.Identity),
    "TFixup": NormType(TFixup, nn.Identity),
    # Reparametrized weights
    "SigmaReparam": NormType(SigmaReparam, nn.Identity, prepare=SigmaReparam.prepare),
}

# What --qk_norm chooses: on the queries and keys of each head. Source: Dehghani et al. 2023
# (ViT-22B), section 2, with LayerNorm.
QK_NORMS = {"none": nn.Identity, "rms": RMSNorm, "ln": LayerNorm}

# The first steps, in which a type may measure its inputs. They are not compiled.
MEASURING_STEPS = Measuring.MEASURING_CALLS
