"""Model sizes, one ml_collections.ConfigDict per name."""

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
            },
            "classifier": "token",
            "representation_size": None,
        }
    )


CONFIGS = {
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
}
