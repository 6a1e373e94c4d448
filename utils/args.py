"""The command line of train.py: flags and their validation."""

import argparse
import math
import os
import re

from models.configs import CONFIGS
from models.norms import NORM_TYPES
from utils import dist_util
from utils.data_utils import DATASETS
from utils.precision import HALF_DTYPES, LEVELS
from utils.scheduler import SCHEDULES


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        tells_nothing = action.default is None or action.default is False
        return action.help if tells_nothing else super()._get_help_string(action)


def _number(kind, low, high=math.inf, low_allowed=True):
    """An argparse type: int or float within [low, high], low itself only if allowed."""
    bound = f"{'from' if low_allowed else 'above'} {low:g}"
    bound += "" if high == math.inf else f" to {high:g}"

    def parse(text):
        try:
            value = kind(text)
            ok = low <= value <= high and (low_allowed or value != low) and math.isfinite(value)
        except (ValueError, OverflowError):
            ok = False
        if not ok:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a {noun} {bound}")
        return value

    return parse


def _name(text):
    if not re.fullmatch(r"[A-Za-z0-9_+=@-][A-Za-z0-9._+=@-]{0,59}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: 1 to 60 letters, digits and . _ + = @ - (no leading dot)"
        )
    return text


def _path(text):
    if not text:
        raise argparse.ArgumentTypeError("'' is not allowed: a path")
    return text


def _gpu(text):
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a GPU's number, such as 0")
    return text


MAX_COUNT = 10**7


def build_parser():
    count, any_count = _number(int, 1, MAX_COUNT), _number(int, 0, MAX_COUNT)
    parser = _Parser(
        prog="train.py",
        description="Train a Vision Transformer on CIFAR with the normalization of your choice.",
        epilog="example: python3 train.py --name demo --dataset digits --model_type ViT-Ti_4"
        " --img_size 32 --norm_type Rescale --train_batch_size 64 --num_steps 300",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    yes = {"action": "store_true"}

    add = parser.add_argument_group("experiment").add_argument
    add("--name", required=True, type=_name, help="of the experiment; its files start with it")
    add("--dataset", default="cifar10", choices=DATASETS, help="digits needs no download")
    add("--model_type", default="ViT-B_16", choices=CONFIGS, help="size, and patch in pixels")
    add("--norm_type", default="LN", choices=NORM_TYPES, help="normalization; Rescale: none")
    text = "weights to start from: Google's .npz, a checkpoint, or auto (downloads Google's)"
    add("--pretrained_dir", metavar="FILE", type=_path, help=text)
    add("--img_size", default=224, type=_number(int, 1, 4096), help="side of the input, pixels")
    add("--seed", default=42, type=_number(int, 0, 2**32 - 1), help="decides all randomness")
    add("--deterministic", **yes, help="only deterministic algorithms (slower)")

    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", default=128, type=count, help="images per optimizer step, process")
    text = "batches that an optimizer step's images are split into"
    add("--gradient_accumulation_steps", default=1, type=count, help=text)
    add("--num_steps", default=20000, type=count, help="optimizer steps")
    text = "peak learning rate of SGD, momentum 0.9"
    add("--learning_rate", default=0.05, type=_number(float, 0), help=text)
    add("--weight_decay", default=0.0, type=_number(float, 0), help="L2 penalty")
    add("--warmup_steps", default=500, type=any_count, help="linear warmup, optimizer steps")
    add("--decay_type", default="cosine", choices=SCHEDULES, help="decay to 0 at num_steps")
    above_0 = _number(float, 0, low_allowed=False)
    text = "global norm that gradients are clipped to"
    add("--max_grad_norm", default=1.0, type=above_0, help=text)

    add = parser.add_argument_group("precision and speed").add_argument
    add("--fp16", **yes, help="half precision, at the level of --fp16_opt_level")
    text = "O0 fp32, O1 autocast, O2 half weights with fp32 masters, O3 all half"
    add("--fp16_opt_level", default="O2", choices=LEVELS, help=text)
    text = "of O1 and O2, 0: dynamic (fp16) or none (bf16); else a static scale"
    add("--loss_scale", default=0.0, type=_number(float, 0, 2.0**24), help=text)
    text = "auto: fp16 on CUDA, bf16 on a processor with bf16 units, else fp32"
    add("--half_dtype", default="auto", choices=("auto", *HALF_DTYPES), help=text)
    text = "apex needs an installed apex that still has apex.amp"
    add("--amp_backend", default="native", choices=("native", "apex"), help=text)
    text = "auto: what is faster on this processor; plain: PyTorch's own layers"
    add("--cpu_kernels", default="auto", choices=("auto", "plain"), help=text)
    add("--compile", **yes, help="compile the model with torch.compile")
    text = "less memory, a third more time: compute each block again for its gradients"
    add("--grad_checkpointing", **yes, help=text)

    add = parser.add_argument_group("evaluation and files").add_argument
    add("--eval_every", default=100, type=count, help="optimizer steps between evaluations")
    add("--eval_batch_size", default=512, type=count, help="images per batch of an evaluation")
    add("--eval", **yes, help="evaluate the run's best checkpoint, draw its figures")
    add("--output_dir", default="output", type=_path, help="where result logs and checkpoints go")
    add("--data_dir", default="data", type=_path, help="where CIFAR is, or is downloaded to")
    add("--log_every", default=10, type=count, help="optimizer steps between reads of the loss")
    text = "optimizer steps between checkpoints; if not given, --eval_every"
    add("--save_every", type=count, help=text)
    text = "stop, with a checkpoint, after this step; the schedule stays that of num_steps"
    add("--stop_after", type=count, help=text)
    text = "continue the run from its newest good checkpoint, or FILE; from the start if none"
    add("--resume", nargs="?", const="auto", metavar="FILE", type=_path, help=text)
    add("--overwrite", **yes, help="start anew though the run's files exist")

    add = parser.add_argument_group("processes").add_argument
    add("--gpu_id", default="0", type=_gpu, help="GPU of a single process; torchrun decides else")
    text = "from old launchers; torchrun's environment wins"
    add("--local_rank", "--local-rank", default=-1, type=int, help=text)
    parser.set_defaults(processes=1)  # no flag, but it decides results like one
    return parser


def parse_args(argv=None):
    """The validated flags. A mistake exits with status 2 and one line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    patch = CONFIGS[args.model_type].patches.size[0]
    if args.img_size % patch:
        parser.error(
            f"argument --img_size: {args.img_size} is not a multiple of {args.model_type}'s patch"
            f" of {patch} pixels"
        )
    if args.train_batch_size % args.gradient_accumulation_steps:
        parser.error(
            f"argument --train_batch_size: {args.train_batch_size} is not divisible by"
            f" --gradient_accumulation_steps {args.gradient_accumulation_steps}"
        )
    if args.fp16 and args.loss_scale and args.fp16_opt_level in ("O0", "O3"):
        parser.error(
            f"argument --loss_scale: {args.loss_scale:g} is not allowed with --fp16_opt_level"
            f" {args.fp16_opt_level}: O1 and O2 scale the loss"
        )
    if args.resume and args.overwrite:
        parser.error("argument --overwrite: not together with --resume")
    if args.amp_backend == "apex":
        try:
            from apex import amp  # noqa: F401
        except ImportError:
            parser.error(
                "argument --amp_backend: apex.amp cannot be imported; NVIDIA removed it from apex"
                " in 2025 (and PyPI's apex is another program); native gives the same levels O0..O3"
            )
    args.save_every = args.save_every or args.eval_every
    if dist_util.launched():
        args.processes = int(os.environ["WORLD_SIZE"])
    return args
