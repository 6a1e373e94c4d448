"""Draws test loss and test accuracy over the optimizer steps from result logs.

    python3 plot_acc_loss.py output/cifar10_ViT-B_32_norm_LN_fp_True_img_224_pretrain_F_demo.txt
    python3 plot_acc_loss.py output/cifar10_*.txt
    python3 plot_acc_loss.py output/cifar10_*.txt --reference FOLDER/output/cifar10_*.txt

One log gives {out_dir}/{norm}_loss_acc.png; several give one comparison, {out_dir}/comparison.png.
With --reference, {out_dir}/reference.png has the runs as points on the reference's curves.
"""

import argparse
import sys
from pathlib import Path

from utils.data_utils import CLASSES
from utils.errors import UserError, reported
from utils.log_reader import RunLog, read_log
from utils.vis_utils import (
    comparison_figure,
    distinct,
    loss_accuracy_figure,
    reference_figure,
    save_figure,
    stacked_figure,
)

OUT_DIR = "img/plot_acc_loss"


def plot_log(path, out_dir=OUT_DIR) -> Path:
    """Draw one log's figure and returns its path. Raises UserError, OSError."""
    run = read_log(path)
    if not run.steps:
        raise UserError(f"{path} holds no evaluation")
    classes = len(CLASSES[run.dataset])
    figure = loss_accuracy_figure(run.steps, run.loss, run.accuracy, _label(run), classes)
    name = run.norm_type + "_pretrained" * run.pretrained
    return save_figure(figure, Path(out_dir) / f"{name}_loss_acc.png")


def plot_comparison(paths, out_dir=OUT_DIR) -> Path:
    """Draw one figure of several logs and returns its path. Raises UserError, OSError.

    A log without an evaluation is left out, and named on stderr.
    """
    runs = _with_evaluations(paths)
    labels = distinct([_label(run) for run in runs], [run.path for run in runs])
    return save_figure(comparison_figure(_curves(runs, labels)), Path(out_dir) / "comparison.png")


def plot_reference(paths, reference_paths, out_dir=OUT_DIR) -> Path:
    """Draw our runs on the reference's curves and returns its path. Raises UserError, OSError."""
    ours, references = _with_evaluations(paths), _with_evaluations(reference_paths)
    curves = [_curves(runs, map(_label, runs)) for runs in (ours, references)]
    return save_figure(reference_figure(*curves), Path(out_dir) / "reference.png")


def _with_evaluations(paths) -> list[RunLog]:
    runs = []
    for run in map(read_log, paths):
        if run.steps:
            runs.append(run)
        else:
            print(f"plot_acc_loss.py: left out: {run.path} holds no evaluation", file=sys.stderr)
    if not runs:
        raise UserError("no log holds an evaluation")
    return runs


def _curves(runs, labels):
    return [(label, run.steps, run.loss, run.accuracy) for label, run in zip(labels, runs)]


def _label(run: RunLog) -> str:
    label = f"{run.dataset} {run.model_type} {run.norm_type}"
    return f"{label} pretrained" if run.pretrained else label


@reported
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", metavar="LOG", help="result logs of training runs")
    parser.add_argument("--out_dir", default=OUT_DIR, help="folder for the figure (%(default)s)")
    text = "existing figures; the new one above them is {out_dir}/overview.png"
    parser.add_argument("--above", nargs="+", metavar="FIGURE", default=[], help=text)
    text = "logs of the reference's runs, to draw ours on"
    parser.add_argument("--reference", nargs="+", metavar="LOG", default=[], help=text)
    args = parser.parse_args()
    if args.reference:
        figure = plot_reference(args.logs, args.reference, args.out_dir)
    elif len(args.logs) == 1:
        figure = plot_log(args.logs[0], args.out_dir)
    else:
        figure = plot_comparison(args.logs, args.out_dir)
    print(figure)
    if args.above:
        pictures = [figure, *map(Path, args.above)]
        print(save_figure(stacked_figure(pictures), Path(args.out_dir) / "overview.png"))


if __name__ == "__main__":
    sys.exit(main())
