"""Model sizes: exact parameter counts, on the meta device, where a model takes no memory."""

import pytest
import torch
from small import NORMS

from models.configs import CONFIGS
from models.modeling import VisionTransformer

# (patch, hidden size, blocks, heads, MLP size): this project's own for 32 px, and from the papers'
# tables.
SIZES = {
    "ViT-64x4_4": (4, 64, 4, 2, 128),
    "ViT-64x12_4": (4, 64, 12, 2, 128),
    "ViT-64x24_4": (4, 64, 24, 2, 128),
    "ViT-96x4_4": (4, 96, 4, 3, 192),
    "ViT-128x4_4": (4, 128, 4, 4, 256),
    "ViT-128x6_4": (4, 128, 6, 4, 256),
    "ViT-192x6_4": (4, 192, 6, 6, 384),
    "ViT-256x8_4": (4, 256, 8, 8, 512),
    "ViT-Ti_4": (4, 192, 12, 3, 768),
    "ViT-S_4": (4, 384, 12, 6, 1536),
    "ViT-Ti_16": (16, 192, 12, 3, 768),
    "ViT-S_16": (16, 384, 12, 6, 1536),
    "ViT-B_16": (16, 768, 12, 12, 3072),
    "ViT-B_32": (32, 768, 12, 12, 3072),
    "ViT-L_16": (16, 1024, 24, 16, 4096),
    "ViT-L_32": (32, 1024, 24, 16, 4096),
    "ViT-H_14": (14, 1280, 32, 16, 5120),
    "ViT-S_14": (14, 384, 12, 6, 1536),
    "ViT-B_14": (14, 768, 12, 12, 3072),
    "ViT-L_14": (14, 1024, 24, 16, 4096),
}


def built(name, norm_type, num_classes, img_size=224):
    with torch.device("meta"):
        model = VisionTransformer(CONFIGS[name], img_size, norm_type, num_classes)
    return sum(p.numel() for p in model.parameters())


def counted(name, norm_type, num_classes, img_size=224):
    """The parameters of the architecture as written down in the papers, part by part."""
    P, D, L, _, M = SIZES[name]
    tokens = (img_size // P) ** 2 + 1
    embeddings = (3 * P * P + 1) * D + tokens * D + D  # patches, positions, class token
    attention = 4 * (D * D + D)  # query, key, value, out
    mlp = (D * M + M) + (M * D + D)
    if norm_type == "Rescale":
        norms, final = 2 * D + 1, 0  # two biases and a scalar
    else:
        norms, final = 2 * 2 * D, 2 * D  # two norms and the last one, weight and bias each
    head = D * num_classes + num_classes
    return embeddings + L * (attention + mlp + norms) + final + head


def test_every_config_is_counted_here():
    """A size added to CONFIGS must be added to this file's table, which is written by hand."""
    assert set(CONFIGS) == set(SIZES)


@pytest.mark.parametrize(
    ("name", "norm_type", "num_classes", "count"),
    [
        *(("ViT-B_16", norm_type, 10, 85_806_346) for norm_type in ("LN", "BN", "GN")),
        ("ViT-B_16", "Rescale", 10, 85_786_390),
        ("ViT-B_16", "LN", 100, 85_875_556),
        *(("ViT-B_32", norm_type, 10, 87_462_922) for norm_type in ("LN", "BN", "GN")),
        ("ViT-B_32", "Rescale", 10, 87_442_966),
        ("ViT-B_32", "LN", 100, 87_532_132),
        *(("ViT-L_16", norm_type, 10, 303_311_882) for norm_type in ("LN", "BN", "GN")),
        ("ViT-L_16", "Rescale", 10, 303_260_706),
        *(("ViT-L_32", norm_type, 10, 305_520_650) for norm_type in ("LN", "BN", "GN")),
        ("ViT-L_32", "Rescale", 10, 305_469_474),
    ],
)
def test_counts_of_the_reference(name, norm_type, num_classes, count):
    """Truth: the numbers that the reference implementation prints at 224x224."""
    assert built(name, norm_type, num_classes) == count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ViT-Ti_16", 5_717_416),
        ("ViT-S_16", 22_050_664),
        ("ViT-B_16", 86_567_656),
        ("ViT-B_32", 88_224_232),
        ("ViT-L_16", 304_326_632),
        ("ViT-L_32", 306_535_400),
        ("ViT-H_14", 632_045_800),
    ],
)
def test_counts_published_for_imagenet(name, count):
    """Truth: torchvision's and timm's published counts of these models with 1000 classes."""
    assert built(name, "LN", 1000) == count


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("name", SIZES)
def test_counts_by_formula(name, norm_type):
    """Truth: the sum over the architecture's parts, at another image size and head than above."""
    img_size = 16 * SIZES[name][0]
    assert built(name, norm_type, 7, img_size) == counted(name, norm_type, 7, img_size)


@pytest.mark.parametrize("name", SIZES)
def test_heads_and_rates(name):
    """Truth: the papers' heads, which no count shows, and the reference's dropout rates."""
    t = CONFIGS[name].transformer
    assert t.num_heads == SIZES[name][3]
    assert (t.dropout_rate, t.attention_dropout_rate) == (0.1, 0.0)
