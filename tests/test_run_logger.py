"""A run's log and TensorBoard events as it writes them, dies over them and resumes them."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from programs import ROOT, TINY, events, scalars
from small import small_model
from tensorboard.summary.writer import event_file_writer
from tqdm import tqdm

from utils import run_logger
from utils.args import parse_args
from utils.data_utils import load_dataset
from utils.log_reader import read_log
from utils.precision import StepRecord
from utils.run_files import RunFiles
from utils.run_logger import RunLogger

BEGIN = "Training parameters Namespace(dataset='digits', fp16=False, img_size=32, "
BEGIN += "model_type='ViT-Ti_16', norm_type='LN', num_steps=500, pretrained_dir=None)"
TIME = r"\d\d/\d\d/\d{4} \d\d:\d\d:\d\d"
PREFIX = rf"{TIME} - (INFO|WARNING) - train - (?!{TIME}) *\S"


@pytest.fixture(autouse=True)
def numbers_of_event_files(monkeypatch):
    """From 0 on: TensorBoard reads the files of one second in the order of their names."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def start(folder, resume_step=None, text="", name="log.txt") -> RunLogger:
    """`text`, of the log of that name: what the checkpoint of step `resume_step` holds."""
    saved = resume_step and {"run": {"step": resume_step}, "log": {name: text}}
    logger = RunLogger(folder / "log.txt", folder / "events", saved=saved)
    if resume_step is None:
        logger.warning("Process rank: -1, device: cpu")
        logger.info(BEGIN)
    return logger


def evaluate(logger, *steps, accuracy=None):
    for step in steps:
        logger.log_evaluation(step, 6, 512, 100 / step, accuracy or step / 1000)
        logger.scalars(step, {"test/accuracy": accuracy or step / 1000})


def test_reader_reads_what_the_writer_wrote(tmp_path):
    logger = start(tmp_path)
    logger.info("Total Parameter: \t5.5M")
    evaluate(logger, 100, 200)
    assert read_log(logger.log_file).best_accuracy == 0.2 and not read_log(logger.log_file).finished
    logger.log_end(0.98765, 12.34, 567.8)
    logger.close()
    run = read_log(logger.log_file)
    assert (run.dataset, run.model_type, run.img_size) == ("digits", "ViT-Ti_16", 32)
    assert (run.steps, run.loss, run.accuracy) == ([100, 200], [1.0, 0.5], [0.1, 0.2])
    assert (run.total_parameters, run.best_accuracy, run.minutes) == ("5.5M", 0.98765, 12.3)
    assert run.finished and not run.pretrained and run.flags["num_steps"] == 500
    assert all(re.match(PREFIX, line) for line in logger.log_file.read_text().splitlines())


@pytest.mark.parametrize(
    "left",
    [
        lambda log: None,  # beyond the checkpoint
        lambda log: os.truncate(log, log.stat().st_size - 20),
        lambda log: os.truncate(log, 0),
        lambda log: log.unlink(),
    ],
)
def test_a_resumed_log_is_what_it_was_at_the_checkpoint(tmp_path, left):
    """`left`: what the process that died left of its log."""
    logger = start(tmp_path)
    evaluate(logger, 100, 200)
    text = logger.log_file.read_text()
    evaluate(logger, 300)
    logger.log_end(0.4, 1.0, 2.0)
    logger.close()
    left(logger.log_file)

    logger = start(tmp_path, 250, text)
    assert logger.log_file.read_text() == text and not logger.is_new
    logger.log_resumed(250)
    evaluate(logger, 300, accuracy=0.9)
    logger.close()
    run = read_log(logger.log_file)
    assert run.steps == [100, 200, 300] and run.best_accuracy == 0.9 and not run.finished
    assert run.flags["norm_type"] == "LN" and run.minutes is None
    assert all(re.match(PREFIX, line) for line in logger.log_file.read_text().splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events", "log.txt"]


def test_skipped_steps(tmp_path):
    """They are noted and have no point in the curves."""
    good = StepRecord(True, 2.0, 0.5, 4.0, 0.1)
    skipped = StepRecord(False, float("inf"), float("nan"), 8.0, 0.1)
    logger = start(tmp_path)
    logger.log_steps(4, [good, skipped, good, skipped], 10.0)
    logger.close()
    assert "Skipped: loss inf, gradient norm nan at step 2, loss scale 8\n" in (
        logger.log_file.read_text()
    )
    curves = scalars(tmp_path / "events")
    assert curves["train/loss"] == [(1, 2.0), (3, 2.0)]
    assert curves["train/images_per_s"] == [(4, 10.0)]
    assert {tag for tag, points in curves.items() if len(points) == 2} == {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/loss_scale",
    }


def test_a_fresh_run_and_one_from_another_run_s_checkpoint_start_the_log_anew(tmp_path):
    evaluate(start(tmp_path), 100)
    logger = start(tmp_path)
    assert read_log(logger.log_file).steps == [] and logger.is_new
    logger = start(tmp_path, 100, "of another name or other flags\n", name="other.txt")
    assert logger.is_new  # so that train.py logs the head of this one
    logger.info(BEGIN)
    evaluate(logger, 200)
    assert read_log(logger.log_file).steps == [200]


def test_an_inactive_logger_leaves_no_trace(tmp_path, capsys):
    logger = RunLogger(tmp_path / "log.txt", tmp_path / "events", active=False)
    evaluate(logger, 100)
    logger.warning("no")
    logger.log_steps(1, [StepRecord(True, 2.0, 0.5, 4.0, 0.1)], 10.0)
    logger.log_end(0.1, 1.0, 2.0)
    logger.text("flags", "no")
    logger.hparams({"a": 1}, {"b": 2.0})
    args = plan(logger, "--num_steps", "100")
    logger.say_time_left(20, 10, 10.0)
    logger.say_next(RunFiles(args))
    logger.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def plan(logger, *flags, step=0, evaluated=0):
    """Says the plan of a small run; returns its flags."""
    args = parse_args([*TINY, *"--train_batch_size 64 --eval_every 10".split(), *flags])
    run, last = {"step": step, "evaluated": evaluated}, args.stop_after or args.num_steps
    dataset = load_dataset("digits", "none")
    logger.say_plan(args, dataset, small_model(), "O0 in float32", 0.25, run, last)
    return args


def test_the_plan_is_said_and_not_logged(tmp_path, capsys):
    logger = start(tmp_path)
    log = logger.log_file.read_text()
    capsys.readouterr()
    plan(logger, "--num_steps", "25", step=10, evaluated=10)
    size = sum(p.numel() for p in small_model().parameters()) / 1e6
    assert capsys.readouterr().err.splitlines() == [
        f"ViT-Ti_16 with LN ({size:.3f}M parameters) on digits (1,437 training images); cpu,"
        " O0 in float32",
        "From step 10 to 25 of 25, 64 images each; 2 evaluations; 0.25 PFLOP in total",
    ]
    assert logger.log_file.read_text() == log


@pytest.mark.parametrize("stop_after", [None, 7, 9])
def test_evaluations_are_counted(tmp_path, stop_after):
    """Truth: the steps of train.py's loop, one by one."""
    logger = start(tmp_path)
    for num_steps in (9, 12):
        flags = f"--num_steps {num_steps} --eval_every 4"
        args = plan(logger, *flags.split(), *(["--stop_after", str(stop_after)] * bool(stop_after)))
        for first in range(1, num_steps + 2):
            steps = range(first, min(num_steps, stop_after or num_steps) + 1)
            due = [s for s in steps if s % args.eval_every == 0 or s == num_steps]
            if first <= logger.last + 1:
                assert logger._evaluations(first) == len(due)


def test_the_time_left_is_said_once_after_ten_steps(tmp_path, capsys):
    """Truth: (100 - 12) steps of 64 images, 10 evaluations of 360 at a third, at 10 images/s."""

    def said(*flags, steps=((0, 6), (6, 12), (12, 18))):
        logger = start(tmp_path)
        plan(logger, "--num_steps", "100", *flags)
        capsys.readouterr()
        for last_read, step in steps:
            logger.say_time_left(step, last_read, 10.0)
        return capsys.readouterr().err

    assert (88 * 64 + 9 * 360 / 3) / 10 / 60 == pytest.approx(11.2, abs=0.05)
    assert said() == "About 11 min left, with 9 evaluations, at 10 images/s\n"
    assert said("--compile").count("with 9 evaluations") == 1
    assert said("--compile", steps=((0, 6), (6, 12))) == ""  # half of it was compiling
    assert said(steps=((0, 100),)) == ""
    assert [run_logger._duration(s) for s in (4.4, 80, 600, 7980)] == [
        "4 s",
        "80 s",
        "10 min",
        "2 h 13 min",
    ]


def test_what_is_next(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python3", "../train.py", "--name", "a"])
    monkeypatch.setattr(sys, "argv", ["../train.py", "--name", "a"])
    logger = start(tmp_path)
    args = plan(logger, "--output_dir", "my logs")
    files = RunFiles(args)
    capsys.readouterr()
    logger.say_next(files)
    assert capsys.readouterr().err.splitlines() == [
        f"Log: {files.log}",
        f"Best weights: {files.best}",
        f"TensorBoard: {files.tensorboard}",
        "Next:",
        "  python3 ../train.py --name a --eval",
        "  tensorboard --logdir logs",
        "  python3 ../results.py 'my logs'/*.txt",
    ]
    args.processes = 4  # with others the files' names would differ
    logger.say_next(files)
    assert "  torchrun --nproc_per_node 4 ../train.py --name a --eval\n" in capsys.readouterr().err


def test_messages_on_stderr_leave_a_progress_bar_whole(tmp_path, capsys):
    logger = start(tmp_path)
    with tqdm(total=2, file=sys.stderr) as bar:
        bar.update()
        bar.refresh()
        logger.info("two\nlines")
    line = logger.log_file.read_text().splitlines()[-2]
    shown = capsys.readouterr().err
    before, after = shown.split(f"{line}\nlines\n")
    assert re.search(r"\r *\r$", before), "the bar was not cleared before the message"
    assert "50%" in after, "the bar was not drawn again after the message"


def test_tensorboard_shows_one_curve_of_a_resumed_run(tmp_path):
    logger = start(tmp_path)
    evaluate(logger, 100, 200, 300)
    logger.close()
    logger = start(tmp_path, resume_step=200)
    evaluate(logger, 300, accuracy=0.75)
    logger.close()
    steps, values = zip(*scalars(tmp_path / "events")["test/accuracy"])
    assert steps == (100, 200, 300) and values == pytest.approx([0.1, 0.2, 0.75])


def test_tensorboard_shows_a_fresh_run_without_its_predecessor(tmp_path):
    for step in (100, 200):
        logger = start(tmp_path)
        evaluate(logger, step)
        logger.close()
    assert scalars(tmp_path / "events") == {"test/accuracy": [(200, pytest.approx(0.2))]}


def test_tensorboard_holds_text_and_hparams_in_the_run_s_own_folder(tmp_path):
    logger = start(tmp_path)
    logger.text("flags", "seed 42")
    flags = {"seed": 42, "fp16": True, "pretrained_dir": None, "layers": [0, 3]}
    logger.hparams(flags, {"test/best_accuracy": 0.5})
    logger.close()
    assert all(path.is_file() for path in (tmp_path / "events").iterdir())
    held = events(tmp_path / "events")
    assert scalars(tmp_path / "events") == {"test/best_accuracy": [(0, 0.5)]}
    assert held.Tensors("flags/text_summary")[0].tensor_proto.string_val == [b"seed 42"]
    session = held.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    for name in (*flags, "[0, 3]"):
        assert name.encode() in session


def test_the_commit_is_read_without_git_s_lock(tmp_path, monkeypatch):
    """Truth: `git rev-parse`. A file's time is not the index's any more, which has git rewrite the
    index under its lock where it may; a kill -9 there would leave the lock."""

    def git(*args):
        identity = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        command = ["git", "-C", tmp_path, *identity, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit():
        return run_logger._environment().rpartition("commit ")[2]

    file, index = tmp_path / "run_logger.py", tmp_path / ".git" / "index"
    shutil.copy(ROOT / "utils/run_logger.py", file)
    monkeypatch.setattr(run_logger, "__file__", str(file))
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    os.utime(file, (0, 0))
    before = index.read_bytes()
    assert commit() == git("rev-parse", "--short", "HEAD")
    assert index.read_bytes() == before
    git("status")  # as this does where it may
    assert index.read_bytes() != before
    file.write_text("changed")
    assert commit().endswith("-dirty")
