"""The weights of a DINOv2 ViT in an ONNX model, by DINOv2's own names."""

import numpy as np

from models.timm_layout import fold_gain

# Parts of names: in the ONNX model, where they are those of Hugging Face's Dinov2 -> DINOv2's own
PARTS = {
    "backbone.": "",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.cls_token": "cls_token",
    "encoder.layer.": "blocks.",
    "attention.output.dense": "attn.proj",
    "layernorm": "norm",
}


def dinov2_arrays(onnx_model):
    """Arrays by name of the ViT in `onnx_model`, without its head, as a file of DINOv2's has them.

    LayerScale's gains are folded into the weights, for models of all norm types.
    ONNX's export drops the names of linear weights: they are the operands of products to which a
    named bias is added. It drops those of the positions too, the only others of shape (1, N, D).
    """
    from onnx import numpy_helper

    graph = onnx_model.graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    positions = (a for name, a in arrays.items() if name not in named and a.ndim == 3)
    bias_of = {}  # the output of a node: the bias that is added to it
    for node in graph.node:
        if node.op_type == "Add":
            bias_of |= {x: name for x, name in (node.input, node.input[::-1]) if name in named}
    for node in graph.node:
        if node.op_type == "MatMul" and node.output[0] in bias_of:
            weight = bias_of[node.output[0]].removesuffix("bias") + "weight"
            named[weight] = arrays[node.input[1]].T  # (out, in)

    ours = {"pos_embed": np.concatenate(sorted(positions, key=np.size), axis=1)}  # (1, 1 + n, D)
    ours["mask_token"] = np.zeros_like(named["backbone.embeddings.cls_token"][0])  # not in the ONNX
    for name, array in named.items():
        for theirs, own in PARTS.items():
            name = name.replace(theirs, own)
        ours[name] = array
    for query in [name for name in ours if ".attention.attention.query." in name]:
        parts = [ours.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        ours[query.replace("attention.attention.query", "attn.qkv")] = np.concatenate(parts)
    for name in [name for name in ours if name.endswith(".lambda1")]:
        block, _, number = name.removesuffix(".lambda1").partition("layer_scale")
        fold_gain(ours, block + {"1": "attn.proj", "2": "mlp.fc2"}[number], ours.pop(name))
    return ours
