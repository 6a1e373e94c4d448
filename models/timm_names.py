"""Our names of a ViT's arrays and modules, and timm's."""

MODULES = {  # outside the blocks
    "transformer.embeddings.cls_token": "cls_token",
    "transformer.embeddings.position_embeddings": "pos_embed",
    "transformer.embeddings.patch_embeddings": "patch_embed.proj",
    "transformer.encoder.encoder_norm": "norm",
    "head": "head",
}
BLOCK = {  # within a block; timm has query, key and value in one, attn.qkv
    "attention_norm": "norm1",
    "attn.out": "attn.proj",
    "ffn_norm": "norm2",
    "ffn.fc1": "mlp.fc1",
    "ffn.fc2": "mlp.fc2",
}
