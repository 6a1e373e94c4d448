"""timm's and DINOv2's ViT weights in our names: query, key and value apart, LayerScale folded.

Source of the names: timm, models/vision_transformer.py; facebookresearch/dinov2 has the same.
"""

import re

import numpy as np

from models.folding import fold_gain
from models.timm_names import BLOCK, MODULES

UNUSED = ("mask_token",)  # of DINOv2's training


def is_timm(arrays):
    return "patch_embed.proj.weight" in arrays


def from_timm(arrays, gains=()):
    """Arrays under timm's names as ours.

    LayerScale's gains go where `gains` says that the model has them, else into the weights before
    them: diag(g) (W x + b). Raises ValueError for what a model of ours has no place for.
    """
    ours, scales = {}, {}
    theirs = {name: key for key, name in MODULES.items()}
    in_block = {name: key for key, name in BLOCK.items()}
    for name, array in arrays.items():
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        prefix = f"transformer.encoder.layer.{block[1]}." if block else ""
        part = block[2] if block else None
        if name in UNUSED:
            continue
        if part == "attn.qkv" and len(array) % 3 == 0:
            for key, third in zip(("query", "key", "value"), np.split(array, 3)):
                ours[f"{prefix}attn.{key}.{kind}"] = third
        elif part in ("ls1", "ls2") and kind == "gamma":
            branch = "attention" if part == "ls1" else "ffn"
            scales[prefix, branch] = array
        elif part in in_block and kind in ("weight", "bias"):
            ours[f"{prefix}{in_block[part]}.{kind}"] = array
        elif name in theirs:
            ours[theirs[name]] = array
        elif module in theirs and kind in ("weight", "bias"):
            ours[f"{theirs[module]}.{kind}"] = array
        else:
            raise ValueError(f"has {name}, for which a model of ours has no place")
    for (prefix, branch), scale in scales.items():
        if f"{prefix}{branch}_gain" in gains:
            ours[f"{prefix}{branch}_gain"] = scale
            continue
        fold_gain(ours, prefix + {"attention": "attn.out", "ffn": "ffn.fc2"}[branch], scale)
    return ours
