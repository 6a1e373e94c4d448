"""A run that is killed at any moment and resumed ends as one never interrupted, bit for bit.

Most runs are of small models, in forks of one process (forks.py); the first test is of the real
command.
"""

import shutil

import pytest
import torch
from programs import TINY, events, refused, run
from runs import (
    AFTER_RENAME,
    BEFORE_RENAME,
    BEFORE_SAVE,
    HALF_WRITTEN,
    IN_EVALUATION,
    IN_STEP,
    KILLED,
    OVERFLOW,
    RESUME,
    RUN,
    assert_same,
    content,
    digest,
    left,
    start,
    steps,
    wait_for,
)

from models.fast_cpu import has_bf16_units
from models.norms import NORM_TYPES
from utils.precision import LEVELS

STOPPED_IN_EVALUATION = IN_EVALUATION.replace("2,", "2, stop(signal.SIGTERM),")
# Where a processor has no bf16 units, bf16 is very slow and not what --fp16 means.
HALF = [f"--fp16 --fp16_opt_level {level}" for level in LEVELS[1:]] if has_bf16_units() else []


# Kill -9


def test_the_command_itself(tmp_path):
    """At full depth, with two threads: killed once, asked to stop once, then left to its end."""
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    args = [*RUN, "--train_batch_size", "24"]
    resume = [*args, "--resume"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run(args, whole, env=threads)

    first = start(resume, broken, threads)  # nothing is there yet: from the start
    wait_for(broken, "output/*_step_3.bin", first)
    first.kill()
    assert first.wait(60) == KILLED
    second = start(resume, broken, threads)
    wait_for(broken, "output/*_step_9.bin", second)
    second.terminate()
    assert second.wait(60) == 143
    assert "--resume continues" in second.stderr.read()
    run(resume, broken, env=threads)
    assert_same(broken, left(whole))


# All types at one level; those that keep statistics or reparametrize, and LN, at all levels.
STATEFUL = ("LN", "BN", "RepBN", "RescaleNet", "SigmaReparam")
KILLED_RUNS = [(n, "") for n in NORM_TYPES] + [(n, flags) for n in STATEFUL for flags in HALF]


@pytest.mark.parametrize(("norm_type", "flags"), KILLED_RUNS)
def test_killed_at_six_points(forks, reference, tmp_path, norm_type, flags):
    """One run that dies again and again, over two epochs' ends.

    Of Rescale's 8 calibration batches step 3's checkpoint has seen 6, and step 4 the last 2.
    """
    flags += f" --norm_type {norm_type}"
    args = RESUME + flags.split()
    for setup, newest in [
        (IN_STEP.format(4), [3]),
        (HALF_WRITTEN, [3]),
        (BEFORE_RENAME.format(6), [3]),
        (AFTER_RENAME.format(6), [3, 6]),
        (IN_EVALUATION, [3, 6]),  # of step 8
        (BEFORE_SAVE.format(12), [6, 9]),  # its evaluation is over, the best weights are saved
    ]:
        died = forks.run(args, tmp_path, setup, check=False)
        assert died.returncode == KILLED and steps(tmp_path) == newest, f"{setup}\n{died.output}"
    forks.run(args, tmp_path)
    assert steps(tmp_path) == [15, 16]
    assert_same(tmp_path, reference(flags))

    again = forks.run([*args, "--eval_batch_size", "50"], tmp_path)  # decides no result
    assert again.output.endswith(".txt is finished: nothing to do\n")
    assert again.output.count("\n") == 1


@pytest.mark.parametrize("flags", HALF)
@pytest.mark.parametrize("norm_type", [name for name in NORM_TYPES if name not in STATEFUL])
def test_killed_once_in_half(forks, reference, tmp_path, norm_type, flags):
    """The other types at the other levels."""
    flags += f" --norm_type {norm_type}"
    args = RESUME + flags.split()
    assert forks.run(args, tmp_path, IN_STEP.format(8), check=False).returncode == KILLED
    forks.run(args, tmp_path)
    assert_same(tmp_path, reference(flags))


@pytest.mark.skipif(has_bf16_units(), reason="shown at all levels above")
def test_bf16_without_its_units(forks, reference, tmp_path):
    flags = "--norm_type Rescale --fp16 --half_dtype bf16 --train_batch_size 24"
    args = RESUME + flags.split()
    assert forks.run(args, tmp_path, IN_STEP.format(8), check=False).returncode == KILLED
    forks.run(args, tmp_path)
    assert_same(tmp_path, reference(flags))


def test_looking_at_the_signal_changes_nothing(forks, reference, tmp_path):
    """Killed before its checkpoint of step 12, it still has one figure of each evaluation."""
    args = [*RESUME, "--log_signal"]
    died = forks.run(args, tmp_path, BEFORE_SAVE.format(12), check=False)
    assert died.returncode == KILLED
    forks.run(args, tmp_path)
    assert_same(tmp_path, reference())
    figures = events(next(tmp_path.glob("logs/tiny_*"))).Images("attention")
    assert [figure.step for figure in figures] == [4, 8, 12, 16]


def test_killed_before_the_first_checkpoint(forks, reference, tmp_path):
    """The best weights of step 2 are there, nothing else: it starts again from the start."""
    args = [*RESUME, "--eval_every", "2"]
    assert forks.run(args, tmp_path, IN_STEP.format(3), check=False).returncode == KILLED
    assert steps(tmp_path) == [] and list(tmp_path.glob("output/*_checkpoint.bin"))
    forks.run(args, tmp_path)
    assert_same(tmp_path, reference("--eval_every 2"))


@pytest.mark.parametrize(
    "flags, scales",
    [
        ("--norm_type BN --fp16_opt_level O1", [2.0**16] * 4 + [2.0**15] * 3 + [2.0**14] * 7),
        ("--norm_type Rescale --fp16_opt_level O2 --loss_scale 512", [512.0] * 14),
    ],
    ids=["dynamic", "static"],
)
def test_loss_scale_and_skipped_steps(forks, reference, tmp_path, flags, scales):
    """fp16, killed after skipped steps, before and after the checkpoint that counts them."""
    flags += " --fp16 --half_dtype fp16 --train_batch_size 24"  # fp16 is slow on a CPU
    overflow = OVERFLOW.format((4, 8))
    whole = reference(flags, overflow)
    skipped = [line for line in whole["log"] if "Skipped" in line]
    for line, step, scale in zip(skipped, (5, 9), (scales[0], scales[6]), strict=True):
        assert line.endswith(f" at step {step}, loss scale {scale:g}")
    kept = [step for step in range(1, 17) if step not in (5, 9)]  # a skipped step has no point
    assert whole["curves"]["train/loss_scale"] == list(zip(kept, scales, strict=True))

    args = RESUME + flags.split()
    for place in (BEFORE_SAVE.format(6), IN_STEP.format(5), BEFORE_SAVE.format(9)):
        died = forks.run(args, tmp_path, overflow + place, check=False)
        assert died.returncode == KILLED and "Skipped" in died.output
    forks.run(args, tmp_path, overflow)
    assert_same(tmp_path, whole)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    "norm_type, interrupt, status",
    [
        ("BN", IN_STEP.format(10), KILLED),  # after an epoch's short last batch
        ("Rescale", STOPPED_IN_EVALUATION.replace("2,", "6,"), 143),  # the third, of step 12
    ],
    ids=["BN", "Rescale"],
)
def test_compiled(forks, reference, tmp_path, norm_type, interrupt, status):
    """The order in which shapes are compiled differs from that of the run never interrupted."""
    flags = f"--norm_type {norm_type} --fp16 --eval_batch_size 180 --compile"
    one_block = "shrink(1)\n"
    args = RESUME + flags.split()
    assert forks.run(args, tmp_path, one_block + interrupt, check=False).returncode == status
    forks.run(args, tmp_path, one_block)
    assert_same(tmp_path, reference(flags, one_block))


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
    stop = f"stop(signal.{name})"
    # Before a first step nothing is worth saving: in a download, or in the first step.
    done = forks.run(RESUME, tmp_path, f"at(train, 'load_dataset', do={stop})", check=False)
    assert done.returncode == status and not list(tmp_path.glob("output/[!.]*"))
    first_step = f"at(torch.nn.functional, 'cross_entropy', do={stop})"
    done = forks.run(RESUME, tmp_path, first_step, check=False)
    assert done.returncode == status and not steps(tmp_path)

    done = forks.run(RESUME, tmp_path, IN_STEP.format(f"4, {stop}"), check=False)
    assert done.returncode == status
    assert done.output.endswith(f"Stopped by {name} after step 4 of 16; --resume continues\n")
    assert f"{name}: stops after this step" in done.output
    assert steps(tmp_path) == [3, 4]
    forks.run(RESUME, tmp_path)
    assert_same(tmp_path, reference())


def test_signal_during_evaluation(forks, reference, tmp_path):
    """It is given up and made anew on resuming; if killed after that, it is not logged twice."""
    assert forks.run(RESUME, tmp_path, STOPPED_IN_EVALUATION, check=False).returncode == 143
    assert steps(tmp_path) == [3, 4]
    assert forks.run(RESUME, tmp_path, IN_STEP.format(1), check=False).returncode == KILLED
    forks.run(RESUME, tmp_path)
    found, whole = left(tmp_path), reference()
    curves = {tag: list(dict.fromkeys(points)) for tag, points in found["curves"].items()}
    assert found | {"curves": curves} == whole  # a curve may have the same point twice


@pytest.mark.parametrize("name, status, place", [("SIGTERM", 143, "save"), ("SIGINT", 130, "step")])
def test_second_signal_exits_at_once(forks, reference, tmp_path, name, status, place):
    stop = f"stop(signal.{name})"
    if place == "save":
        second = BEFORE_RENAME.format(5).replace("where", f"do={stop}, where")
        setup = IN_STEP.format(f"5, {stop}") + second
    else:
        setup = IN_STEP.format(f"5, stop(signal.{name}, signal.{name})")
    assert forks.run(RESUME, tmp_path, setup, check=False).returncode == status
    assert steps(tmp_path) == [3]
    assert bool(list(tmp_path.glob("output/*.part"))) == (place == "save")
    forks.run(RESUME, tmp_path)
    assert_same(tmp_path, reference())


# Flags


def test_stop_after(forks, reference, tmp_path):
    done = forks.run([*RUN, "--stop_after", "7"], tmp_path)
    assert done.output.endswith("Stopped after step 7 of 16; --resume continues\n")
    assert steps(tmp_path) == [6, 7]
    before = content(next(tmp_path.glob("output/*_step_7.bin")))
    for last in ("7", "5"):
        done = forks.run([*RESUME, "--stop_after", last], tmp_path)  # has nothing to do
        assert done.output.endswith("Stopped after step 7 of 16; --resume continues\n")
    assert content(next(tmp_path.glob("output/*_step_7.bin"))) == before
    forks.run(RESUME, tmp_path)
    assert_same(tmp_path, reference())


def test_saves_with_each_evaluation_by_default(forks, tmp_path):
    forks.run([*TINY, "--stop_after", "6"], tmp_path)
    assert steps(tmp_path) == [6]
    forks.run([*TINY, "--resume"], tmp_path)
    assert steps(tmp_path) == [6, 12]


def test_overwrite_starts_anew(forks, tmp_path):
    forks.run([*RUN, "--stop_after", "3"], tmp_path)
    forks.run([*RUN, "--stop_after", "2", "--overwrite"], tmp_path)
    assert steps(tmp_path) == [2]


def test_other_flags_are_an_error_that_lists_them(forks, tmp_path):
    forks.run([*RUN, "--stop_after", "6"], tmp_path)
    (file,) = tmp_path.glob("output/*_step_6.bin")
    other = "--seed 7 --learning_rate 0.5 --norm_type BN --deterministic --num_steps 20".split()
    line = refused(
        forks.run([*RUN, *other, "--resume", file], tmp_path, check=False),
        "--deterministic True (there False)",
        "--learning_rate 0.5 (there 0.02)",
        "--norm_type BN (there 'LN')",
        "--num_steps 20 (there 16)",
        "--seed 7 (there 42)",
    )
    assert "batch" not in line.split("other flags")[1]


def test_checkpoint_from_before_an_entry_existed(forks, reference, tmp_path):
    forks.run([*RUN, "--stop_after", "6"], tmp_path)
    (file,) = tmp_path.glob("output/*_step_6.bin")
    saved = torch.load(file, weights_only=True)
    del saved["flags"]["patch_dropout"], saved["flags"]["patch_dropout_until"]
    torch.save(saved, file)
    forks.run(RESUME, tmp_path)
    assert_same(tmp_path, reference())


def test_another_machine_is_noted(forks, tmp_path):
    """Resuming there is allowed, but not exact."""
    forks.run([*RUN, "--stop_after", "3"], tmp_path)
    done = forks.run(RESUME, tmp_path, "train.accelerate = lambda *_: 'others'")
    assert "INFO - train - Not exact from here on: O0 in float32, others; before, O0" in done.output


def test_num_steps_may_grow_during_the_warmup(forks, reference, tmp_path):
    short = [*RUN, "--num_steps", "10"]
    forks.run([*short, "--stop_after", "5"], tmp_path)
    (file,) = tmp_path.glob("output/*_step_5.bin")
    forks.run([*RESUME, file], tmp_path)
    (final,) = tmp_path.glob("output/*_final.bin")
    # as if it had been 16 from the start
    assert reference()["weights"][final.name] == digest(final.read_bytes())

    forks.run([*short, "--resume", "--stop_after", "6"], tmp_path)  # one step beyond the warmup
    (file,) = tmp_path.glob("output/*_step_6.bin")
    for number in ("16", "9"):
        done = forks.run([*short, "--num_steps", number, "--resume", file], tmp_path, check=False)
        refused(done, f"--num_steps {number} (there 10)")


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
