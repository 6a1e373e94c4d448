"""The weights of a DINOv2 ViT in an ONNX model, by our names."""

import numpy as np

from models.google_layout import POSITIONS
from models.timm_layout import IMAGENET, fold_gain, fold_normalization

# Names in the ONNX model, those of Hugging Face's Dinov2 -> ours: outside the blocks, in a block.
MODULES = {
    "embeddings.patch_embeddings.projection": "transformer.embeddings.patch_embeddings",
    "layernorm": "transformer.encoder.encoder_norm",
}
BLOCK = {
    "norm1": "attention_norm",
    "attention.attention.query": "attn.query",
    "attention.attention.key": "attn.key",
    "attention.attention.value": "attn.value",
    "attention.output.dense": "attn.out",
    "norm2": "ffn_norm",
    "mlp.fc1": "ffn.fc1",
    "mlp.fc2": "ffn.fc2",
}
GAINS = {"layer_scale1.lambda1": "attn.out", "layer_scale2.lambda1": "ffn.fc2"}


def dinov2_weights(onnx_model, config):
    """Arrays by name for our LN model to give the same tokens, before the head, as `onnx_model`.

    LayerScale's gains and the normalization of the input are folded into the weights.
    """
    theirs, position_0, positions = _read(onnx_model.graph)
    modules = dict(MODULES)
    for number in range(config.transformer.num_layers):
        theirs_prefix, prefix = f"encoder.layer.{number}.", f"transformer.encoder.layer.{number}."
        modules |= {theirs_prefix + name: prefix + key for name, key in BLOCK.items()}
    ours = {
        f"{key}.{kind}": theirs[f"{name}.{kind}"]
        for name, key in modules.items()
        for kind in ("weight", "bias")
    }
    for number in range(config.transformer.num_layers):
        for name, key in GAINS.items():
            gain = theirs[f"encoder.layer.{number}.{name}"]
            fold_gain(ours, f"transformer.encoder.layer.{number}.{key}", gain)
    ours["transformer.embeddings.cls_token"] = theirs["embeddings.cls_token"]
    ours[POSITIONS] = np.concatenate([position_0, positions], axis=1)  # (1, 1 + 37 * 37, D)
    fold_normalization(ours, *IMAGENET)
    return ours


def _read(graph):
    """The ViT's arrays by name, linear weights as (out, in), and both parts of its positions.

    The export to ONNX dropped the names of linear weights: they are the operands of products to
    which a named bias is added. The nameless positions are the only others of shape (1, N, D).
    """
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    bias_of = {}  # the output of a node: the bias that is added to it
    for node in graph.node:
        if node.op_type == "Add":
            bias_of |= {x: name for x, name in (node.input, node.input[::-1]) if name in named}
    for node in graph.node:
        if node.op_type == "MatMul" and node.output[0] in bias_of:
            weight = bias_of[node.output[0]].removesuffix("bias") + "weight"
            named[weight] = arrays[node.input[1]].T
    position_0, positions = sorted(
        (a for name, a in arrays.items() if name not in named and a.ndim == 3), key=np.size
    )
    return {n.removeprefix("backbone."): a for n, a in named.items()}, position_0, positions
