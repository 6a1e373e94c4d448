"""Speed and memory against what users would pick instead, as ratios measured side by side.

    python3 benchmark.py [--rows input step ...] [--models ViT-B_32 ViT-Ti_4] [--json FILE]

A row compares two contestants, each in a process of its own, that run in turn, A B A B ...
`ratio`: the median of the other's times over that of ours, so above 1 ours is faster; `range`: of
the turns' own ratios; `memory`: the ratio of the peaks. Ours is what train.py does with the flags
in its name. The others are timm's and torchvision's ViT of the same size with the same dropout,
optimizer and clipping, in each type that is fast on this machine, and PIL in a DataLoader with two
workers. Against a large matrix product of the same type, by the faster of PyTorch's two libraries
on a CPU, `limit` is the share of its rate that our floating-point operations come to.
"""

import argparse
import json
import os
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
from torchvision import transforms

from models.configs import CONFIGS
from models.fast_cpu import OneDnnLinear, accelerate, capability, fixed_weights
from models.modeling import VisionTransformer, build_model
from models.norm_layers import Measuring
from models.norms import NORM_TYPES
from train import precision_of, seed_step
from utils import dist_util
from utils.args import parse_args
from utils.augmentation import Augmentation
from utils.data_utils import Resizer, TestBatches, TrainBatches, load_dataset
from utils.flops import highest_memory
from utils.optimizers import make_optimizers
from utils.precision import Precision

MODELS = {"ViT-B_32": (224, 32), "ViT-B_16": (224, 32), "ViT-Ti_4": (32, 128)}  # side, batch
LEVELS = {"O0": "", "O2": " --fp16"}
CLASSES = 10
UNCOUNTED = 3  # runs before those that count: page faults distort the first ones
FORCING = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")

# The pairs of each kind of row, ours second: a method and whose it is. {half}: of the level.
TIMM = ("timm", "timm autocast")
PEERS = (*TIMM, "torchvision", "torchvision autocast")
PRODUCT = "product LN{half}"
PAIRS = {
    "input": [("input PIL", "input LN{half}")],
    "step": [(other, "step LN{half}") for other in (PRODUCT, *(f"step {p}" for p in PEERS))],
    "fp16": [("step LN", "step LN --fp16")],
    "norms": [(f"step {name}{{half}}", "step LN{half}") for name in NORM_TYPES if name != "LN"],
    "evaluation": [
        (other, "evaluation LN{half}")
        for other in (PRODUCT, "evaluation timm", "evaluation timm half")
    ],
    "program": [(f"program {peer} PIL", "program LN{half}") for peer in TIMM],
    "memory": [("step LN{half}", "step LN{half} --grad_checkpointing")],
    "compiled": [
        (f"step {peer} compiled", f"step LN{{half}}{flag}")
        for peer in TIMM
        for flag in (" --compile", "")
    ],
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, kinds = parser.add_argument, [*PAIRS, "profile", "cost"]
    add("--rows", nargs="+", choices=kinds, default=kinds, help="what to measure")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="of ours")
    add("--batch", type=int, help="images per training step; if not given, 32, of ViT-Ti_4 128")
    add("--repeats", type=int, default=5, help="counted runs of each")
    add("--data_dir", default="data", help="where CIFAR-10 is")
    add("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    fp16 = parse_args(["--name", "benchmark", "--fp16"])
    args.device = dist_util.init(fp16)
    args.half = precision_of(fp16, args.device)[1]  # None: not fast here
    figures = []
    for row in all_rows(args):
        figures.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if args.json:  # after each row: a benchmark cut short leaves what it has
            Path(args.json).write_text(json.dumps(figures, indent=1))


def all_rows(args):
    yield {
        "torch": torch.__version__,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "processor": capability(),
        "forced by": [f"{name}={os.environ[name]}" for name in FORCING if name in os.environ],
        "--fp16": str(args.half or torch.float32),
    }
    for kind in args.rows:
        if kind == "cost":
            yield from cost_rows()
        for model_type in args.models:
            done = set()
            for half in (LEVELS[level] for level in args.levels):
                if kind == "profile":
                    yield from profile_rows(args, model_type, f"LN{half}")
                for pair in PAIRS.get(kind, ()):
                    other, ours = (name.format(half=half) for name in pair)
                    is_slow = not args.half and {"autocast", "half"} & set(other.split())
                    if not is_slow and (other, ours) not in done:
                        yield compare(args, kind, model_type, other, ours)
                    done.add((other, ours))


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
    # Fused attention would not be counted on a CPU, and elsewhere with what it computes twice.
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
                time.sleep(1)  # its workers fill their queue: not in our time
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
    """The operations that take a hundredth or more of a training step's time in them."""
    step = make(args, model_type, f"step {name}")
    for _ in range(6):  # page faults distort the first ones
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    for operation in sorted(times, key=times.get, reverse=True):
        share = shorter(times[operation] / sum(times.values()))
        if share >= 0.01:
            yield {"row": f"profile, {model_type} {name}", "operation": operation, "share": share}


def cost_rows():
    """Floating-point operations of the reference's recipe, counted on no device at all: 20,000
    steps of 128 images, and 200 evaluations of 10,000."""
    for name in [name for name in CONFIGS if name.endswith(("_16", "_32", "H_14"))]:
        with torch.device("meta"):
            model = VisionTransformer(CONFIGS[name], 224, "LN", CLASSES)
            images, labels = torch.empty(2, 3, 224, 224), torch.zeros(2, dtype=torch.long)
        train = flops(lambda: model(images, labels).backward()) / 2 * 20000 * 128  # noqa: B023
        test = flops(lambda: model.eval()(images)) / 2 * 200 * 10000  # noqa: B023
        yield {
            "row": f"cost, {name}",
            "training_PFLOP": shorter(train / 1e15),
            "evaluation_PFLOP": shorter(test / 1e15),
            "minutes_at_100_TFLOP_per_s": shorter((train + test) / 1e14 / 60),
        }


# The contestants


def make(args, model_type, name):
    """What the contestant runs: `name` is a method and whose it is."""
    method, whose = name.split(maxsplit=1)
    contestants = Ours if whose.split()[0] in NORM_TYPES else Peer
    return getattr(contestants(args, model_type, whose), method)


class Contestant:
    """Its methods are measured. What they need is made in the first runs, which do not count."""

    def __init__(self, args, model_type):
        self.device, self.data_dir, self.half = args.device, args.data_dir, args.half
        self.side, batch = MODELS[model_type]
        self.batch = args.batch or batch

    @cached_property
    def random_batch(self):
        images = torch.randn(self.batch, 3, self.side, self.side, device=self.device)
        return images.to(self.dtype), torch.randint(CLASSES, (self.batch,), device=self.device)

    def step(self):
        self.train(*self.random_batch)

    @torch.inference_mode()
    def evaluation(self):
        self.model.eval()
        for _ in range(4):
            self.predict(self.random_batch[0])

    def input(self):
        for _ in range(4096 // self.batch):
            self.one_batch()

    def one_batch(self):
        next(self.data[0])

    def program(self):
        """Input, steps and evaluation; the reference takes 100 steps to 78 batches of tests."""
        training, tests = self.data
        self.model.train()
        for images, labels in islice(training, 4):
            self.train(images, labels)
        self.model.eval()
        with torch.inference_mode():
            sum((self.predict(x) == y).sum() for x, y in islice(tests, 3)).item()


class Ours(Contestant):
    """What train.py does; `name` is a norm type and flags."""

    def __init__(self, args, model_type, name):
        super().__init__(args, model_type)
        flags = f"--name benchmark --model_type {model_type} --img_size {self.side}"
        flags = parse_args(f"{flags} --train_batch_size {self.batch} --norm_type {name}".split())
        self.side, self.batch = flags.img_size, flags.train_batch_size
        torch.manual_seed(0)
        self.flags, self.model = flags, build_model(flags, CLASSES).to(self.device)
        self.model.transformer.encoder.grad_checkpointing = flags.grad_checkpointing
        for module in self.model.modules():
            if isinstance(module, Measuring):
                module.calls = Measuring.MEASURING_CALLS  # the state of all steps but 8
        self.precision = Precision(self.model, *precision_of(flags, self.device))
        self.precision.attach(make_optimizers(flags, self.precision.named_masters()))
        self.dtype = self.precision.input_dtype
        accelerate(self.model, flags.compile)
        self.forward = torch.compile(self.model, dynamic=False) if flags.compile else self.model

    @cached_property
    def data(self):
        dataset = load_dataset("cifar10", self.data_dir)
        resizer = Resizer(self.side, self.device, self.dtype)
        augmentation = Augmentation(self.flags, resizer, CLASSES)
        training = TrainBatches(dataset, self.batch, augmentation, 0, self.device)
        return map(training, count()), TestBatches(dataset, self.batch, resizer, self.device)

    def train(self, images, labels):
        seed_step(0, 0)
        with self.precision.autocast():
            loss = self.forward(images, labels)
        self.precision.backward(loss)
        self.precision.clip(1.0)
        self.precision.update(1e-3)
        self.precision.records.clear()

    def evaluation(self):
        with fixed_weights(self.model):
            super().evaluation()

    def predict(self, images):
        return self.forward(images)[0].argmax(1)

    @cached_property
    def multiply(self):
        """The faster of PyTorch's two libraries, on matrices of 4096 rows and columns."""
        layer = OneDnnLinear(4096, 4096, bias=False, device=self.device, dtype=self.dtype)
        x = torch.randn(4096, 4096, device=self.device).to(self.dtype)
        ways = (lambda: layer(x), lambda: F.linear(x, layer.weight))
        return min(ways, key=lambda way: min(timeit.repeat(way, number=1)))

    def product(self):
        for _ in range(4):
            self.multiply()


class Peer(Contestant):
    """timm's or torchvision's model in plain PyTorch; `name` may hold autocast, half, compiled."""

    def __init__(self, args, model_type, name):
        super().__init__(args, model_type)
        config = CONFIGS[model_type]
        depth, width = config.transformer.num_layers, config.hidden_size
        same = {"patch_size": config.patches.size[0], "num_heads": config.transformer.num_heads}
        same["num_classes"] = CLASSES
        if "torchvision" in name:
            same |= {"image_size": self.side, "num_layers": depth, "hidden_dim": width}
            model = torchvision.models.VisionTransformer(**same, mlp_dim=4 * width, dropout=0.1)
        else:
            same |= {"img_size": self.side, "depth": depth, "embed_dim": width}
            model = timm.models.VisionTransformer(**same, pos_drop_rate=0.1, proj_drop_rate=0.1)
        self.dtype = self.half if "half" in name else torch.float32
        self.model = model.to(self.device, self.dtype)
        self.forward = torch.compile(self.model) if "compiled" in name else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.autocast = "autocast" in name

    @cached_property
    def data(self):
        """Training and test batches without end: a loader's start is not to be counted."""
        size = (self.side, self.side)
        crop = transforms.RandomResizedCrop(size, scale=(0.05, 1.0))
        return self.pil_batches(True, crop), self.pil_batches(False, transforms.Resize(size))

    def pil_batches(self, train, resize):
        normalize = transforms.Normalize((0.5,) * 3, (0.5,) * 3)
        transform = transforms.Compose([resize, transforms.ToTensor(), normalize])
        images = torchvision.datasets.CIFAR10(self.data_dir, train, transform)
        order = RandomSampler(images, replacement=True, num_samples=10**9)
        loader = DataLoader(images, self.batch, sampler=order, num_workers=2, prefetch_factor=1)
        return ((x.to(self.device), y.to(self.device)) for x, y in loader)

    def train(self, images, labels):
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.half, enabled=self.autocast):
            loss = F.cross_entropy(self.forward(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def predict(self, images):
        with torch.autocast(self.device.type, self.half, enabled=self.autocast):
            return self.forward(images).argmax(1)


if __name__ == "__main__":
    main()
