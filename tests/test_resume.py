"""A run that is killed at any moment and resumed ends as one never interrupted, bit for bit.

Most runs are of models cut to two blocks, in forks of one process (forks.py); the first test is of
the real command.
"""

import hashlib
import re
import shutil
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
from utils.checkpoint import load_checkpoint
from utils.precision import LEVELS

# 6 steps an epoch, the last batch of it shorter. Saves and evaluations fall together at step 12 and
# at the end, 16.
FLAGS = "--train_batch_size 240 --gradient_accumulation_steps 2 --num_steps 16 --eval_every 4"
FLAGS += " --save_every 3 --log_every 2 --eval_batch_size 100"
RUN = TINY + FLAGS.split()
RESUME = [*RUN, "--resume"]
CURVES = "train/loss train/lr train/grad_norm train/loss_scale test/loss test/accuracy".split()
KILLED = -signal.SIGKILL

# Where a run is killed
IN_STEP = "at(precision.Precision, 'step', {})"  # the n-th of this process
HALF_WRITTEN = (
    "at(checkpoint._HashingFile, 'write', 40, where=lambda file, _: '_step_' in str(file.file))"
)
BEFORE_RENAME = "at(os, 'replace', where=lambda source, *_: '_step_{}.' in str(source))"
AFTER_RENAME = BEFORE_RENAME.replace("where", "after=True, where")
IN_EVALUATION = "at(train.F, 'cross_entropy', 2, where=lambda *_: not torch.is_grad_enabled())"
BEFORE_SAVE = "at(train, 'save_run', where=lambda files, precision, run, args: run['step'] == {})"


@pytest.fixture(scope="module")
def forks():
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def reference(forks, tmp_path_factory):
    """What a never interrupted run with further `flags` left; each is made once."""
    made = {}

    def reference(flags="", setup=""):
        if (flags, setup) not in made:
            folder = tmp_path_factory.mktemp("reference")
            forks.run(RUN + flags.split(), folder, setup)
            made[flags, setup] = left(folder)
        return made[flags, setup]

    return reference


def left(folder):
    """All that the one run in `folder` left, as comparable values without the times in it."""
    output = Path(folder, "output")
    assert not [*output.glob("*.part"), *output.glob("*.lock"), *output.glob("*.tmp")]
    (log,) = output.glob("*.txt")
    (events,) = Path(folder, "logs").iterdir()
    steps = sorted(output.glob("*_step_*.bin"))
    return {
        "weights": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(output.glob("*.bin"))
            if path not in steps
        },
        "checkpoints": {path.name: content(path) for path in steps},
        "log": messages(log),
        "curves": scalars(events),
    }


def content(path):
    """A checkpoint's content, tensors as their bytes' digest."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return value.dtype, value.shape, hashlib.sha256(data).hexdigest()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k != "seconds"}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(torch.load(path, weights_only=True))


def messages(log):
    """A log's lines without times and what may change, nor those that tell of interruptions."""
    lines = [re.sub(r"^\d\S+ \d\S+ - ", "", line) for line in log.read_text().splitlines()]
    change = r" (resume|stop_after|deterministic)=[^,)]*| commit \S+$"
    lines = [re.sub(change, "", line) for line in lines]
    told = re.compile(r"INFO - train - (Resumed from |Stopped |last |.*; passed over)")
    return [line for line in lines if not told.match(line)]


def scalars(folder):
    """{tag: [(step, value), ...]} as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in CURVES}


def assert_same(folder, reference):
    found = left(folder)
    for kind, value in reference.items():
        assert found[kind] == value, kind


def steps(folder):
    """The steps whose checkpoints the run in `folder` left."""
    names = (path.name for path in Path(folder, "output").glob("*_step_*.bin"))
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


# Kill -9


def test_the_command_itself(tmp_path):
    """At full depth, with two threads: killed once, asked to stop once, then left to its end."""
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run(RUN, whole, env=threads)

    first = start(RESUME, broken, threads)  # nothing is there yet: from the start
    wait_for(broken, "output/*_step_3.bin", first)
    first.kill()
    assert first.wait(60) == KILLED
    second = start(RESUME, broken, threads)
    wait_for(broken, "output/*_step_9.bin", second)
    second.terminate()
    assert second.wait(60) == 143
    assert "--resume continues" in second.stderr.read()
    run(RESUME, broken, env=threads)
    assert_same(broken, left(whole))

    again = run([*RESUME, "--eval_batch_size", "50"], broken)  # decides no result
    assert again.stdout.endswith(".txt is finished: nothing to do\n") and not again.stderr
    assert_same(broken, left(whole))


@pytest.mark.parametrize("level", ["none", *LEVELS[1:]])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_killed_at_six_points(forks, reference, tmp_path, norm_type, level):
    """One run that dies again and again, over two epochs' ends.

    Of Rescale's 8 calibration batches step 3's checkpoint has seen 6, and step 4 the last 2.
    """
    flags = f"--norm_type {norm_type}"
    flags += f" --fp16 --fp16_opt_level {level}" if level != "none" else ""
    for setup, newest in [
        (IN_STEP.format(4), [3]),
        (HALF_WRITTEN, [3]),
        (BEFORE_RENAME.format(6), [3]),
        (AFTER_RENAME.format(6), [3, 6]),
        (IN_EVALUATION, [3, 6]),  # of step 8
        (BEFORE_SAVE.format(12), [6, 9]),  # its evaluation is over, the best weights are saved
    ]:
        died = forks.run(RESUME + flags.split(), tmp_path, setup, check=False)
        assert died.returncode == KILLED and steps(tmp_path) == newest, f"{setup}\n{died.output}"
    forks.run(RESUME + flags.split(), tmp_path)
    assert steps(tmp_path) == [15, 16]
    assert_same(tmp_path, reference(flags))


def test_killed_before_the_first_checkpoint(forks, reference, tmp_path):
    """The best weights of step 2 are there, nothing else: it starts again from the start."""
    args = [*RESUME, "--eval_every", "2"]
    assert forks.run(args, tmp_path, IN_STEP.format(3), check=False).returncode == KILLED
    assert steps(tmp_path) == [] and list(tmp_path.glob("output/*_checkpoint.bin"))
    forks.run(args, tmp_path)
    assert_same(tmp_path, reference("--eval_every 2"))


# The loss of the 5th and the 8th training step's first attempt is infinite.
OVERFLOW = """
seed_step, backward = train.seed_step, precision.Precision.backward
def seeded(seed, window):
    precision.window = window
    seed_step(seed, window)
def overflowing(self, loss, accumulation=1):
    backward(self, loss * (float("inf") if precision.window in (4, 8) else 1), accumulation)
train.seed_step, precision.Precision.backward = seeded, overflowing
"""


@pytest.mark.parametrize("norm_type, level", [("BN", "O1"), ("Rescale", "O2")])
def test_loss_scale_and_skipped_steps(forks, reference, tmp_path, norm_type, level):
    """fp16 with its dynamic loss scale, killed after a skipped step, before the next checkpoint."""
    flags = f"--norm_type {norm_type} --fp16 --fp16_opt_level {level} --half_dtype fp16"
    flags += " --train_batch_size 24"  # fp16 is slow on a CPU
    whole = reference(flags, OVERFLOW)
    skipped = [line for line in whole["log"] if "Skipped" in line]
    assert [line.endswith("at step 5, loss scale 65536") for line in skipped] == [True, False]
    assert [value for _, value in whole["curves"]["train/loss_scale"]] == (
        [2.0**16] * 4 + [2.0**15] * 3 + [2.0**14] * 9
    )

    args = RESUME + flags.split()
    for place in (IN_STEP.format(7), IN_STEP.format(4), BEFORE_SAVE.format(9)):
        died = forks.run(args, tmp_path, OVERFLOW + place, check=False)
        assert died.returncode == KILLED and "Skipped" in died.output
    forks.run(args, tmp_path, OVERFLOW)
    assert_same(tmp_path, whole)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("norm_type", ["BN", "Rescale"])
def test_compiled(forks, reference, tmp_path, norm_type):
    """Killed after an epoch's short last batch, and stopped in an evaluation.

    The order in which shapes are compiled then differs from that of the run never interrupted.
    """
    flags = f"--norm_type {norm_type} --fp16 --img_size 32 --eval_batch_size 180 --compile"
    one_block = "shrink(1);"
    args = RESUME + flags.split()
    whole = reference(flags, one_block)
    setup = one_block + IN_STEP.format(10)
    assert forks.run(args, tmp_path, setup, check=False).returncode == KILLED
    setup = one_block + IN_EVALUATION[:-1] + ", do=stop(signal.SIGTERM))"
    assert forks.run(args, tmp_path, setup, check=False).returncode == 143
    forks.run(args, tmp_path, one_block)
    assert_same(tmp_path, whole)


def test_curves_of_a_slow_log_disk(forks, reference, tmp_path):
    """What is before a checkpoint is in TensorBoard's files once the checkpoint is."""
    slow = """
from tensorboard.summary.writer.record_writer import RecordWriter
write = RecordWriter.write
RecordWriter.write = lambda self, data: (time.sleep(0.05), write(self, data))
"""
    setup = slow + AFTER_RENAME.format(12)
    assert forks.run(RESUME, tmp_path, setup, check=False).returncode == KILLED
    forks.run(RESUME, tmp_path)
    assert_same(tmp_path, reference())


# Signals


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 0)])
def test_signal_finishes_the_step_and_saves(forks, reference, tmp_path, name, status):
    setup = IN_STEP.format(f"4, stop(signal.{name})")
    stopped = forks.run(RESUME, tmp_path, setup, check=False)
    assert stopped.returncode == status
    assert stopped.output.endswith(f"Stopped by {name} after step 4 of 16; --resume continues\n")
    assert steps(tmp_path) == [3, 4]
    forks.run(RESUME, tmp_path)
    assert_same(tmp_path, reference())


def test_signal_during_evaluation(forks, reference, tmp_path):
    """It is given up and made anew on resuming; if killed after that, it is not logged twice."""
    setup = IN_EVALUATION[:-1] + ", do=stop(signal.SIGTERM))"
    assert forks.run(RESUME, tmp_path, setup, check=False).returncode == 143
    assert steps(tmp_path) == [3, 4]
    assert forks.run(RESUME, tmp_path, IN_STEP.format(1), check=False).returncode == KILLED
    forks.run(RESUME, tmp_path)
    found, whole = left(tmp_path), reference()
    curves = {tag: list(dict.fromkeys(points)) for tag, points in found["curves"].items()}
    assert found | {"curves": curves} == whole  # a curve may have the same point twice


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("place", ["a step", "a save"])
def test_second_signal_exits_at_once(forks, reference, tmp_path, name, status, place):
    first = IN_STEP.format(f"5, stop(signal.{name})")
    second = first.replace(")", f", signal.{name})", 1)
    if place == "a save":
        where = BEFORE_RENAME.format(5)[:-1]
        second = f"{first}\n{where}, do=stop(signal.{name}))"
    assert forks.run(RESUME, tmp_path, second, check=False).returncode == status
    assert steps(tmp_path) == [3]
    assert bool(list(tmp_path.glob("output/*.part"))) == (place == "a save")
    forks.run(RESUME, tmp_path)
    assert_same(tmp_path, reference())


# Flags


def test_stop_after(forks, reference, tmp_path):
    done = forks.run([*RUN, "--stop_after", "7"], tmp_path)
    assert done.output.endswith("Stopped after step 7 of 16; --resume continues\n")
    assert steps(tmp_path) == [6, 7]
    before = content(next(tmp_path.glob("output/*_step_7.bin")))
    forks.run([*RESUME, "--stop_after", "7"], tmp_path)  # has nothing to do
    assert content(next(tmp_path.glob("output/*_step_7.bin"))) == before
    forks.run(RESUME, tmp_path)
    assert_same(tmp_path, reference())


def test_saves_with_each_evaluation_by_default(forks, tmp_path):
    forks.run([*TINY, "--stop_after", "6"], tmp_path)
    assert steps(tmp_path) == [6]
    forks.run([*TINY, "--resume"], tmp_path)
    assert steps(tmp_path) == [6, 12]


def test_existing_run_is_not_overwritten_unasked(forks, tmp_path):
    forks.run([*RUN, "--stop_after", "3"], tmp_path)
    done = forks.run(RUN, tmp_path, check=False)
    assert done.returncode == 2 and done.output.count("\n") == 1
    assert "--resume continues it, --overwrite starts anew" in done.output
    forks.run([*RUN, "--stop_after", "2", "--overwrite"], tmp_path)
    assert steps(tmp_path) == [2]


def test_other_flags_are_an_error_that_lists_them(forks, tmp_path):
    forks.run([*RUN, "--stop_after", "6"], tmp_path)
    (file,) = tmp_path.glob("output/*_step_6.bin")
    other = "--seed 7 --learning_rate 0.5 --norm_type BN --deterministic --num_steps 20".split()
    done = forks.run([*RUN, *other, "--resume", file], tmp_path, check=False)
    assert done.returncode == 2 and done.output.count("\n") == 1
    for text in (
        "--deterministic True (there False)",
        "--learning_rate 0.5 (there 0.02)",
        "--norm_type BN (there 'LN')",
        "--num_steps 20 (there 16)",
        "--seed 7 (there 42)",
    ):
        assert text in done.output
    assert "batch" not in done.output.split("other flags")[1]


def test_num_steps_may_grow_during_the_warmup(forks, reference, tmp_path):
    short, long = [*RUN, "--num_steps", "10"], [*RUN, "--resume"]
    forks.run([*short, "--stop_after", "5"], tmp_path)
    (file,) = tmp_path.glob("output/*_step_5.bin")
    forks.run([*long, file], tmp_path)
    (final,) = tmp_path.glob("output/*_final.bin")
    found = hashlib.sha256(final.read_bytes()).hexdigest()
    assert reference()["weights"][final.name] == found  # as if it had been 16 from the start

    forks.run([*short, "--resume", "--stop_after", "6"], tmp_path)  # one step beyond the warmup
    (file,) = tmp_path.glob("output/*_step_6.bin")
    for more in (["--num_steps", "16"], ["--num_steps", "9"]):
        done = forks.run([*short, *more, "--resume", file], tmp_path, check=False)
        assert done.returncode == 2 and f"--num_steps {more[1]} (there 10)" in done.output


# Without resuming


@pytest.mark.parametrize("flags", ["", "--deterministic"])
def test_two_runs_of_one_seed_are_equal(forks, reference, tmp_path, flags):
    forks.run(RUN + flags.split(), tmp_path)
    assert_same(tmp_path, reference(flags))
    plain = reference()
    assert plain["curves"] == reference(flags)["curves"]
    assert plain["curves"] != reference("--seed 43")["curves"]


def test_deterministic_algorithms_are_on(forks, tmp_path):
    setup = "at(train, 'train', do=lambda: print(torch.are_deterministic_algorithms_enabled()))"
    for flags, answer in ([], "False"), (["--deterministic"], "True"):
        done = forks.run([*RUN, *flags, "--stop_after", "1"], tmp_path, setup)
        assert done.output.startswith(f"{answer}\n")


def test_checkpoint_holds_all_that_drives_the_run(forks, tmp_path):
    forks.run([*RUN, "--stop_after", "3", "--fp16"], tmp_path)
    (file,) = tmp_path.glob("output/*_step_3.bin")
    saved = load_checkpoint(file, digest_required=True)
    assert saved.keys() == {"model", "precision", "optimizer", "run", "flags"}
    assert saved["precision"].keys() == {"scale", "clean", "updates", "healthy"}
    assert saved["run"].keys() == set(
        "step window skipped skipped_in_a_row seconds evaluated accuracy best_accuracy".split()
    )
    momenta = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    assert all(momentum.any() for momentum in momenta[:4])
