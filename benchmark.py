"""Speed and memory against what users would pick instead, as ratios measured side by side.

    python3 benchmark.py [--rows input step eval program memory startup growth] [--json FILE]

Peers, as a user would run them: timm's and torchvision's ViT-B with the same dropout, optimizer,
clipping and autocast type, and the classic input pipeline (PIL transforms in a DataLoader with two
workers). Every comparison runs its parties in turn, A B A B ..., and prints the median of the
ratios with their range. `limit` is the share of the rate of one large matrix product of the same
type, measured in the same run, that a step's floating-point operations come to.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from models.modeling import CONFIGS, VisionTransformer
from models.norms import NORM_TYPES
from train import make_optimizer, seed_step
from utils import dist_util
from utils.data_utils import Resizer, TestBatches, TrainBatches, load_dataset
from utils.precision import Precision

PEERS = {
    "ViT-B_16": ("vit_base_patch16_224", "vit_b_16"),
    "ViT-B_32": ("vit_base_patch32_224", "vit_b_32"),
}
CLASSES, SIDE = 10, 224


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rows = {
        "input": input_rows,
        "step": step_rows,
        "eval": evaluation_rows,
        "program": program_rows,
        "memory": memory_rows,
        "startup": startup_rows,
        "growth": growth_rows,
    }
    parser.add_argument(
        "--rows", nargs="+", choices=rows, default=list(rows), help="what to measure"
    )
    parser.add_argument("--models", nargs="+", choices=PEERS, default=["ViT-B_32"])
    parser.add_argument("--batch", type=int, default=32, help="images per training step")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each party")
    parser.add_argument("--dataset", default="cifar10", help="cifar10, cifar100 or digits")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)  # one memory measurement
    args = parser.parse_args()
    args.device = dist_util.init(argparse.Namespace(gpu_id="0", local_rank=-1))
    args.half = torch.float16 if args.device.type == "cuda" else torch.bfloat16
    if args.peak:
        print(peak_memory(args, *args.peak))
        return
    figures = []
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    for name in args.rows:
        for row in rows[name](args):
            figures.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


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


def in_turn(parties, args):
    """Seconds of each party's runs, {name: [args.repeats]}, after one uncounted run of each."""
    seconds = {name: [] for name in parties}
    for turn in range(args.repeats + 1):
        for name, run in parties.items():
            taken = timed(run, args.device)
            if turn:
                seconds[name].append(taken)
    return seconds


def compare(label, parties, args, **more):
    """Rows: the last party is ours; each other one's time over ours, run by run."""
    seconds = in_turn(parties, args)
    ours = list(parties)[-1]
    for name in list(parties)[:-1]:
        ratios = [theirs / own for theirs, own in zip(seconds[name], seconds[ours])]
        yield {
            "row": label,
            "ours": ours,
            "against": name,
            "times_as_fast": round(statistics.median(ratios), 3),
            "range": f"{min(ratios):.2f}..{max(ratios):.2f}",
            **{
                key: round(value(statistics.median(seconds[ours])), 3)
                for key, value in more.items()
            },
        }


@cache
def matmul_rate(dtype, device):
    """Floating-point operations per second of a 4096^3 matrix product."""
    a, b = (torch.randn(4096, 4096, device=device).to(dtype) for _ in range(2))
    return 2 * 4096**3 / statistics.median(timed(lambda: a @ b, device) for _ in range(4))


# The parties


def our_step(args, model_type, level, norm_type="LN", compiled=False, side=SIDE, batch=None):
    """One training step of ours on random images, as train.py takes it."""
    torch.manual_seed(0)
    model = VisionTransformer(CONFIGS[model_type], side, norm_type, CLASSES).to(args.device).train()
    precision = Precision(model, level, args.half)
    precision.attach(make_optimizer(argparse.Namespace(weight_decay=0.0), precision))
    rates = torch.full((10**5,), 1e-3, device=args.device)
    forward = torch.compile(model) if compiled else model
    images, labels = random_batch(args, side, batch, precision.input_dtype)

    def step():
        seed_step(0, 0)
        precision.start_step()
        with precision.autocast():
            loss = forward(images, labels)
        precision.backward(loss)
        precision.step(rates, 1.0)
        precision.records.clear()

    for _ in range(8 if norm_type == "Rescale" else 0):  # its first batches calibrate
        step()
    return step


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
    import torchvision

    return getattr(torchvision.models, PEERS[model_type][1])(num_classes=CLASSES, dropout=0.1)


def peer_step(args, library, model_type, half, compiled=False):
    model = peer(library, model_type).to(args.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    forward = torch.compile(model) if compiled else model
    images, labels = random_batch(args)

    def step():
        optimizer.zero_grad()
        with torch.autocast(args.device.type, args.half, enabled=half):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


# The rows


def pil_loader(images, batch, train, workers=2):
    """The classic pipeline: PIL, ToTensor, Normalize in a DataLoader's worker processes."""
    if train:
        resize = transforms.RandomResizedCrop((SIDE, SIDE), scale=(0.05, 1.0))
    else:
        resize = transforms.Resize((SIDE, SIDE))
    steps = [resize, transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    dataset = PilImages(images, transforms.Compose(steps))
    return DataLoader(dataset, batch, shuffle=train, num_workers=workers)


class PilImages(torch.utils.data.Dataset):
    def __init__(self, images, transform):
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), 0


def input_rows(args):
    """Images per second of the input pipeline; both parties use two cores."""
    dataset = load_dataset(args.dataset, args.data_dir)
    n = 2048

    for train in (True, False):
        images = (dataset.train_images if train else dataset.test_images)[:n]
        for dtype in (torch.float32, args.half):
            resizer = Resizer(SIDE, args.device, dtype)
            if train:
                batches = TrainBatches(dataset, 128, resizer, 0, args.device)

                def ours(batches=batches):
                    for i in range(n // 128):
                        batches(i)
            else:
                part = type(dataset)(images, images[:, 0, 0, 0], images, images[:, 0, 0, 0], [])
                batches = TestBatches(part, 128, resizer, args.device)

                def ours(batches=batches):
                    for _ in batches:
                        pass

            # The loader's start-up is not counted: its workers live as long as its iterator.
            loader = pil_loader(images.repeat(args.repeats + 2, 1, 1, 1), 128, train)
            iterator = iter(loader)

            def theirs(iterator=iterator):
                for _ in range(n // 128):
                    next(iterator)

            kind = "train" if train else "test"
            parties = {"PIL, 2 workers": theirs, f"{dtype}": ours}
            yield from compare(f"input {kind}", parties, args, images_per_s=lambda s: n / s)


def step_rows(args):
    for model_type in args.models:
        for level, half in (("O0", False), ("O2", True)):
            parties = {
                "timm": peer_step(args, "timm", model_type, half),
                "torchvision": peer_step(args, "torchvision", model_type, half),
                f"LN {level}": our_step(args, model_type, level),
            }
            yield from compare(
                f"step {model_type}", parties, args, **limit(args, parties[f"LN {level}"], half)
            )
        for level in ("O0", "O2"):
            for norm_type in NORM_TYPES:
                if norm_type != "LN":
                    parties = {
                        f"LN {level}": our_step(args, model_type, level),
                        f"{norm_type} {level}": our_step(args, model_type, level, norm_type),
                    }
                    yield from compare(f"step {model_type}", parties, args)
        parties = {
            "timm compiled": peer_step(args, "timm", model_type, True, compiled=True),
            "LN O2 compiled": our_step(args, model_type, "O2", compiled=True),
            "LN O2": our_step(args, model_type, "O2"),
        }
        yield from compare(f"step {model_type}", parties, args)


def limit(args, step, half):
    """For `compare`: the share of the matrix-product rate that `step` comes to."""
    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    rate = matmul_rate(args.half if half else torch.float32, args.device)
    return {"limit": lambda seconds: flops / seconds / rate}


def evaluation_rows(args):
    for model_type in args.models:
        model = VisionTransformer(CONFIGS[model_type], SIDE, "LN", CLASSES).to(args.device).eval()
        ours_half = Precision(model, "O2", args.half)
        theirs = peer("timm", model_type).to(args.device).to(args.half).eval()
        images, _ = random_batch(args, batch=128, dtype=ours_half.input_dtype)

        @torch.inference_mode()
        def evaluate(model, images=images):
            model(images)

        parties = {"timm": lambda m=theirs: evaluate(m), "LN half": lambda m=model: evaluate(m)}
        yield from compare(
            f"evaluation {model_type}", parties, args, images_per_s=lambda s: 128 / s
        )


def program_rows(args):
    """Input, steps and evaluation in the reference's proportion: 100 steps of 128 to 10,000 test
    images, scaled down to 2 steps of `batch`."""
    dataset = load_dataset(args.dataset, args.data_dir)
    tested = round(2 * args.batch * 10000 / 12800)
    for model_type in args.models:
        step = our_program(args, model_type, dataset, tested)
        parties = {"PIL + timm fp32": pil_program(args, model_type, dataset, tested), "O2": step}
        yield from compare(f"program {model_type}", parties, args)


def our_program(args, model_type, dataset, tested):
    torch.manual_seed(0)
    model = VisionTransformer(CONFIGS[model_type], SIDE, "LN", CLASSES).to(args.device)
    precision = Precision(model, "O2", args.half)
    precision.attach(make_optimizer(argparse.Namespace(weight_decay=0.0), precision))
    rates = torch.full((10**5,), 1e-3, device=args.device)
    resizer = Resizer(SIDE, args.device, precision.input_dtype)
    batches = TrainBatches(dataset, args.batch, resizer, 0, args.device)
    labels = dataset.test_labels[:tested]
    part = type(dataset)(dataset.train_images, [], dataset.test_images[:tested], labels, [])
    test_batches = TestBatches(part, 128, resizer, args.device)

    def program():
        model.train()
        for i in range(2):
            precision.start_step()
            precision.backward(model(*batches(i)))
            precision.step(rates, 1.0)
        precision.read()
        with torch.inference_mode():
            model.eval()
            sum((model(x)[0].argmax(1) == y).sum() for x, y in test_batches).item()

    return program


def pil_program(args, model_type, dataset, tested):
    model = peer("timm", model_type).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    rounds = args.repeats + 2
    train = iter(pil_loader(dataset.train_images[: 2 * args.batch * rounds], args.batch, True))
    test = pil_loader(dataset.test_images[:tested], 128, False)

    def program():
        model.train()
        for _ in range(2):
            images, labels = next(train)
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(args.device)), labels.to(args.device)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            model.eval()
            sum((model(x.to(args.device)).argmax(1).cpu() == y).sum() for x, y in test).item()

    return program


def memory_rows(args):
    """Peak memory of three training steps, each kind in a process of its own."""
    for model_type in args.models:
        peaks = {
            kind: child_peak(args, model_type, kind) for kind in ("ours O0", "ours O2", "timm half")
        }
        for kind, peak in peaks.items():
            yield {
                "row": f"memory {model_type}",
                "kind": kind,
                "GiB": round(peak / 2**30, 3),
                "of_O0": round(peak / peaks["ours O0"], 3),
            }


def child_peak(args, model_type, kind):
    command = [sys.executable, __file__, "--batch", str(args.batch), "--peak", model_type]
    return int(subprocess.check_output([*command, *kind.split()], text=True))


def peak_memory(args, model_type, party, kind):
    """Bytes at the peak beyond those of the imported packages."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if party == "timm":
        step = peer_step(args, "timm", model_type, half=True)
    else:
        step = our_step(args, model_type, kind)
    for _ in range(3):
        step()
    if args.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def startup_rows(args):
    """Seconds from the command to the end of the first step, of a model that takes none itself."""
    command = [
        sys.executable,
        "train.py",
        "--name",
        "startup",
        "--dataset",
        "digits",
        "--overwrite",
    ]
    command += "--model_type ViT-Ti_16 --img_size 16 --train_batch_size 1 --num_steps 1".split()
    parties = {
        "import torch": [sys.executable, "-c", "import torch"],
        "train.py, 1 step": command,
    }
    runs = {name: lambda c=c: subprocess.run(c, capture_output=True) for name, c in parties.items()}
    yield from compare("start-up", runs, args)


def growth_rows(args):
    """Step time against tokens, depth x width, and batch, in units of a B_32 step at 224."""
    base = our_step(args, "ViT-B_32", "O2")
    cases = [("ViT-B_32", side, args.batch) for side in (32, 96, 160, 224, 384)]
    cases += [("ViT-B_32", 224, batch) for batch in (8, 16, 64)]
    cases += [(name, 224, args.batch) for name in ("ViT-Ti_16", "ViT-S_16", "ViT-B_16", "ViT-L_32")]
    for model_type, side, batch in cases:
        step = our_step(args, model_type, "O2", side=side, batch=batch)
        with FlopCounterMode(display=False) as counter:
            step()
        label = f"growth {model_type} at {side}, batch {batch}"
        more = {"TFLOP": lambda s, c=counter: c.get_total_flops() / 1e12}
        yield from compare(label, {"B_32 at 224": base, "this": step}, args, **more)


if __name__ == "__main__":
    main()
