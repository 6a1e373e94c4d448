"""Model sizes, one ml_collections.ConfigDict per name, and what a recipe changes in them."""

import ml_collections


def vit_config(patch, hidden_size, num_layers, num_heads, mlp_dim):
    """Config of one size; patch in pixels. Dropout rates are those of the reference."""
    return ml_collections.ConfigDict(
        {
            "patches": {"size": (patch, patch)},
            "hidden_size": hidden_size,
            "transformer": {
                "mlp_dim": mlp_dim,
                "num_heads": num_heads,
                "num_layers": num_layers,
                "attention_dropout_rate": 0.0,
                "dropout_rate": 0.1,
                "drop_path_rate": 0.0,  # of the last block; rises linearly from 0 over the depth
            },
            "classifier": "token",  # or "gap": no class token, the mean of all others
            "representation_size": None,
            "positions": "learned",  # or "sincos"
            "stem": "patch",  # or "conv", "conv_bn": two 3x3 convolutions of stride 2
            "patch_dropout": 0.0,  # share of the patches that are left out of a training image
            "zero_head": False,
            "zero_branches": False,  # the last linear layer of each branch
        }
    )


CONFIGS = {
    # For 32 px: width x depth, heads of 32 channels, MLPs of twice the width.
    **{
        f"ViT-{width}x{depth}_4": vit_config(4, width, depth, width // 32, 2 * width)
        for width, depth in (
            *((64, 4), (64, 12), (64, 24), (96, 4)),
            *((128, 4), (128, 6), (192, 6), (256, 8)),
        )
    },
    # Trained from scratch on small images. Source: Touvron et al. 2021 (DeiT), widths Ti and S.
    "ViT-Ti_4": vit_config(4, 192, 12, 3, 768),
    "ViT-S_4": vit_config(4, 384, 12, 6, 1536),
    "ViT-Ti_16": vit_config(16, 192, 12, 3, 768),
    "ViT-S_16": vit_config(16, 384, 12, 6, 1536),
    # Source: Dosovitskiy et al. 2021 (ViT), table 1.
    "ViT-B_16": vit_config(16, 768, 12, 12, 3072),
    "ViT-B_32": vit_config(32, 768, 12, 12, 3072),
    "ViT-L_16": vit_config(16, 1024, 24, 16, 4096),
    "ViT-L_32": vit_config(32, 1024, 24, 16, 4096),
    "ViT-H_14": vit_config(14, 1280, 32, 16, 5120),
    # Source: Oquab et al. 2023 (DINOv2).
    "ViT-S_14": vit_config(14, 384, 12, 6, 1536),
    "ViT-B_14": vit_config(14, 768, 12, 12, 3072),
    "ViT-L_14": vit_config(14, 1024, 24, 16, 4096),
}


def model_config(flags):
    """The config for the flags of a run: the size, and what the recipe says about the model."""
    config = CONFIGS[flags.model_type].copy_and_resolve_references()
    config.classifier = {"token": "token", "mean": "gap"}[flags.pool]
    config.transformer.dropout_rate = flags.dropout
    config.transformer.drop_path_rate = flags.drop_path
    for entry in ("positions", "stem", "patch_dropout", "zero_head", "zero_branches"):
        config[entry] = getattr(flags, entry)
    return config
