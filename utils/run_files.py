"""The names of a run's files, and the flags that decide them."""

import glob
import hashlib
import os
import re
import tempfile
from pathlib import Path
from urllib.parse import quote

from utils.args import build_parser
from utils.errors import UserError
from utils.log_reader import OPERATIONAL

HALF_PRECISION_FLAGS = "fp16_opt_level loss_scale half_dtype amp_backend".split()
IN_REFERENCE_NAME = "model_type norm_type fp16 img_size pretrained_dir".split()


class RunFiles:
    """Where one run's files are. Two runs with different flags never share one.

    Names are the reference's. They leave out most flags: those that are not at their defaults are
    appended. `check_writable` raises UserError.
    """

    def __init__(self, args):
        self.output_dir = Path(args.output_dir)
        pretrained = "T" if args.pretrained_dir else "F"
        middle = f"{args.model_type}_norm_{args.norm_type}_fp_{args.fp16}_img_{args.img_size}"
        middle += f"_pretrain_{pretrained}"
        rest = _unnamed(args)
        self.run_name = f"{args.name}_{middle}{_suffix(rest)}"
        rest.pop("dataset", None)
        self.log = self.output_dir / f"{args.dataset}_{middle}_{args.name}{_suffix(rest)}.txt"
        self.tensorboard = Path("logs") / self.run_name
        self.best = self.output_dir / f"{self.run_name}_checkpoint.bin"
        self.final = self.output_dir / f"{self.run_name}_final.bin"
        self.lock = self.output_dir / f".{self.run_name}.lock"
        self.tensorboard_lock = Path("logs") / f".{self.run_name}.lock"

    def step(self, step):
        """The checkpoint that continues after `step`."""
        return self.output_dir / f"{self.run_name}_step_{step}.bin"

    def steps(self):
        """The run's checkpoints to continue from, newest (most steps) first."""
        pattern = re.compile(re.escape(self.run_name) + r"_step_(\d+)\.bin")
        found = [
            pattern.fullmatch(path.name)
            for path in self.output_dir.glob(f"{glob.escape(self.run_name)}_step_*.bin")
        ]
        steps = sorted((int(match[1]) for match in found if match), reverse=True)
        return [self.step(step) for step in steps]

    def checkpoints(self):
        """All of the run's checkpoints that exist."""
        return [path for path in (*self.steps(), self.best, self.final) if path.exists()]

    def leftovers(self):
        """Partial files of processes that were killed while they wrote a checkpoint."""
        return self.output_dir.glob(f"{glob.escape(self.run_name)}_*.part")

    def existing(self):
        """A file that shows that the run was begun, or None."""
        return next((path for path in (*self.checkpoints(), self.log) if path.exists()), None)

    def check_writable(self):
        for folder in (self.output_dir, self.tensorboard.parent):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                flag = "--output_dir " if folder == self.output_dir else ""
                raise UserError(
                    f"{flag}{folder} cannot be written: {os.strerror(error.errno)}"
                ) from None


def result_flags(args):
    """The flags that decide a run's result, as a dict of plain values."""
    left_out = set(OPERATIONAL)
    if args.compile:  # a compiler fuses, and so rounds, differently where it recomputes
        left_out.remove("grad_checkpointing")
    if not args.fp16:
        left_out.update(HALF_PRECISION_FLAGS)
    elif args.fp16_opt_level == "O0":
        left_out.add("half_dtype")
    flags = {k: v for k, v in sorted(vars(args).items()) if k not in left_out}
    if args.pretrained_dir:
        auto = args.pretrained_dir == "auto"
        flags["pretrained_dir"] = (
            _usual_file(args) if auto else os.path.normpath(args.pretrained_dir)
        )
    return flags


def _usual_file(args):
    return os.path.join("pretrain", f"{args.model_type}.npz")


def _unnamed(args):
    """The flags that are not at their defaults and that the reference's names leave out."""
    parser, flags = build_parser(args.recipe), result_flags(args)
    rest = {
        k: v
        for k, v in flags.items()
        if v not in (None, parser.get_default(k)) and k not in IN_REFERENCE_NAME
    }
    if args.pretrained_dir and flags["pretrained_dir"] != _usual_file(args):
        rest["from"] = quote(os.fsencode(flags["pretrained_dir"]), safe="")
    return rest


def _suffix(flags):
    # --name cannot contain a comma, so two runs never get the same file name.
    values = {k: "_".join(map(str, v)) if isinstance(v, tuple) else v for k, v in flags.items()}
    text = "".join(f",{k}" if v is True else f",{k}={v}" for k, v in values.items())
    if len(text) <= 90:
        return text
    return "," + hashlib.sha256(text.encode()).hexdigest()[:12]
