"""Checks what this machine's GPUs compute against its CPU, for docs/half_precision.md.

    python3 check_gpu.py [--only levels scale ...] [--norm_types LN ...]

Without a GPU it is a rehearsal: the CPU's faster layers against PyTorch's own, and smaller models.
The exit status is 1 if a check says FAILED; its error goes to stderr.

The losses of two trainings may differ by 16 roundings of the type (2^-11 in fp16, 2^-8 in bf16),
relative to how far they moved; by 128 at O3, which rounds the weights too. On a CPU the norm types
reached 5 and 67, in both types. In fp32, 1,024 roundings of 2^-24 are allowed (320 were seen); on a
GPU, 16 of TF32 (2^-11), which cuDNN's convolutions use. For whole runs: relative to the test loss.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

from models.fast_cpu import capability
from models.norms import NORM_TYPES
from train import precision_of
from utils import dist_util
from utils.args import parse_args
from utils.flops import highest_memory
from utils.log_reader import read_log
from utils.precision import CLEAN_STEPS
from utils.trial import Trial

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ROOT = Path(__file__).resolve().parent
SMALL = "--model_type ViT-64x4_4 --img_size 32 --train_batch_size 16 --set dropout=0"
RUN = f"--name check --dataset digits --num_steps 16 --warmup_steps 2 --max_grad_norm 100 {SMALL}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--norm_types", nargs="+", choices=NORM_TYPES, default=list(NORM_TYPES))
    args = parser.parse_args()
    flags = parse_args(["--name", "check", "--fp16"])
    args.device, args.gpus = dist_util.init(flags), torch.cuda.device_count()
    args.half = precision_of(flags, args.device)[1] or torch.bfloat16
    kind = f"{args.gpus} x {torch.cuda.get_device_name()}" if args.gpus else capability()
    what = "A rehearsal without a GPU" if args.device.type == "cpu" else "Checked on a GPU"
    print(f"{what}: {kind}, torch {torch.__version__}\n")
    print("| check | result | difference or ratio | seconds |\n|---|---|---|---|", flush=True)
    failed, began = False, time.monotonic()
    for name in args.only:
        for what, is_right, text in rows(name, args):
            failed |= is_right is False
            result = {True: "ok", False: "FAILED", None: "measured"}[is_right]
            print(f"| {what} | {result} | {text} | {time.monotonic() - began:.0f} |", flush=True)
            began = time.monotonic()
    return int(failed)


def rows(name, args):
    """For a check: what was checked, whether it is right (None: only measured), and a text."""
    try:
        yield from CHECKS[name](args)
    except Exception as error:
        print(f"{name}: {error}\n{getattr(error, 'stderr', None) or ''}", file=sys.stderr)
        yield name, False, type(error).__name__


def make_trial(flags, *where, **how):
    return Trial(parse_args(["--name", "check", *flags.split()]), *where, **how)


def train(trial, steps=1, factor=1.0):
    """Take `steps` steps, with their losses times `factor`; returns their records."""
    for _ in range(steps):
        trial.train(*trial.batch, 0.02, factor)
    return trial.precision.read()


@cache
def losses(norm_type, *where, **how):
    trial = make_trial(f"{SMALL} --norm_type {norm_type}", *where, **how)
    return torch.tensor([record.loss for record in train(trial, steps=6)])


def allowed(args, level="O0", half=None):
    if half:
        return {"O3": 128}.get(level, 16) * ROUNDING[half]
    return 1024 * 2.0**-24 if args.device.type == "cpu" else 16 * 2.0**-11


def levels(args):
    """Each norm type at each level for a few steps, against the CPU in fp32."""
    halves = ROUNDING if args.gpus else [args.half]
    for level, half in [("O0", None), *((f"O{n}", half) for half in halves for n in (1, 2, 3))]:
        loss_scale = 128.0 if half == torch.float16 and level != "O3" else 0.0
        differences, bound = {}, allowed(args, level, half)
        for name in args.norm_types:
            expected = losses(name, torch.device("cpu"), plain=True)
            got = losses(name, args.device, level, half, loss_scale)
            share = (got - expected).abs().max() / (expected.max() - expected.min())
            differences[name] = share.nan_to_num(torch.inf).item()
        worst = max(differences, key=differences.get)
        wrong = [name for name, difference in differences.items() if difference > bound]
        what = f"{level}, {str(half or torch.float32)[6:]}, norm types: {len(differences)}"
        text = f"{differences[worst]:.2g} ({', '.join(wrong) or worst}; {bound:.2g} allowed)"
        yield what, not wrong, text


def scale(args):
    """An overflow halves the dynamic scale and changes no weight; clean steps double it."""
    trial = make_trial(SMALL, args.device, "O2", torch.float16)
    precision = trial.precision
    train(trial, steps=16)  # the scale comes down until nothing overflows
    scales, changed = [precision.state["scale"].item()], []
    for factor, clean in ((torch.inf, 0), (1.0, CLEAN_STEPS - 1)):
        before = [master.detach().clone() for master in precision.masters]
        precision.state["clean"].fill_(clean)
        train(trial, factor=factor)
        changed.append(not all(map(torch.equal, before, precision.masters)))
        scales.append(precision.state["scale"].item())
    is_right = changed == [False, True] and scales[0] == 2 * scales[1] == scales[2]
    yield "fp16's dynamic scale", is_right, "{:g}, halved {:g}, doubled {:g}".format(*scales)


def run(flags, *launcher):
    """The test loss after train.py with `flags`."""
    command = [sys.executable, *launcher, ROOT / "train.py", *RUN.split(), *flags.split()]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        return read_log(next(Path(folder, "output").glob("*.txt"))).loss[-1]


def compiled(args):
    yield compare(args, "`--compile`", run("--compile"), run(""))


def ddp(args):
    """DDP on all GPUs, or two processes, against one process with all the images."""
    n, backend = args.gpus or 2, "nccl" if args.gpus else "gloo"
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {n}".split()
    got, expected = run("--train_batch_size 8", *torchrun), run(f"--train_batch_size {8 * n}")
    yield compare(args, f"DDP, processes: {n}, {backend}", got, expected)


def compare(args, what, got, expected):
    difference, bound = abs(got / expected - 1), allowed(args)
    text = f"{difference:.2g} (test loss {got:.5f}, {expected:.5f}; {bound:.2g} allowed)"
    return what, difference <= bound, text


def memory(args):
    """The peaks of training steps, each in a process of its own."""
    size = "--model_type ViT-B_16 --train_batch_size 64"
    if args.device.type == "cpu":
        size = "--model_type ViT-64x24_4 --img_size 32 --train_batch_size 48"
    peaks, half = [], (args.device, "O2", args.half)
    for flags, *how in (("", args.device), ("", *half), (" --grad_checkpointing", *half)):
        with get_context("spawn").Pool(1) as process:
            peaks.append(process.apply(peak, (size + flags, *how)) / 2**30)
    text = "{:.2f} GiB; with `--fp16` {:.2f}; and `--grad_checkpointing` {:.2f}".format(*peaks)
    yield f"memory, `{size}`", peaks[0] > peaks[1] > peaks[2], text


def peak(*which):
    """The bytes that three training steps take, beyond those of the program."""
    before = highest_memory()
    train(make_trial(*which), steps=3)
    return highest_memory() - before


def benchmark(args):
    """--fp16 against fp32; with timm installed, a step against its and torchvision's, too."""
    rows = "step fp16" if importlib.util.find_spec("timm") else "fp16"
    what = f"--levels O2 --rows {rows} --models ViT-B_16 --batch 64"
    if args.device.type == "cpu":
        what = "--levels O2 --rows fp16 --models ViT-Ti_4 --batch 8 --repeats 1"
    command = [sys.executable, ROOT / "benchmark.py", *what.split()]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [("benchmark", None, line) for line in done.stdout.splitlines()[1:]]


CHECKS = {check.__name__: check for check in (levels, scale, compiled, ddp, memory, benchmark)}

if __name__ == "__main__":
    sys.exit(main())
