"""Speed and memory against what users would pick instead, as ratios measured side by side.

    python3 benchmark.py [--rows input step ...] [--models ViT-B_32 ViT-Ti_4]

A row compares two contestants that run in turn, A B A B ..., each in its own process. `ratio`: the
median of the other's times over that of ours, so ours is faster above 1; `range`: of the single
turns' ratios; `memory`: the ratio of the peaks. Ours is what train.py does with the flags in its
name. The others are timm's and torchvision's ViT of the same size with the same dropout, optimizer
and clipping, in each type that is fast on this machine, and PIL in a DataLoader with two workers.
`limit` is the rate of our floating-point operations as a share of that of a large matrix product
of the same type, by the faster of PyTorch's two libraries on a CPU.
"""

import argparse
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from models.configs import CONFIGS
from models.fast_cpu import OneDnnLinear, capability
from models.modeling import build_model
from models.norm_layers import Measuring
from models.norms import NORM_TYPES
from train import precision_of
from utils import dist_util
from utils.args import parse_args
from utils.flops import highest_memory, training_pflop
from utils.trial import CLASSES, Trial

MODELS = {  # side, batch
    "ViT-B_32": (224, 32),
    "ViT-B_16": (224, 32),
    "ViT-Ti_4": (32, 128),
    "ViT-64x4_4": (32, 128),
}
LEVELS = {"O0": "", "O2": " --fp16"}
UNCOUNTED = 3  # runs before those that count: page faults distort the first ones

# The pairs of each kind of row, ours second: a method and whose it is. {half}: the level's flag.
STEP, TIMM = "step LN{half}", ("timm", "timm autocast")
SMALL, HEAVY = "{half} --recipe small", " --set randaugment_ops=2 mixup=0.8 cutmix=1"
PAIRS = {
    "input": [("images PIL", "images LN{half}")],
    "step": [
        ("product LN{half}", STEP),
        *((f"step {peer}", STEP) for peer in (*TIMM, "torchvision", "torchvision autocast")),
    ],
    "fp16": [("step LN", "step LN --fp16")],
    "norms": [(f"step {name}{{half}}", STEP) for name in NORM_TYPES if name != "LN"],
    "norms_compiled": [
        (f"step {name}{{half}} --compile", f"{STEP} --compile")
        for name in NORM_TYPES
        if name != "LN"
    ],
    "evaluation": [
        (other, "evaluation LN{half}")
        for other in ("product LN{half}", "evaluation timm", "evaluation timm half")
    ],
    "program": [(f"program {peer} PIL", "program LN{half}") for peer in TIMM],
    "memory": [(STEP, f"{STEP} --grad_checkpointing")],
    "compiled": [
        (f"step {peer} compiled", ours) for peer in TIMM for ours in (f"{STEP} --compile", STEP)
    ],
    # With recipe small, for 32 px: compiling, and what making a batch takes of a step
    "small": [(f"step LN{SMALL} --compile", f"step LN{SMALL}")],
    "data": [(f"step LN{SMALL}", f"batch LN{SMALL}{more}") for more in ("", HEAVY)],
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, kinds = parser.add_argument, [*PAIRS, "profile", "cost"]
    add("--rows", nargs="+", choices=kinds, default=kinds, help="what to measure")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS)[:3])
    add("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="of ours")
    add("--batch", type=int, help="images per training step; if not given, 32, at 32 px 128")
    add("--repeats", type=int, default=5, help="counted runs of each")
    add("--data_dir", default="data", help="where CIFAR-10 is")
    args = parser.parse_args()
    fp16 = parse_args(["--name", "benchmark", "--fp16"])
    args.device = dist_util.init(fp16)
    args.half = precision_of(fp16, args.device)[1]  # None: not fast here
    for row in all_rows(args):
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def all_rows(args):
    yield {
        "torch": torch.__version__,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "processor": capability(),
        "--fp16": str(args.half or torch.float32),
    }
    halves = [LEVELS[level] for level in args.levels]
    for kind in args.rows:
        if kind == "cost":
            yield from cost_rows()
        for model_type in args.models:
            if kind == "profile":
                for half in halves:
                    yield from profile_rows(args, model_type, f"LN{half}")
            if kind in ("small", "data") and MODELS[model_type][0] != 32:
                continue
            pairs = [
                (a.format(half=h), b.format(half=h)) for h in halves for a, b in PAIRS.get(kind, ())
            ]
            for other, ours in dict.fromkeys(pairs):
                is_slow = not args.half and {"autocast", "half"} & set(other.split())
                if not is_slow:
                    yield compare(args, kind, model_type, other, ours)


# Measuring

contestant = {}  # in a contestant's process: what it runs, and the memory before that was made


def prepare(*which):
    contestant["memory"] = highest_memory()
    contestant["run"] = make(*which)


def seconds():
    start = time.perf_counter()
    contestant["run"]()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory():
    return highest_memory() - contestant["memory"]


def flops(run=None):
    """Floating-point operations of run(): two for each multiply-add of its matrix products."""
    # Fused attention is not counted on a CPU; elsewhere, what it computes twice would be, too.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (run or contestant["run"])()
    return counter.get_total_flops()


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def linear_flops(x_shape, weight_shape, *_, **__):
    return 2 * x_shape.numel() * weight_shape[0]


def compare(args, kind, model_type, other, ours):
    """The row of one pair; `seconds` and `GiB` (peak memory, beyond imports) are ours."""
    spawning = get_context("spawn")
    theirs, mine = (
        ProcessPoolExecutor(1, spawning, prepare, (args, model_type, name))
        for name in (other, ours)
    )
    turns = []
    with theirs, mine:
        for _ in range(UNCOUNTED + args.repeats):
            turns.append([process.submit(seconds).result() for process in (theirs, mine)])
            if "PIL" in other:
                time.sleep(1)  # its workers fill their queue outside our time
        memory, our_memory = (process.submit(peak_memory).result() for process in (theirs, mine))
        if other.startswith("product"):
            work, our_work = (process.submit(flops).result() for process in (theirs, mine))
    turns = np.array(turns[UNCOUNTED:])
    ratios, (median, our_median) = turns[:, 0] / turns[:, 1], np.median(turns, axis=0)
    row = {"row": f"{kind}, {model_type}", "ours": ours, "against": other}
    if other.startswith("product"):
        return row | {"limit": shorter(our_work / our_median * median / work)}
    return row | {
        "ratio": shorter(median / our_median),
        "range": f"{ratios.min():.3g}..{ratios.max():.3g}",
        "seconds": shorter(our_median),
        "memory": shorter(memory / our_memory),
        "GiB": shorter(our_memory / 2**30),
    }


def shorter(number):
    return float(f"{number:.3g}")


def profile_rows(args, model_type, name):
    """The operations that take a hundredth or more of a training step's time by themselves."""
    step = make(args, model_type, f"step {name}")
    for _ in range(UNCOUNTED):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    for operation in sorted(times, key=times.get, reverse=True):
        share = shorter(times[operation] / sum(times.values()))
        if share >= 0.01:
            yield {"row": f"profile, {model_type} {name}", "operation": operation, "share": share}


def cost_rows():
    """Floating-point operations of the reference's recipe, counted without computing: 20,000
    steps of 128 images, and 200 evaluations of 10,000."""
    for name in [name for name in CONFIGS if name.endswith(("_16", "_32", "H_14"))]:
        flags = f"--name cost --model_type {name} --num_steps 20000 --train_batch_size 128"
        flags = parse_args(flags.split())
        training = training_pflop(flags, CLASSES)
        with torch.device("meta"):
            evaluation = partial(build_model(flags, CLASSES).eval(), torch.empty(1, 3, 224, 224))
        evaluation = flops(evaluation) * 200 * 10000 / 1e15
        yield {
            "row": f"cost, {name}",
            "training_PFLOP": shorter(training),
            "evaluation_PFLOP": shorter(evaluation),
            "minutes_at_100_TFLOP_per_s": shorter((training + evaluation) * 10 / 60),
        }


# The contestants


def make(args, model_type, name):
    """What the contestant runs: `name` is a method, one of those below, and whose it is."""
    method, *words = name.split()
    side, batch = MODELS[model_type]
    flags = f"--name benchmark --model_type {model_type} --img_size {side}".split()
    flags += ["--train_batch_size", str(args.batch or batch), "--data_dir", args.data_dir]
    if words[0] in NORM_TYPES:
        flags = parse_args([*flags, "--norm_type", *words])
        trial = Trial(flags, args.device, *precision_of(flags, args.device))
    else:
        from utils.peer_trial import PeerTrial  # timm is not needed for our own rows

        trial = PeerTrial(parse_args(flags), args.device, args.half, words)
    for module in trial.model.modules():
        if isinstance(module, Measuring):
            module.calls = Measuring.MEASURING_CALLS  # the state after the first 8 steps
    return partial(METHODS[method], trial)


def step(trial):
    trial.train(*trial.batch)


def evaluation(trial):
    trial.evaluate([trial.batch] * 4)


def images(trial):
    for _ in range(4096 // len(trial.batch[1])):
        next(trial.data[0])


def batch(trial):
    next(trial.data[0])


def program(trial):
    """Input, steps and evaluation; the reference evaluates 78 batches per 100 steps."""
    training, tests = trial.data
    trial.model.train()
    for batch in islice(training, 4):
        trial.train(*batch)
    trial.evaluate(islice(tests, 3))


def product(trial):
    for _ in range(4):
        fastest_product(trial.device, trial.dtype)()


METHODS = {
    method.__name__: method for method in (step, evaluation, images, batch, program, product)
}


@cache
def fastest_product(device, dtype):
    """The product of 4096x4096 matrices, by the faster of PyTorch's two libraries."""
    layer = OneDnnLinear(4096, 4096, bias=False, device=device, dtype=dtype)
    x = torch.randn(4096, 4096, device=device).to(dtype)
    ways = (lambda: layer(x), lambda: F.linear(x, layer.weight))
    return min(ways, key=lambda way: min(timeit.repeat(way, number=1)))


if __name__ == "__main__":
    main()
