"""A run that is killed at any moment and resumed ends as one never interrupted, bit for bit.

Most runs are of models cut to two blocks, in forks of one process; the first test of each section
is the real command.
"""

import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import Forks
from programs import ROOT, TINY, environment, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.norms import NORM_TYPES
from utils.precision import LEVELS

# 6 steps an epoch, its last batch shorter; saves and evaluations fall together at 12 only, and at
# the end. Batches are of 120 and, last in the epoch, 117 images.
RUN = TINY + (
    "--train_batch_size 240 --gradient_accumulation_steps 2 --num_steps 16 --eval_every 4"
    " --save_every 3 --log_every 2 --eval_batch_size 100"
).split()
RESUME = RUN + ["--resume"]
CURVES = "train/loss train/lr train/grad_norm train/loss_scale test/loss test/accuracy".split()
DIES = -signal.SIGKILL

MID_WINDOW = "at(precision.Precision, 'step', {})"
HALF_WRITTEN = "at(checkpoint._HashingFile, 'write', 9)"
BEFORE_RENAME = "at(os, 'replace', where=lambda source, *_: '_step_{}.' in str(source))"
AFTER_RENAME = BEFORE_RENAME.replace("where", "after=True, where")
IN_EVALUATION = "at(train.F, 'cross_entropy', {}, where=lambda *_: not torch.is_grad_enabled())"
BEFORE_SAVE = "at(train, 'save_run', where=lambda files, precision, run, args: run['step'] == {})"


@pytest.fixture(scope="module")
def forks():
    with Forks("shrink()") as forks:
        yield forks


@pytest.fixture(scope="module")
def reference(forks, tmp_path_factory):
    """What a never interrupted run with further `flags` left; made once for each flags."""
    made = {}

    def reference(flags=""):
        if flags not in made:
            folder = tmp_path_factory.mktemp("reference")
            forks.run(RUN + flags.split(), folder)
            made[flags] = left(folder)
        return made[flags]

    return reference


def left(folder):
    """All that the one run in `folder` left, as comparable values without the times in it."""
    output = Path(folder, "output")
    assert not [*output.glob("*.part"), *output.glob("*.lock"), *output.glob("*.tmp")]
    (log,) = output.glob("*.txt")
    (curves,) = Path(folder, "logs").iterdir()
    steps = sorted(output.glob("*_step_*.bin"))
    return {
        "weights": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(output.glob("*.bin"))
            if path not in steps
        },
        "to go on from": {path.name: checkpoint(path) for path in steps},
        "log": messages(log),
        "curves": scalars(curves),
    }


def checkpoint(path):
    """A checkpoint's content, tensors as bytes."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return value.dtype, value.shape, hashlib.sha256(content).hexdigest()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k != "seconds"}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(torch.load(path, weights_only=True))


def messages(log):
    """A log's lines without their times, nor those that tell of interruptions."""
    lines = (re.sub(r"^\S+ \S+ - ", "", line) for line in log.read_text().splitlines())
    told = re.compile(r"INFO - train - (Resumed from|Stopped|last|.*; going on from)")
    return [
        re.sub(r"resume='?\w+'?", "", line) for line in lines if not told.match(line)
    ]


def scalars(folder):
    """{tag: [(step, value), ...]} as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in CURVES}


def assert_same(folder, reference):
    found = left(folder)
    for kind, value in reference.items():
        assert found[kind] == value, kind


def steps(folder):
    """The steps that the run in `folder` can go on from."""
    names = (path.name for path in Path(folder, "output").glob("*_step_*.bin"))
    return sorted(int(re.search(r"_step_(\d+)\.bin", name)[1]) for name in names)


def start(args, folder):
    """The real command in the background."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args],
        cwd=folder,
        env=environment(),
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


# Kill -9


def test_real_command_killed_and_repeated(tmp_path):
    """The command itself, at full depth: killed from outside once, SIGTERM once, then let go on."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    run(RUN, whole)

    first = start(RESUME, broken)  # nothing there yet: it starts at the beginning
    wait_for(broken, "output/*_step_3.bin", first)
    first.kill()
    assert first.wait(60) == DIES
    second = start(RESUME, broken)
    wait_for(broken, "output/*_step_9.bin", second)
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 143
    assert "--resume continues" in second.stderr.read()
    run(RESUME, broken)
    assert_same(broken, left(whole))

    again = run(RESUME, broken)
    assert again.stdout.endswith(".txt is finished: nothing to do\n") and not again.stderr
    assert_same(broken, left(whole))


@pytest.mark.parametrize("level", ["none", *LEVELS[1:]])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_killed_at_six_points(forks, reference, tmp_path, norm_type, level):
    """One run that dies again and again. With Rescale, step 4 has the last 2 calibration batches of
    8, and step 3 the 2 before them."""
    flags = f"--norm_type {norm_type}"
    flags += f" --fp16 --fp16_opt_level {level}" if level != "none" else ""
    for setup, newest in [
        (MID_WINDOW.format(4), 3),
        (HALF_WRITTEN, 3),
        (BEFORE_RENAME.format(6), 3),
        (AFTER_RENAME.format(6), 6),
        (IN_EVALUATION.format(2), 6),  # the second batch of four, at step 8
        (BEFORE_SAVE.format(12), 9),  # its evaluation is over, the best weights are saved
    ]:
        assert forks.run(RESUME + flags.split(), tmp_path, setup, check=False).returncode == DIES
        assert steps(tmp_path)[-1] == newest, setup
    forks.run(RESUME + flags.split(), tmp_path)
    assert_same(tmp_path, reference(flags))
