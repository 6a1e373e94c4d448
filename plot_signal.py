"""Draws how the signal travels through the blocks of models at their start and after training.

    python3 plot_signal.py --norm_type LN Rescale --model_type ViT-Ti_4 --img_size 32
    python3 plot_signal.py output/*_final.bin
    python3 plot_signal.py output/*_final.bin --norm_type LN Rescale

Writes {out_dir}/signal.png: the RMS of each block's output, its gradients' norm, the entropy of its
attention and the effective rank of its output, as utils/signal_stats.py defines them, on the first
128 test images (for a run with --val_split, held-out ones). Without arguments: all norm types at
their start. Models at their start are those of the first checkpoint's flags, where there is one,
with the seed its run began with.

A norm type with statistics, such as BatchNorm, first averages them over 8 training batches of 128
images, uncropped. The others are taken as constructed.
"""

import argparse
import functools
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from models.modeling import build_model
from models.norms import MEASURING_STEPS, NORM_TYPES
from utils.args import parse_args
from utils.checkpoint import check_flags, load_model
from utils.data_utils import hold_out, load_dataset, resize
from utils.errors import reported
from utils.signal_stats import IMAGES, signal_stats
from utils.vis_utils import distinct, save_figure, signal_figure

OUT_DIR = "img/plot_signal"
AT_START = {"model_type": "ViT-Ti_4", "img_size": 32, "dataset": "cifar10"}  # by default


def model_at_start(flags, dataset):
    """The model of `flags` at the start of training, with statistics of its first batches.

    Seeds the random state.
    """
    torch.manual_seed(flags.seed)
    model = build_model(flags, len(dataset.classes))
    batch_norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in batch_norms:
        norm.momentum = None  # the mean over all batches
    if batch_norms or any(getattr(module, "measuring", False) for module in model.modules()):
        with torch.no_grad():
            for images in dataset.train_images.split(IMAGES)[:MEASURING_STEPS]:
                model.train()(resize(images, flags.img_size))
    return model


@reported
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    text = "models at their start (all norm types, if no checkpoint is given)"
    parser.add_argument("--norm_type", nargs="+", metavar="NORM", help=text)
    text = "of models at their start (as the first checkpoint, else ViT-Ti_4)"
    parser.add_argument("--model_type", metavar="MODEL", help=text)
    text = "of their input, pixels (as the first checkpoint, else 32)"
    parser.add_argument("--img_size", type=int, metavar="SIDE", help=text)
    text = "of their images (as the first checkpoint, else cifar10)"
    parser.add_argument("--dataset", metavar="NAME", help=text)
    parser.add_argument("--data_dir", default="data", help="folder of the datasets (%(default)s)")
    parser.add_argument("--out_dir", default=OUT_DIR, help="folder for the figure (%(default)s)")
    args = parser.parse_args()

    runs = [(path, *load_model(path)) for path in args.checkpoints]
    given = {name: getattr(args, name) for name in AT_START if getattr(args, name) is not None}
    base = vars(runs[0][2]) if runs else vars(parse_args(["--name", "none"])) | AT_START
    norm_types = args.norm_type or ([] if runs else NORM_TYPES)
    starts = [Namespace(**base | given | {"norm_type": norm_type}) for norm_type in norm_types]
    for flags in starts:
        check_flags(flags, "--")

    @functools.cache
    def dataset_of(name, val_split):
        return hold_out(load_dataset(name, args.data_dir), val_split)

    def line(label, model, flags, solid):
        dataset = dataset_of(flags.dataset, flags.val_split)
        images = resize(dataset.test_images[:IMAGES], flags.img_size)
        stats = signal_stats(model, images, dataset.test_labels[:IMAGES])
        return label, flags.norm_type, solid, stats

    lines = []
    for flags in starts:
        model = model_at_start(flags, dataset_of(flags.dataset, flags.val_split))
        label = f"{flags.model_type} {flags.norm_type}, at the start"
        lines.append(line(label, model, flags, solid=False))
    labels = [f"{flags.model_type} {flags.norm_type}, trained" for _, _, flags in runs]
    for (_, model, flags), label in zip(runs, distinct(labels, args.checkpoints)):
        lines.append(line(label, model, flags, solid=True))
    print(save_figure(signal_figure(lines), Path(args.out_dir) / "signal.png"))


if __name__ == "__main__":
    sys.exit(main())
