"""Speed and memory against what users would pick instead, as ratios measured side by side.

    python3 benchmark.py [--rows input step ...] [--models ViT-B_32 ViT-B_16] [--json FILE]

Peers, as a user would run them: timm's and torchvision's ViT-B with the same dropout, optimizer,
clipping and autocast type, and the classic input pipeline (PIL transforms in a DataLoader with two
workers). The parties of a row, each in a process of its own, run in turn, A B A B ...; `ratio` is
the median of the other party's times over that of ours, `range` that of the turns' own ratios.
`limit` is the share of the rate of one large matrix product of the same type, taken in turn with
the rest and by the faster of PyTorch's two libraries on a CPU, that our floating-point operations
come to.
"""

import argparse
import json
import math
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
from torchvision import models, transforms

from models.configs import CONFIGS, vit_config
from models.layers import linear, packed_weights
from models.modeling import VisionTransformer
from models.norms import EPS, NORM_TYPES, AddBias, PreNorm
from train import make_optimizer, seed_step
from utils import dist_util
from utils.data_utils import Resizer, TestBatches, TrainBatches, load_dataset
from utils.precision import Precision, StepRecord
from utils.run_logger import RunLogger

PEERS = {
    "ViT-B_32": ("vit_base_patch32_224", "vit_b_32"),
    "ViT-B_16": ("vit_base_patch16_224", "vit_b_16"),
}
CLASSES, SIDE = 10, 224
UNCOUNTED = 2  # turns before those that count
PRODUCT, PRODUCTS = 4096, 4  # rows and columns of the matrices of `limit`; products of a turn
IMAGES, INPUT_BATCH = 4096, 128  # of a turn of the input's rows
EVALUATED = 128  # images of a turn of the evaluation's rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure")
    add("--models", nargs="+", choices=PEERS, default=list(PEERS))
    add("--levels", nargs="+", choices=("O0", "O2"), default=["O0", "O2"], help="of steps, norms")
    add("--batch", type=int, default=32, help="images per training step")
    add("--repeats", type=int, default=5, help="counted turns")
    add("--dataset", default="cifar10", help="cifar10, cifar100 or digits")
    add("--data_dir", default="data")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--peak", metavar="JSON", help=argparse.SUPPRESS)  # one measurement of memory
    args = parser.parse_args()
    args.device = dist_util.init(argparse.Namespace(gpu_id="0", local_rank=-1))
    args.half = torch.float16 if args.device.type == "cuda" else torch.bfloat16
    if args.peak:
        print(peak_memory(args, **json.loads(args.peak)))
        return
    figures = []
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    for name in args.rows:
        for row in ROWS[name](args):
            figures.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if args.json:  # after each row: a benchmark cut short leaves what it has
                Path(args.json).write_text(json.dumps(figures, indent=1))


# Measuring


def timed(run, device):
    """Seconds that run() takes, the device's work included."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Party:
    """A process that calls make(), and whenever asked, times the function that this returned.

    So each has its allocator and its caches to itself, as its user would have it.
    """

    def __init__(self, make, device):
        spawning = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawning.Pipe()
        self.process = spawning.Process(target=self._serve, args=(theirs, make, device))
        self.process.start()
        theirs.close()

    @staticmethod
    def _serve(pipe, make, device):
        run = make()
        while (question := pipe.recv()) != "stop":
            pipe.send(timed(run, device) if question == "seconds" else count_flops(run))

    def ask(self, question):
        """`seconds` or `flops` of one more run."""
        self.pipe.send(question)
        return self.pipe.recv()

    def stop(self):
        self.pipe.send("stop")
        self.process.join()


def in_turn(makes, args, counted=None):
    """Seconds of each party's runs, {name: [args.repeats]}, after two uncounted runs of each.

    makes: {name: a function that returns what is to be run}. Also the floating-point operations of
    the party called `counted`.
    """
    parties = {name: Party(make, args.device) for name, make in makes.items()}
    try:
        seconds = {name: [] for name in parties}
        for turn in range(UNCOUNTED + args.repeats):
            for name, party in parties.items():
                taken = party.ask("seconds")
                if turn >= UNCOUNTED:
                    seconds[name].append(taken)
                if "PIL" in name:
                    time.sleep(1)  # its workers fill their queue: not in others' time
        return seconds, parties[counted].ask("flops") if counted else None
    finally:
        for party in parties.values():
            party.stop()


def product(args, dtype, multiply):
    dist_util.keep_freed_memory()
    a, b = (torch.randn(PRODUCT, PRODUCT, device=args.device).to(dtype) for _ in range(2))
    return lambda: [multiply(a, b) for _ in range(PRODUCTS)]


def compare(label, makes, args, limit=None, **more):
    """One row per party but the last, which is ours: the other's time over ours.

    limit: a type; adds our share of its matrix-product rate. more: name=function(our seconds).
    """
    ours = list(makes)[-1]
    if limit:
        products = {f.__name__: partial(product, args, limit, f) for f in (torch.matmul, linear)}
        seconds, flops = in_turn(products | makes, args, counted=ours)
        rate = PRODUCTS * 2 * PRODUCT**3 / min(statistics.median(seconds.pop(f)) for f in products)
        more["limit"] = lambda s: flops / s / rate
    else:
        seconds, _ = in_turn(makes, args)
    own = statistics.median(seconds[ours])
    extra = {key: shorter(f(own)) for key, f in more.items()}
    for name in list(makes)[:-1]:
        ratios = [theirs / mine for theirs, mine in zip(seconds[name], seconds[ours])]
        yield {
            "row": label,
            "ours": ours,
            "against": name,
            "ratio": shorter(statistics.median(seconds[name]) / own),
            "range": f"{min(ratios):.3g}..{max(ratios):.3g}",
            **extra,
        }


def shorter(number):
    return float(f"{number:.3g}")


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def linear_flops(x_shape, weight_shape, *_, **__):
    return 2 * math.prod(x_shape) * weight_shape[0]


def count_flops(run):
    """Floating-point operations of run(): two for each multiply-add of its matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# The parties


NORM_TYPES["LN, all tokens"] = PreNorm(  # with its last block computed for all, as BN's and GN's
    partial(nn.LayerNorm, eps=EPS), per_token=lambda block: False
)


def our_model(args, config, norm_type="LN", side=SIDE):
    dist_util.keep_freed_memory()  # as train.py does
    torch.manual_seed(0)
    model = VisionTransformer(config, side, norm_type, CLASSES).to(args.device)
    for module in model.modules():
        if isinstance(module, AddBias):
            module._set_calls(AddBias.CALIBRATION_CALLS)  # the state of all steps but 8
    return model


def our_step(args, config, level, norm_type="LN", side=SIDE, compiled=False, checkpointing=False):
    """One training step of ours on random images, as train.py takes it."""
    model = our_model(args, config, norm_type, side).train()
    model.transformer.encoder.grad_checkpointing = checkpointing
    take, precision = stepper(args, model, level, torch.compile(model) if compiled else model)
    images, labels = random_batch(args, side, dtype=precision.input_dtype)
    return lambda: take(images, labels)


def stepper(args, model, level, forward):
    """step(images, labels) as in train.py, and its Precision."""
    precision = Precision(model, level, args.half)
    precision.attach(make_optimizer(argparse.Namespace(weight_decay=0.0), precision))
    rates = torch.full((10**5,), 1e-3, device=args.device)

    def step(images, labels):
        seed_step(0, 0)
        precision.start_step()
        with precision.autocast():
            loss = forward(images, labels)
        precision.backward(loss)
        precision.step(rates, 1.0)
        precision.records.clear()

    return step, precision


def random_batch(args, side=SIDE, batch=None, dtype=torch.float32):
    batch = batch or args.batch
    images = torch.randn(batch, 3, side, side, device=args.device).to(dtype)
    return images, torch.randint(CLASSES, (batch,), device=args.device)


def peer(library, model_type):
    """timm's or torchvision's model of the same size, with dropout 0.1 where ours has it."""
    if library == "timm":
        import timm

        name, drop = PEERS[model_type][0], 0.1
        return timm.create_model(name, num_classes=CLASSES, pos_drop_rate=drop, proj_drop_rate=drop)
    return getattr(models, PEERS[model_type][1])(num_classes=CLASSES, dropout=0.1)


def peer_step(args, library, model_type, half, compiled=False):
    model = peer(library, model_type).to(args.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    forward = torch.compile(model) if compiled else model
    images, labels = random_batch(args)
    return lambda: plain_step(args, model, forward, optimizer, images, labels, half)


def plain_step(args, model, forward, optimizer, images, labels, half):
    optimizer.zero_grad()
    with torch.autocast(args.device.type, args.half, enabled=half):
        loss = F.cross_entropy(forward(images), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class PilImages(Dataset):
    def __init__(self, images, train):
        crop = transforms.RandomResizedCrop((SIDE, SIDE), scale=(0.05, 1.0))
        resize = crop if train else transforms.Resize((SIDE, SIDE))
        norm = transforms.Normalize((0.5,) * 3, (0.5,) * 3)
        self.transform = transforms.Compose([resize, transforms.ToTensor(), norm])
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), 0


def pil_loader(images, batch, train):
    """The classic pipeline: PIL, ToTensor, Normalize in a DataLoader's worker processes."""
    dataset = PilImages(images, train)
    return DataLoader(dataset, batch, shuffle=train, num_workers=2, prefetch_factor=1)


def part_of(dataset, n):
    return type(dataset)(
        dataset.train_images[:n],
        dataset.train_labels[:n],
        dataset.test_images[:n],
        dataset.test_labels[:n],
        dataset.classes,
    )


# The rows


def input_rows(args):
    """The input pipeline; each party has the same two cores."""
    for train in (True, False):
        for dtype in (torch.float32, args.half):
            makes = {
                "PIL, 2 workers": partial(pil_input, args, train),
                "fp32" if dtype == torch.float32 else "half": partial(
                    our_input, args, train, dtype
                ),
            }
            label = f"input, {'train' if train else 'test'}"
            yield from compare(label, makes, args, images_per_s=lambda s: IMAGES / s)


def pil_input(args, train):
    dataset = load_dataset(args.dataset, args.data_dir)
    images = (dataset.train_images if train else dataset.test_images)[:IMAGES]
    # The loader's start is not counted: one iterator serves all turns.
    loader = iter(
        pil_loader(images.repeat(args.repeats + UNCOUNTED + 1, 1, 1, 1), INPUT_BATCH, train)
    )
    return lambda: [next(loader) for _ in range(IMAGES // INPUT_BATCH)] and None


def our_input(args, train, dtype):
    dist_util.keep_freed_memory()  # as train.py does
    dataset = part_of(load_dataset(args.dataset, args.data_dir), IMAGES)
    resizer = Resizer(SIDE, args.device, dtype)
    train_batches = TrainBatches(dataset, INPUT_BATCH, resizer, 0, args.device)
    test_batches = TestBatches(dataset, INPUT_BATCH, resizer, args.device)

    def run():
        for _ in map(train_batches, range(IMAGES // INPUT_BATCH)) if train else test_batches:
            pass

    return run


def step_rows(args):
    """Training steps against timm's and torchvision's."""
    for model_type in args.models:
        for level in args.levels:
            half = level == "O2"
            makes = {
                "timm": partial(peer_step, args, "timm", model_type, half),
                "torchvision": partial(peer_step, args, "torchvision", model_type, half),
                f"LN {level}": partial(our_step, args, CONFIGS[model_type], level),
            }
            yield from compare(f"step, {model_type}", makes, args, dtype_of(level, args))


def dtype_of(level, args):
    return args.half if level == "O2" else torch.float32


def compiled_rows(args):
    for model_type in args.models:
        config = CONFIGS[model_type]
        makes = {
            "timm compiled": partial(peer_step, args, "timm", model_type, True, compiled=True),
            "LN O2 compiled": partial(our_step, args, config, "O2", compiled=True),
            "LN O2": partial(our_step, args, config, "O2"),
        }
        yield from compare(f"step, {model_type}", makes, args, args.half)


def profile_rows(args):
    """The operations that take a hundredth or more of a training step's time in them."""
    if args.device.type != "cpu":
        return
    for model_type in args.models:
        step = our_step(args, CONFIGS[model_type], "O2")
        for _ in range(UNCOUNTED + 1):
            step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        for name in sorted(times, key=times.get, reverse=True):
            if times[name] >= 0.01 * sum(times.values()):
                share = shorter(times[name] / sum(times.values()))
                yield {"row": f"profile, {model_type} O2", "operation": name, "share": share}


def norm_rows(args):
    """Norm types against LN."""
    for model_type in args.models:
        for level in args.levels:
            for other in [name for name in NORM_TYPES if name != "LN"]:
                makes = {
                    f"{name} {level}": partial(our_step, args, CONFIGS[model_type], level, name)
                    for name in (other, "LN")
                }
                label = f"norm types, {model_type}"
                yield from compare(label, makes, args, dtype_of(level, args))


def evaluation_rows(args):
    for model_type in args.models:
        makes = {
            "timm": partial(timm_evaluation, args, model_type),
            "LN half": partial(our_evaluation, args, model_type),
        }
        label = f"evaluation, {model_type}"
        images_per_s = {"images_per_s": lambda s: EVALUATED / s}
        yield from compare(label, makes, args, args.half, **images_per_s)


def timm_evaluation(args, model_type):
    model = peer("timm", model_type).to(args.device, args.half).eval()
    images, _ = random_batch(args, batch=EVALUATED, dtype=args.half)
    return torch.inference_mode()(lambda: model(images))


def our_evaluation(args, model_type):
    model = our_model(args, CONFIGS[model_type]).eval()
    precision = Precision(model, "O2", args.half)
    images, _ = random_batch(args, batch=EVALUATED, dtype=precision.input_dtype)
    packing = packed_weights(model)  # train.py packs them once for 10,000 images
    packing.__enter__()
    return torch.inference_mode()(lambda packing=packing: model(images))


def program_rows(args):
    """Input, steps and evaluation in the reference's proportion, 100 steps of 128 to 10,000 test
    images, scaled down to two steps."""
    for model_type in args.models:
        makes = {
            "PIL + timm fp32": partial(pil_program, args, model_type),
            "O2": partial(our_program, args, model_type),
        }
        yield from compare(f"program, {model_type}", makes, args, args.half)


def tested_images(args):
    return 2 * args.batch * 10000 // 12800


def our_program(args, model_type):
    dataset = load_dataset(args.dataset, args.data_dir)
    tested = part_of(dataset, tested_images(args))
    model = our_model(args, CONFIGS[model_type])
    step, precision = stepper(args, model, "O2", model)
    resizer = Resizer(SIDE, args.device, precision.input_dtype)
    batches = TrainBatches(dataset, args.batch, resizer, 0, args.device)
    test_batches = TestBatches(tested, 128, resizer, args.device)

    def program():
        model.train()
        for i in range(2):
            step(*batches(i))
        model.eval()
        with torch.inference_mode(), packed_weights(model):
            sum((model(x)[0].argmax(1) == y).sum() for x, y in test_batches).item()

    return program


def pil_program(args, model_type):
    dataset = load_dataset(args.dataset, args.data_dir)
    model = peer("timm", model_type).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    count = 2 * args.batch * (args.repeats + UNCOUNTED + 1)
    train = iter(pil_loader(dataset.train_images[:count], args.batch, True))
    test = pil_loader(dataset.test_images[: tested_images(args)], 128, False)

    def program():
        model.train()
        for _ in range(2):
            images, labels = (t.to(args.device) for t in next(train))
            plain_step(args, model, model, optimizer, images, labels, half=False)
        model.eval()
        with torch.no_grad():
            sum((model(x.to(args.device)).argmax(1).cpu() == y).sum() for x, y in test).item()

    return program


def memory_rows(args):
    """Peak memory of two training steps, each kind in a process of its own."""
    for model_type in args.models:
        kinds = {
            "O0": {"level": "O0"},
            "O2": {"level": "O2"},
            "O2, --grad_checkpointing": {"level": "O2", "checkpointing": True},
            "timm half": {"library": "timm"},
        }
        peaks = {name: child_peak(args, model_type, **kind) for name, kind in kinds.items()}
        for name, peak in peaks.items():
            yield {
                "row": f"peak memory, {model_type}",
                "kind": name,
                "GiB": shorter(peak / 2**30),
                "ratio": shorter(peak / peaks["O0"]),
            }


def child_peak(args, model_type="ViT-B_32", **kind):
    what = json.dumps({"model_type": model_type} | kind)
    command = [sys.executable, __file__, "--batch", str(args.batch), "--peak", what]
    return int(subprocess.check_output(command, text=True))


def peak_memory(args, model_type, library=None, sizes=None, batch=None, **how):
    """Bytes at the peak of two training steps, beyond those of the imported packages."""
    args.batch = batch or args.batch
    before = highest_resident()
    if library:
        step = peer_step(args, library, model_type, half=True)
    else:
        step = our_step(args, vit_config(*sizes) if sizes else CONFIGS[model_type], **how)
    for _ in range(2):
        step()
    if args.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return highest_resident() - before


def highest_resident():
    """Bytes of this process's memory at its peak; getrusage would tell its parent's too."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def startup_rows(args):
    """From the command to the end of a first step that takes next to nothing itself."""
    train = Path(__file__).with_name("train.py")
    command = f"{train} --name startup --dataset digits --overwrite --model_type ViT-Ti_16"
    command += " --img_size 16 --train_batch_size 1 --num_steps 1 --eval_batch_size 360"
    parties = {"python train.py": command.split(), "import torch": ["-c", "import torch"]}
    makes = {name: partial(command_run, arguments) for name, arguments in parties.items()}
    yield from compare("start-up", makes, args)


def command_run(arguments):
    folder = tempfile.TemporaryDirectory()  # gone with the process

    def run():
        command = [sys.executable, *arguments]
        subprocess.run(command, cwd=folder.name, check=True, capture_output=True)

    return run


def overhead_rows(args):
    """Input and logging as shares of the training step that they serve."""
    for model_type in args.models:
        makes = {
            "input": partial(one_batch, args),
            "logging": partial(one_record, args),
            "LN O2": partial(our_step, args, CONFIGS[model_type], "O2"),
        }
        yield from compare(f"share of a step, {model_type}", makes, args)


def one_batch(args):
    dist_util.keep_freed_memory()  # as train.py does
    dataset = load_dataset(args.dataset, args.data_dir)
    resizer = Resizer(SIDE, args.device, args.half)
    batches = TrainBatches(dataset, args.batch, resizer, 0, args.device)
    return lambda: batches(0)


def one_record(args):
    folder = tempfile.TemporaryDirectory()
    log = RunLogger(Path(folder.name, "log.txt"), Path(folder.name, "tb"), True, None)
    record = StepRecord(1, True, 2.3, 1.0, 1.0, 0.01)
    return lambda folder=folder: log.log_steps([record], 100.0)


def growth_rows(args):
    """Step time and memory against tokens, depth, width and batch; the exponents of fitted powers.

    The start is ViT-B_32 at 224 (50 tokens) with `--batch` images, at O2.
    """
    series = {
        "tokens": [
            ({"side": side}, (side // 32) ** 2 + 1) for side in (32, 96, 160, 224, 288, 384)
        ],
        "depth": [({"sizes": (32, 768, n, 12, 3072)}, n) for n in (3, 6, 12, 24)],
        "width": [({"sizes": (32, d, 12, d // 64, 4 * d)}, d) for d in (192, 384, 768, 1024)],
        "batch": [({"batch": n}, n) for n in (4, 8, 16, 32, 64)],
    }
    for label, cases in series.items():
        rows = []
        for case, x in cases:
            case = dict(case)
            here = argparse.Namespace(**vars(args) | {"batch": case.pop("batch", args.batch)})
            config = vit_config(*case.get("sizes", (32, 768, 12, 12, 3072)))
            step = partial(our_step, here, config, "O2", side=case.get("side", SIDE))
            seconds, flops = in_turn({"step": step}, here, counted="step")
            peak = child_peak(here, level="O2", **case)
            rows.append((x, statistics.median(seconds["step"]), peak, flops))
        table = np.array(rows)
        for x, seconds, peak, flops in table:
            yield {
                "row": f"growth, {label} {x:.0f}",
                "TFLOP": shorter(flops / 1e12),
                "time": shorter(seconds / table[-1, 1]),
                "memory": shorter(peak / table[-1, 2]),
            }
        powers = [np.polyfit(np.log(table[-3:, 0]), np.log(table[-3:, i]), 1)[0] for i in (1, 2)]
        yield {
            "row": f"growth, {label}, power fitted to the last three",
            "time": shorter(powers[0]),
            "memory": shorter(powers[1]),
        }


def cost_rows(args):
    """Floating-point operations of the reference's recipe, counted on no device at all: 20,000
    steps of 128 images, and 200 evaluations of 10,000."""
    for name in [n for n in CONFIGS if n.endswith(("16", "32", "14"))]:
        with torch.device("meta"):
            model = VisionTransformer(CONFIGS[name], SIDE, "LN", CLASSES)
            images, labels = torch.empty(2, 3, SIDE, SIDE), torch.zeros(2, dtype=torch.long)
        train = count_flops(lambda: model(images, labels).backward()) / 2  # noqa: B023
        test = count_flops(lambda: model.eval()(images)) / 2  # noqa: B023
        yield {
            "row": f"cost, {name}",
            "training_PFLOP": shorter(train * 20000 * 128 / 1e15),
            "evaluation_PFLOP": shorter(test * 200 * 10000 / 1e15),
            "minutes_at_100_TFLOP_per_s": shorter(
                (train * 20000 * 128 + test * 200 * 10000) / 1e14 / 60
            ),
        }


ROWS = {
    "input": input_rows,
    "overhead": overhead_rows,
    "startup": startup_rows,
    "step": step_rows,
    "profile": profile_rows,
    "norms": norm_rows,
    "evaluation": evaluation_rows,
    "program": program_rows,
    "memory": memory_rows,
    "compiled": compiled_rows,
    "growth": growth_rows,
    "cost": cost_rows,
}

if __name__ == "__main__":
    main()
