"""timm's names for the modules of a plain Vision Transformer, to load or write its weights.

Source: huggingface/pytorch-image-models (timm 1.0), timm/models/vision_transformer.py.
"""

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
