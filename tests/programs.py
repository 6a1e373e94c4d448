"""Runs the repository's programs as their user does."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("RESCALEVIT_DATA", ROOT / "data"))  # where the real CIFAR is
# A whole run in seconds: 1,437 training images, two evaluations. A flag given again wins.
TINY = (
    "--name tiny --dataset digits --model_type ViT-Ti_16 --img_size 16 --train_batch_size 16"
    " --learning_rate 0.02 --warmup_steps 5 --num_steps 12 --eval_every 6"
).split()


def environment(env=None):
    """This process's environment with `env` on top; one thread unless it says otherwise."""
    return {"OMP_NUM_THREADS": "1", **os.environ, **(env or {})}


def run(args, cwd, check=True, env=None, timeout=300, program="train.py", **kwargs):
    """Runs a program of the repository in the folder `cwd`; `check`: it must exit with 0."""
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *args],
        cwd=cwd,
        env=environment(env),
        timeout=timeout,
        capture_output=True,
        text=True,
        **kwargs,
    )
    assert not check or done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done


def call(main, *args):
    """Runs a program's main() with `args` in this process, which saves its start-up."""
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    on_broken_pipe = signal.getsignal(signal.SIGPIPE)
    argv = mock.patch.object(sys, "argv", ["program", *map(str, args)])
    with argv, redirect_stdout(out), redirect_stderr(err):
        try:
            status = main() or 0
        except SystemExit as end:
            status = end.code
    signal.signal(signal.SIGPIPE, on_broken_pipe)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(args, status, *texts)


class Bomb:
    """Unpickling it creates the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def needs_cifar10(folder="cifar-10-batches-py"):
    """Skips the test where the real CIFAR is absent; fails where it must be there."""
    import pytest  # which the server of forks need not have

    if not (DATA / folder).is_dir():
        reason = f"{folder} is not in {DATA}"
        if os.environ.get("RESCALEVIT_REQUIRE_CIFAR"):
            pytest.fail(reason)
        pytest.skip(reason)


def refused(done, *words, program="train.py"):
    """Asserts that a run ended with status 2 and one line of error with these words; returns it."""
    text = getattr(done, "output", None) or done.stderr
    assert done.returncode == 2, text
    line = text.splitlines()[-1]
    assert line.startswith(f"{program}: error: ") and text.count("error: ") == 1, text
    assert "Traceback" not in text
    for word in words:
        assert str(word) in line, line
    return line


def events(folder):
    """What a folder of TensorBoard events holds, every point of it.

    TensorBoard reads the files in the order of their names, which hold the second and the number of
    the process. Forks of one run start several times a second, so the files are read as written.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(Path(folder).glob("*tfevents*"), key=lambda file: file.stat().st_mtime_ns)
    with tempfile.TemporaryDirectory() as ordered:
        for number, file in enumerate(files):
            shutil.copy(file, Path(ordered, f"events.out.tfevents.{number:04d}"))
        return EventAccumulator(ordered, size_guidance={"scalars": 0}).Reload()


def scalars(folder):
    """The curves in a folder of TensorBoard events: {tag: [(step, value), ...]}."""
    held = events(folder)
    return {
        tag: [(event.step, event.value) for event in held.Scalars(tag)]
        for tag in held.Tags()["scalars"]
    }


def write_log(path, norm_type="LN", evaluations=(), minutes=None):
    """A result log of (step, loss, accuracy)s as train.py writes it; `minutes`: to its end."""
    lines = [
        "Process rank: -1, device: cpu",
        "Training parameters Namespace(dataset='digits', fp16=False, img_size=32,"
        f" model_type='ViT-Ti_16', norm_type='{norm_type}', num_steps=500, pretrained_dir=None)",
    ]
    for step, loss, accuracy in evaluations:
        lines += [f"Global Steps: {step}", f"Valid Loss: {loss:.5f}"]
        lines += [f"Valid Accuracy: {accuracy:.5f}"]
    if minutes:
        lines += [f"Best Accuracy: \t{max(accuracy for *_, accuracy in evaluations):.6f}"]
        lines += ["End Training!", f"last {minutes:.1f} min"]
    path.write_text("".join(f"04/27/2021 13:52:23 - INFO - train - {line}\n" for line in lines))
    return path
