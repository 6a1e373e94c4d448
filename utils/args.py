"""The command line of train.py: flags, recipes' entries, and their validation."""

import argparse
import math
import os
import re
import textwrap

from models.configs import CONFIGS
from models.embeddings import kept_patches
from models.norm_layers import BatchNorm
from models.norms import NORM_TYPES, QK_NORMS
from recipes import OPTIMIZERS, RECIPES
from utils import dist_util
from utils.data_utils import DATASETS, SIDE, TRAIN_IMAGES
from utils.precision import HALF_DTYPES, LEVELS
from utils.scheduler import SCHEDULES


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def refuse(self, flag, reason):
        self.error(f"argument {flag}: {reason}")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        tells_nothing = action.default is False or action.default in (None, [])
        return action.help if tells_nothing else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return "N"

    def _split_lines(self, text, width):  # names such as ViT-B_16 stay whole
        return textwrap.wrap(text, width, break_on_hyphens=False)


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


def _text(pattern, allowed):
    def parse(text):
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed: {allowed}")
        return text

    return parse


def _choice(*names):
    return _text("|".join(names), f"one of {', '.join(names)}")


def _yes_no(text):
    return _choice("True", "False")(text) == "True"


def _betas(text):
    parse = _number(float, 0, 0.9999999)
    if text.count(",") != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: two numbers, such as 0.9,0.95")
    return tuple(parse(part) for part in text.split(","))


MAX_COUNT = 10**7
_name = _text(
    r"[A-Za-z0-9_+=@-][A-Za-z0-9._+=@-]{0,59}",
    "1 to 60 letters, digits and . _ + = @ - (no leading dot)",
)
_path, _gpu = _text("(?s).+", "a path"), _text(r"\d+", "a GPU's number, such as 0")
_share, _decay = _number(float, 0, 1), _number(float, 0, 0.9999999)

# What --set can override: the entries of a recipe that have no flag.
ENTRIES = {
    "optimizer": _choice(*OPTIMIZERS),
    "momentum": _decay,
    "betas": _betas,
    "adamw_factor": _number(float, 0, low_allowed=False),
    "decay_all": _yes_no,
    "head_factor": _number(float, 0, low_allowed=False),
    "ema": _decay,
    "crop": _choice("resized", "shift"),
    "smallest_crop": _number(float, 0, 1, low_allowed=False),
    "shift": _number(int, 0, 16),
    "flip": _yes_no,
    "randaugment_ops": _number(int, 0, 10),
    "randaugment_magnitude": _number(int, 0, 30),
    "mixup": _number(float, 0, 100),
    "cutmix": _number(float, 0, 100),
    "mix_share": _share,
    "label_smoothing": _decay,
    "dropout": _decay,
    "drop_path": _decay,
    "patch_dropout": _decay,
    "patch_dropout_until": _share,
    "pool": _choice("token", "mean"),
    "positions": _choice("learned", "sincos"),
    "stem": _choice("patch", "conv", "conv_bn"),
    "position_resize": _choice("auto", "bilinear", "bicubic"),
    "zero_head": _yes_no,
    "zero_branches": _yes_no,
}


def build_parser(recipe="reference"):
    """The parser, whose defaults are those of the recipe."""
    count, any_count = _number(int, 1, MAX_COUNT), _number(int, 0, MAX_COUNT)
    parser = _Parser(
        prog="train.py",
        usage="%(prog)s --name NAME [flags]",
        description="Train a Vision Transformer on CIFAR with the normalization of your choice.",
        epilog="example: python3 train.py --name demo --dataset digits --model_type ViT-Ti_4"
        " --img_size 32 --norm_type Rescale --train_batch_size 64 --num_steps 300",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    yes, folder = {"action": "store_true"}, {"metavar": "FOLDER", "type": _path}

    add = parser.add_argument_group("run").add_argument
    text = "part of the names of all its files"
    add("--name", required=True, type=_name, metavar="NAME", help=text)
    text = f"what other flags default to: {', '.join(RECIPES)}"
    add("--recipe", default="reference", choices=RECIPES, metavar="NAME", help=text)
    text = f"other entries of the recipe: {', '.join(ENTRIES)}"
    add("--set", nargs="+", action="extend", metavar="NAME=VALUE", default=[], help=text)
    text = "continue the run from its newest good checkpoint, or FILE; from the start if none"
    add("--resume", nargs="?", const="auto", metavar="FILE", type=_path, help=text)
    add("--overwrite", **yes, help="start over even if the run's files exist")
    add("--eval", **yes, help="evaluate the run's best checkpoint, draw its figures")
    add("--seed", default=42, type=_number(int, 0, 2**32 - 1), help="decides all randomness")
    add("--deterministic", **yes, help="only deterministic algorithms (slower)")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cifar10", choices=DATASETS, help="digits needs no download")
    text = "evaluate on the last N training images, held out, in place of the test images"
    add("--val_split", default=0, type=any_count, help=text)
    add("--img_size", type=_number(int, 1, 4096), help="side of the input, pixels")

    add = parser.add_argument_group("model").add_argument
    text = f"size, and patch in pixels: {', '.join(CONFIGS)}"
    add("--model_type", choices=CONFIGS, metavar="NAME", help=text)
    text = f"normalization, or what replaces it: {', '.join(NORM_TYPES)}"
    add("--norm_type", default="LN", choices=NORM_TYPES, metavar="NAME", help=text)
    add("--qk_norm", default="none", choices=QK_NORMS, help="norm of queries and keys, per head")
    text = "weights to start from: a .npz, .safetensors, checkpoint, or auto (downloads)"
    add("--pretrained_dir", metavar="FILE", type=_path, help=text)

    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", type=count, help="images per optimizer step, process")
    text = "batches that an optimizer step's images are split into"
    add("--gradient_accumulation_steps", default=1, type=count, help=text)
    add("--num_steps", type=count, help="optimizer steps")
    add("--learning_rate", type=_number(float, 0), help="peak learning rate")
    add("--weight_decay", type=_number(float, 0), help="L2 penalty of SGD; of others decoupled")
    add("--warmup_steps", type=any_count, help="linear warmup, optimizer steps")
    add("--decay_type", choices=SCHEDULES, help="decay to 0 at num_steps")
    text = "global norm that gradients are clipped to"
    add("--max_grad_norm", type=_number(float, 0, low_allowed=False), help=text)

    add = parser.add_argument_group("precision and speed").add_argument
    add("--fp16", **yes, help="half precision, at the level of --fp16_opt_level")
    text = "O0 fp32, O1 autocast, O2 half weights with fp32 masters, O3 all half"
    add("--fp16_opt_level", default="O2", choices=LEVELS, help=text)
    text = "static loss scale of O1 and O2; 0: dynamic in fp16, none in bf16"
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

    add = parser.add_argument_group("when").add_argument
    add("--eval_every", type=count, help="optimizer steps between evaluations")
    add("--eval_batch_size", default=512, type=count, help="images per batch of an evaluation")
    text = "add each block's signal and attention to TensorBoard at each evaluation"
    add("--log_signal", **yes, help=text)
    add("--log_every", default=10, type=count, help="optimizer steps between log entries")
    text = "optimizer steps between checkpoints; if not given, --eval_every"
    add("--save_every", type=count, help=text)
    text = "stop, with a checkpoint, after this step; the schedule stays that of num_steps"
    add("--stop_after", type=count, help=text)

    add = parser.add_argument_group("where").add_argument
    add("--output_dir", default="output", **folder, help="where result logs and checkpoints go")
    add("--data_dir", default="data", **folder, help="where CIFAR is, or is downloaded to")
    add("--gpu_id", default="0", type=_gpu, help="GPU of a process without torchrun")
    add("--local_rank", "--local-rank", default=-1, type=int, help="from old launchers")
    parser.set_defaults(processes=1)  # no flag, but it affects results like one
    entries = RECIPES[recipe]().to_dict()
    parser.set_defaults(**OPTIMIZERS[entries["optimizer"]] | entries)
    return parser


def parse_args(argv=None):
    """The validated flags and entries of the recipe. A mistake exits with status 2 and one line."""
    first = _Parser(prog="train.py", add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="reference", choices=RECIPES)
    parser = build_parser(first.parse_known_args(argv)[0].recipe)
    args = parser.parse_args(argv)
    _set_entries(parser, args)
    if dist_util.launched():
        args.processes = int(os.environ["WORLD_SIZE"])
    _check_shapes(parser, args)
    if args.fp16 and args.loss_scale and args.fp16_opt_level in ("O0", "O3"):
        reason = f"is not allowed with --fp16_opt_level {args.fp16_opt_level}"
        parser.refuse("--loss_scale", f"{args.loss_scale:g} {reason}: O1 and O2 scale the loss")
    if args.position_resize != "auto" and not args.pretrained_dir:
        parser.refuse("--set", "position_resize is not allowed without --pretrained_dir")
    if args.resume and args.overwrite:
        parser.refuse("--overwrite", "not together with --resume")
    if args.amp_backend == "apex":
        if args.optimizer != "sgd" or not args.decay_all or args.ema:
            reason = "apex is not allowed without optimizer=sgd, decay_all=True and ema=0"
            parser.refuse("--amp_backend", reason)
        try:
            from apex import amp  # noqa: F401
        except ImportError:
            reason = "apex.amp cannot be imported; NVIDIA removed it from apex in 2025 (and PyPI's"
            reason += " apex is another program); native gives the same levels O0..O3"
            parser.refuse("--amp_backend", reason)
    args.save_every = args.save_every or args.eval_every
    return args


def _set_entries(parser, args):
    """Replace the recipe's values by those of --set; clear entries that the optimizer lacks."""
    named = set()
    for text in args.set:
        name, equals, value = text.partition("=")
        if name not in ENTRIES or not equals:
            allowed = ", ".join(ENTRIES)
            parser.refuse("--set", f"{text!r} is not allowed: NAME=VALUE, NAME of {allowed}")
        try:
            setattr(args, name, ENTRIES[name](value))
        except argparse.ArgumentTypeError as error:
            parser.refuse("--set", f"{name}={error}")
        named.add(name)
    del args.set
    own, recipe = OPTIMIZERS[args.optimizer], RECIPES[args.recipe]()
    for name in sorted({name for entries in OPTIMIZERS.values() for name in entries}):
        if name not in named:
            setattr(args, name, recipe.get(name, own[name]) if name in own else None)
        elif name not in own:
            reason = f"is not allowed with {args.optimizer}: it has {', '.join(own)}"
            parser.refuse("--set", f"{name} {reason}")


def _check_shapes(parser, args):
    model, side, patch = args.model_type, args.img_size, CONFIGS[args.model_type].patches.size[0]
    batch, parts = args.train_batch_size, args.gradient_accumulation_steps
    total = TRAIN_IMAGES[args.dataset]
    images = total - args.val_split
    if side % patch:
        reason = f"{side} is not a multiple of {model}'s patch of {patch} pixels"
        parser.refuse("--img_size", reason)
    if args.crop == "shift" and side != SIDE:
        parser.refuse("--img_size", f"{side} is not allowed with crop=shift: {SIDE}")
    if args.stem != "patch" and patch != 4:
        reason = f"is not allowed with {model}: its strides make patches of 4 pixels"
        parser.refuse("--set", f"stem={args.stem} {reason}")
    if batch % parts:
        reason = f"{batch} is not divisible by --gradient_accumulation_steps {parts}"
        parser.refuse("--train_batch_size", reason)
    if images < args.processes:
        reason = f"{args.val_split} leaves no training images; {args.dataset} has {total}"
        parser.refuse("--val_split", f"{reason}, and a process needs one")
    smallest = min(batch // parts, images // args.processes)
    last = images % (batch // parts * args.processes) // args.processes
    if (args.mixup or args.cutmix) and smallest < 2:
        reason = f"{smallest} image in a batch, mixup and cutmix need 2"
        parser.refuse("--train_batch_size", reason)
    over_batch = issubclass(NORM_TYPES[args.norm_type].norm, BatchNorm)
    tokens = kept_patches((side // patch) ** 2, args.patch_dropout) + (args.pool == "token")
    if over_batch and tokens == 1 and 1 in (smallest, last):
        given = f"pool=mean, --img_size {side}, patch_dropout={args.patch_dropout:g}"
        reason = f"is not allowed with {given} and one image in a batch: one token has no variance"
        parser.refuse("--norm_type", f"{args.norm_type} {reason}")
