"""Runs that are killed, stopped or given a fault, and what they leave: for several test files."""

import hashlib
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from programs import ROOT, TINY, environment, scalars

# 6 steps an epoch, the last batch of it shorter. Saves and evaluations fall together at step 12 and
# at the end, 16.
RUN = [
    *TINY,
    *"--train_batch_size 240 --gradient_accumulation_steps 2 --num_steps 16".split(),
    *"--eval_every 4 --save_every 3 --log_every 2 --eval_batch_size 100".split(),
]
RESUME = [*RUN, "--resume"]
CURVES = "train/loss train/lr train/grad_norm train/loss_scale test/loss test/accuracy".split()
KILLED = -9

# Where a run is killed: setups for forks.py
IN_STEP = "at(precision.Precision, 'update', {})\n"  # the n-th of this process
HALF_WRITTEN = """
def cut():
    (part,) = __import__("pathlib").Path("output").glob("*_step_*.part")
    os.truncate(part, part.stat().st_size // 2)
    die()
at(os, "fsync", do=cut, where=lambda file: "_step_" in os.readlink(f"/proc/self/fd/{file}"))
"""
BEFORE_RENAME = "at(os, 'replace', where=lambda source, *_: '_step_{}.' in str(source))\n"
AFTER_RENAME = BEFORE_RENAME.replace("where", "after=True, where")
IN_EVALUATION = (
    "at(torch.nn.functional, 'cross_entropy', 2, where=lambda *_: not torch.is_grad_enabled())\n"
)
BEFORE_SAVE = "at(train, 'save_run', where=lambda files, precision, run, args: run['step'] == {})\n"

# The loss of the steps in {} is infinite; the first step is 0.
OVERFLOW = """
seed_step, backward = train.seed_step, precision.Precision.backward
def seeded(seed, step):
    precision.step = step
    seed_step(seed, step)
def overflowing(self, loss, parts=1):
    backward(self, loss * (float("inf") if precision.step in {} else 1), parts)
train.seed_step, precision.Precision.backward = seeded, overflowing
"""


def left(folder):
    """All that the one run in `folder` left, as comparable values without the times in it."""
    output = Path(folder, "output")
    assert not [*output.glob("*.part"), *output.glob("*.tmp")]
    (log,) = output.glob("*.txt")
    (events,) = (path for path in Path(folder, "logs").iterdir() if path.is_dir())
    curves = scalars(events)
    checkpoints = sorted(output.glob("*_step_*.bin"))
    weights = set(output.glob("*.bin")).difference(checkpoints)
    return {
        "weights": {path.name: digest(path.read_bytes()) for path in weights},
        "checkpoints": {path.name: content(path) for path in checkpoints},
        "log": lines(log),
        "curves": {tag: curves[tag] for tag in CURVES},
    }


def digest(data):
    return hashlib.sha256(data).hexdigest()


def plain(value):
    """A checkpoint's content without times and the log, tensors as digests of their bytes."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return value.dtype, value.shape, digest(data)
    if isinstance(value, dict):
        left_out = re.compile("seconds|log$")
        return {k: plain(v) for k, v in value.items() if not left_out.match(str(k))}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def content(path):
    return plain(torch.load(path, weights_only=True))


def lines(log):
    """A log's lines without times and what may change, nor those that tell of interruptions."""
    text = re.sub(r"^\d\S+ \d\S+ - ", "", log.read_text(), flags=re.M)
    text = re.sub(
        r" (resume|stop_after|deterministic|log_signal)=[^,)]*| commit \S+$", "", text, flags=re.M
    )
    told = re.compile(
        r"INFO - train - (Resumed from |Stopped |last |Training speed|--fp16 |.*; passed over)"
    )
    return [line for line in text.splitlines() if not re.match(told, line)]


def assert_same(folder, reference):
    """Asserts that the run in `folder` left what `reference`, of left(), says."""
    found = left(folder)
    for kind, value in reference.items():
        assert found[kind] == value, kind


def steps(folder):
    """The steps whose checkpoints are in `folder` or below."""
    names = (path.name for path in Path(folder).rglob("*_step_*.bin"))
    return sorted(int(re.search(r"_step_(\d+)\.bin", name)[1]) for name in names)


def start(args, folder, env=None):
    """The real command in the background."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args],
        cwd=folder,
        env=environment(env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(folder, pattern, process, seconds=120):
    """Waits till a file of that pattern is in `folder`."""
    deadline = time.monotonic() + seconds
    while not next(Path(folder).glob(pattern), None):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"no {pattern} after {seconds} s"
        time.sleep(0.01)
