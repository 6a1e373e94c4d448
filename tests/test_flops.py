"""The compute that a log states, against sums of matrix sizes written out by hand.

A product of (m, k) by (k, n) is 2mkn operations, and its backward pass has two of them: 6 for each
weight and token, and 12 N^2 D for the two products of attention over N tokens of D channels.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from models.norms import NORM_TYPES
from utils.args import parse_args
from utils.flops import training_pflop

CLASSES = 10
SIZES = {  # patch, hidden size, blocks, MLP size
    "ViT-64x4_4": (4, 64, 4, 128),
    "ViT-64x12_4": (4, 64, 12, 128),
    "ViT-Ti_16": (16, 192, 12, 768),
    "ViT-B_16": (16, 768, 12, 3072),
}
# Those whose last block cannot compute the class token alone: their statistics are over all tokens
ALL_TOKENS = {"BN", "GN", "RepBN"}


def per_image(*flags, model_type="ViT-64x4_4", img_size=32, steps=4, images=16, norm_type="LN"):
    """Operations of one image's training step, of what is stated for the whole training."""
    command = f"--name x --recipe small --model_type {model_type} --img_size {img_size}"
    command += f" --norm_type {norm_type} --num_steps {steps} --train_batch_size {images}"
    crop = ["crop=resized"] if img_size != 32 else []
    args = parse_args([*command.split(), "--set", "zero_head=False", *crop, *flags])
    return training_pflop(args, CLASSES) * 1e15 / (steps * images)


def head_and_patches(patches, patch, dim):
    """Nothing needs the gradient of the images: two products for the patches, not three."""
    return 4 * patches * 3 * patch**2 * dim + 6 * dim * CLASSES


@pytest.mark.parametrize(
    ("model_type", "side"),
    [("ViT-64x4_4", 32), ("ViT-64x12_4", 32), ("ViT-Ti_16", 224), ("ViT-B_16", 224)],
)
def test_all_tokens(model_type, side):
    """Truth: 6 N (4 D^2 + 2 D M) + 12 N^2 D a block, exactly."""
    patch, dim, depth, mlp = SIZES[model_type]
    tokens = (side // patch) ** 2
    block = 6 * tokens * (4 * dim**2 + 2 * dim * mlp) + 12 * tokens**2 * dim
    expected = depth * block + head_and_patches(tokens, patch, dim)
    assert per_image(model_type=model_type, img_size=side) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_every_norm_type(norm_type):
    """Truth: as above; with a class token the last block has one query, output and MLP token.

    Norms count nothing. SigmaReparam's power iterations are a step's, whatever its images.
    """
    patch, dim, depth, mlp = SIZES["ViT-64x4_4"]
    matrices = 4 * dim**2 + 2 * dim * mlp
    ends = head_and_patches(64, patch, dim)
    mean = depth * (6 * 64 * matrices + 12 * 64**2 * dim) + ends
    token = depth * (6 * 65 * matrices + 12 * 65**2 * dim) + ends
    if norm_type not in ALL_TOKENS:
        token -= 6 * 64 * (matrices - 2 * dim**2) + 12 * 64 * 65 * dim
    for pool, expected in (("mean", mean), ("token", token)):
        counted = per_image(f"pool={pool}", norm_type=norm_type, images=128)
        if norm_type == "SigmaReparam":
            assert expected < counted < 1.0002 * expected
        else:
            assert counted == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("stem", ["conv", "conv_bn"])
def test_stem_of_two_convolutions(stem):
    """Truth: 3x3 kernels, 3 -> D/2 on 16 x 16 places and D/2 -> D on 8 x 8, of which the first
    needs no gradient of its input."""
    convolutions = 4 * 256 * 27 * 32 + 6 * 64 * 9 * 32 * 64
    patches = 4 * 64 * 48 * 64
    expected = per_image() - patches + convolutions
    assert per_image(f"stem={stem}") == pytest.approx(expected, rel=1e-12)


def test_patch_dropout():
    """Truth: blocks of 16 tokens, whose attention costs a 16th; all 64 patches are embedded."""
    blocks = per_image() - 4 * 64 * 48 * 64 - 6 * 64 * CLASSES
    attention = 4 * 12 * 64 * 64 * 64
    expected = (blocks - attention) / 4 + attention / 16 + 4 * 64 * 48 * 64 + 6 * 64 * CLASSES
    assert per_image("patch_dropout=0.75") == pytest.approx(expected, rel=1e-12)
    until = per_image("patch_dropout=0.75", "patch_dropout_until=0.9", steps=20)
    assert until == pytest.approx(0.9 * expected + 0.1 * per_image(), rel=1e-12)


def test_a_model_written_out():
    """Truth: PyTorch's counter over the products of a ViT-64x4_4, one image, in plain lines."""
    dim, mlp, tokens, heads = 64, 128, 64, 2
    block_shapes = [(dim, dim)] * 4 + [(dim, mlp), (mlp, dim)]
    weights = [[torch.randn(s, requires_grad=True) for s in block_shapes] for _ in range(4)]
    patches, head = (torch.randn(s, requires_grad=True) for s in ((48, dim), (dim, CLASSES)))
    with FlopCounterMode(display=False) as counter:
        x = torch.randn(tokens, 48) @ patches
        for query, key, value, out, first, second in weights:
            q, k, v = (
                (F.layer_norm(x, (dim,)) @ w).view(tokens, heads, -1).transpose(0, 1)
                for w in (query, key, value)
            )
            y = (q @ k.mT).softmax(-1) @ v
            x = x + y.transpose(0, 1).reshape(tokens, dim) @ out
            x = x + F.gelu(F.layer_norm(x, (dim,)) @ first) @ second
        (x.mean(0, keepdim=True) @ head).sum().backward()
    assert per_image() == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_counts_all_steps_images_and_processes(monkeypatch):
    """Truth: the product of the three, also where a step's images are split into batches."""
    alone = per_image(steps=1, images=4)
    for steps, images, parts in ((1, 4, 2), (7, 4, 4), (3, 64, 8)):
        flags = ["--gradient_accumulation_steps", str(parts)]
        assert per_image(*flags, steps=steps, images=images) == pytest.approx(alone, rel=1e-12)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert per_image(steps=1, images=4) == pytest.approx(3 * alone, rel=1e-12)


def test_one_patch_an_image():
    """Truth: the formula for N = 1, where BatchNorm needs a second image."""
    _, dim, depth, mlp = SIZES["ViT-Ti_16"]
    block = 6 * (4 * dim**2 + 2 * dim * mlp) + 12 * dim
    counted = per_image(model_type="ViT-Ti_16", img_size=16, norm_type="BN")
    assert counted == pytest.approx(depth * block + head_and_patches(1, 16, dim), rel=1e-12)


def test_the_reference_recipe():
    """Truth: what its page in recipes.py states, 251 PFLOP."""
    args = parse_args(["--name", "x"])
    assert round(training_pflop(args, CLASSES)) == 251
