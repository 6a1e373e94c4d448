"""Names and layouts of the arrays in Google's ViT files (.npz), to ours and back.

Source: google-research/vision_transformer, vit_jax/models_vit.py.
"""

import re

import numpy as np

POSITIONS = "transformer.embeddings.position_embeddings"
RESIZE = "Transformer/posembed_input/resize"  # our addition: how to resize the positions
# Our names -> Google's: arrays by themselves, modules outside the blocks, modules of a block.
_ARRAYS = {
    POSITIONS: "Transformer/posembed_input/pos_embedding",
    "transformer.embeddings.cls_token": "cls",
}
_MODULES = {
    "transformer.embeddings.patch_embeddings": "embedding",
    "transformer.encoder.encoder_norm": "Transformer/encoder_norm",
    "head": "head",
}
_BLOCK = {
    "attention_norm": "LayerNorm_0",
    "attn.query": "MultiHeadDotProductAttention_1/query",
    "attn.key": "MultiHeadDotProductAttention_1/key",
    "attn.value": "MultiHeadDotProductAttention_1/value",
    "attn.out": "MultiHeadDotProductAttention_1/out",
    "ffn_norm": "LayerNorm_2",
    "ffn.fc1": "MlpBlock_3/Dense_0",
    "ffn.fc2": "MlpBlock_3/Dense_1",
}


def google_name(key):
    """Google's name of our array `key`; None where Google's ViT has no such array."""
    module, _, kind = key.rpartition(".")
    block = re.fullmatch(r"transformer\.encoder\.layer\.(\d+)\.(.+)", module)
    if block and block[2] in _BLOCK:
        module = f"Transformer/encoderblock_{block[1]}/{_BLOCK[block[2]]}"
    else:
        module = _MODULES.get(module)
    kinds = {"weight": "scale" if "_norm" in key else "kernel", "bias": "bias"}
    return f"{module}/{kinds[kind]}" if module and kind in kinds else _ARRAYS.get(key)


def google_shape(name, shape, heads):
    """Shape in Google's layout of an array that has `shape` in ours."""
    if len(shape) == 4:  # OIHW -> HWIO
        return (*shape[2:], shape[1], shape[0])
    if len(shape) == 2:  # (out, in) -> (in, out)
        shape = shape[::-1]
    if name.endswith("/out/kernel"):
        return (heads, shape[0] // heads, shape[1])
    if "Attention" in name and not name.endswith("/out/bias"):
        return (*shape[:-1], heads, shape[-1] // heads)
    return shape


def from_google(array, shape):
    """`array` from Google's layout to ours, with `shape`."""
    if len(shape) == 4:
        return array.transpose(3, 2, 0, 1)
    return array.reshape(shape[::-1]).T if len(shape) == 2 else array.reshape(shape)


def to_google(weights, heads):
    """The arrays of our LN model, with Google's names and layout."""
    arrays = {}
    for key, array in weights.items():
        name = google_name(key)
        shape = google_shape(name, array.shape, heads)
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif array.ndim == 2:
            array = array.T
        arrays[name] = np.ascontiguousarray(array).reshape(shape)
    return arrays
