"""Draws what a trained model attends to, from its checkpoint.

    python3 plot_attn.py output/cifar10_ViT-B_32_norm_LN_fp_True_img_224_pretrain_F_checkpoint.bin

Writes {out_dir}/{norm}_layer_{i}.png, the first head's attention map of block i, and
{out_dir}/{norm}_attention.png, the class token's attention over the image. Without a class token
it is the mean of all tokens' attention, as such a model takes their mean. Of a run that started
from pretrained weights, {norm} is {norm}_pretrained.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from utils.attention_figures import (
    attention_map_figure,
    attention_rollout,
    patches_figure,
    to_patches,
)
from utils.checkpoint import load_model
from utils.data_utils import DATASETS, load_dataset, resize
from utils.errors import UserError, reported
from utils.vis_utils import save_figure

LAYERS = (0, 3, 6, 9)
OUT_DIR = "img/plot_attn"


@torch.no_grad()
def plot_attention(model, image, name, layers=LAYERS, out_dir=OUT_DIR, title="input") -> list[Path]:
    """Draw the attention of those `layers` (blocks) that the model has; returns the files' paths.

    model: built with vis=True; returns (logits, one (B, heads, N, N) tensor a block).
    image: (1, 3, S, S) in [-1, 1]. name: of the files, such as the norm type. title: the image's,
    such as its class.
    Raises UserError if the model has none of the blocks, OSError if a figure cannot be written.
    """
    weights = _attention_weights(model, image)
    layers = [i for i in layers if 0 <= i < len(weights)]
    if not layers:
        raise UserError(f"--layers: the model has blocks 0 to {len(weights) - 1}, none of those")

    out_dir, label, paths = Path(out_dir), name.replace("_", " "), []
    for i in layers:
        figure = attention_map_figure(weights[i][0], f"{label}, block {i}, head 0")
        paths.append(save_figure(figure, out_dir / f"{name}_layer_{i}.png"))
    figure = _patches_figure(model, weights, image, layers, f"{label}: {title}")
    return [*paths, save_figure(figure, out_dir / f"{name}_attention.png")]


@torch.no_grad()
def attention_figure(model, image, title="input") -> Figure:
    """The class token's or mean attention over the image; arguments as above."""
    weights = _attention_weights(model, image)
    layers = [i for i in LAYERS if i < len(weights)]
    return _patches_figure(model, weights, image, layers, title)


def _attention_weights(model, image):
    """One (heads, N, N) array a block."""
    was_training = model.training
    _, weights = model.eval()(image)
    model.train(was_training)
    return [attention[0].float().cpu().numpy() for attention in weights]


def _patches_figure(model, weights, image, layers, title):
    class_token = model.transformer.embeddings.has_class_token
    pixels = (0.5 + 0.5 * image[0].float()).clamp(0, 1).permute(1, 2, 0).cpu().numpy()  # (S, S, 3)
    maps = {f"block {i}": to_patches(weights[i].mean(axis=0), class_token) for i in layers}
    maps["rollout"] = attention_rollout(weights, class_token)
    return patches_figure(pixels, maps, title, class_token)


@reported
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--image", type=int, default=0, metavar="INDEX", help="test image (0)")
    parser.add_argument("--dataset", choices=DATASETS, help="of the image (the one trained on)")
    parser.add_argument("--data_dir", default="data", help="folder of the datasets (%(default)s)")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=LAYERS, help="blocks, from 0 (0 3 6 9)"
    )
    parser.add_argument("--out_dir", default=OUT_DIR, help="folder for figures (%(default)s)")
    args = parser.parse_args()
    model, flags = load_model(args.checkpoint, vis=True)
    dataset = load_dataset(args.dataset or flags.dataset, args.data_dir)
    count = len(dataset.test_images)
    if not 0 <= args.image < count:
        raise UserError(f"--image {args.image}: the test images are 0 to {count - 1}")
    image = resize(dataset.test_images[args.image : args.image + 1], flags.img_size)
    title = dataset.classes[int(dataset.test_labels[args.image])]
    name = flags.norm_type + "_pretrained" * bool(getattr(flags, "pretrained_dir", None))
    for path in plot_attention(model, image, name, args.layers, args.out_dir, title):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
