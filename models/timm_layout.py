"""timm's names for the modules of a plain ViT, and weights under these names as ours.

Source of the names: huggingface/pytorch-image-models (timm 1.0), timm/models/vision_transformer.py;
facebookresearch/dinov2 has the same.
"""

import re

import numpy as np

# Ours -> timm's, without `.weight` and `.bias`; `*` is the number of the block, from 0. timm has
# query, key and value in one layer, whose rows are those of the three, in this order.
TIMM_NAMES = {
    "transformer.embeddings.cls_token": "cls_token",
    "transformer.embeddings.position_embeddings": "pos_embed",
    "transformer.embeddings.patch_embeddings": "patch_embed.proj",
    "transformer.encoder.layer.*.attention_norm": "blocks.*.norm1",
    "transformer.encoder.layer.*.attn.query": "blocks.*.attn.qkv",
    "transformer.encoder.layer.*.attn.key": "blocks.*.attn.qkv",
    "transformer.encoder.layer.*.attn.value": "blocks.*.attn.qkv",
    "transformer.encoder.layer.*.attn.query_norm": "blocks.*.attn.q_norm",
    "transformer.encoder.layer.*.attn.key_norm": "blocks.*.attn.k_norm",
    "transformer.encoder.layer.*.attn.out": "blocks.*.attn.proj",
    "transformer.encoder.layer.*.ffn_norm": "blocks.*.norm2",
    "transformer.encoder.layer.*.ffn.fc1": "blocks.*.mlp.fc1",
    "transformer.encoder.layer.*.ffn.fc2": "blocks.*.mlp.fc2",
    "transformer.encoder.encoder_norm": "norm",
    "head": "head",
}

UNUSED = ("mask_token",)  # of DINOv2's training
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of its pixels
PATCHES = "transformer.embeddings.patch_embeddings"
OURS = {theirs: ours for ours, theirs in TIMM_NAMES.items()}
BRANCHES = {  # of timm's gains: our gain's name, the linear map before it
    "ls1": ("attention_gain", "attn.out"),
    "ls2": ("ffn_gain", "ffn.fc2"),
}


def is_timm(arrays):
    return "patch_embed.proj.weight" in arrays


def from_timm(arrays, wanted):
    """Arrays under timm's names as ours. `wanted`: the names in our model.

    LayerScale's gains go into the model's if it has any, else into the weights before: diag(g)
    (W x + b). Raises ValueError for what the model has no place for, KeyError for what is missing.
    """
    ours, gains = {}, {}
    for name, array in arrays.items():
        module, _, kind = name.rpartition(".")
        block = re.match(r"blocks\.(\d+)\.", name)
        number = block[1] if block else ""
        module = re.sub(r"^blocks\.\d+\.", "blocks.*.", module)
        part = module.removeprefix("blocks.*.")
        prefix = f"transformer.encoder.layer.{number}."
        if name in UNUSED:
            continue
        if part == "attn.qkv" and len(array) % 3 == 0:
            for key, third in zip(("query", "key", "value"), np.split(array, 3)):
                ours[f"{prefix}attn.{key}.{kind}"] = third
        elif part in BRANCHES and kind == "gamma":
            gains[prefix, part] = array
        else:
            key = OURS.get(name) or f"{OURS.get(module)}.{kind}".replace("*", number)
            if key not in wanted and ("None" in key or "query_norm" in key or "key_norm" in key):
                raise ValueError(f"has {name}, for which the model has no place")
            ours[key] = array
    for (prefix, part), gain in gains.items():
        own_gain, linear = BRANCHES[part]
        if prefix + own_gain in wanted:
            ours[prefix + own_gain] = gain
        else:
            fold_gain(ours, prefix + linear, gain)
    return ours


def fold_gain(weights, module, gain):
    """g (W x + b) as a linear map, in place: diag(g) W and g b. `gain`: one factor per channel."""
    weights[f"{module}.weight"] = gain[:, None] * weights[f"{module}.weight"]
    weights[f"{module}.bias"] = gain * weights[f"{module}.bias"]


def fold_normalization(weights, mean, std):
    """Have the patch embedding take our (x - 0.5) / 0.5 instead of (x - mean) / std."""
    mean, std = (np.asarray(values)[:, None, None] for values in (mean, std))
    weight = weights[f"{PATCHES}.weight"]  # (D, 3, patch, patch)
    bias = weights[f"{PATCHES}.bias"] + (weight * ((0.5 - mean) / std)).sum((1, 2, 3))
    weights[f"{PATCHES}.weight"] = (weight * (0.5 / std)).astype(weight.dtype)
    weights[f"{PATCHES}.bias"] = bias.astype(weight.dtype)
